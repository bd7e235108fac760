"""What a user can get wrong about a place on S3."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from olmo.checkpoint.remote_saves import RemoteSaves
from olmo.exceptions import ConfigurationError
from tests.remote_runs import objects
from tests.s3 import KEYS, Relay, client_of


def test_a_place_that_can_be_used(remote: RemoteSaves) -> None:
    remote.check()
    assert not objects(remote)
    RemoteSaves("s3://runs", remote.folder).check()


def test_no_such_bucket(relay: Relay, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"^remote_save_folder: s3://nowhere/a: 404 NoSuchBucket; it takes a"):
        RemoteSaves("s3://nowhere/a", tmp_path).check()
    with pytest.raises(ConfigurationError, match=r"^remote_save_folder: s3://run\?/a: .*Invalid bucket name") as caught:
        RemoteSaves("s3://run?/a", tmp_path).check()
    assert "\n" not in str(caught.value)


def test_no_credentials(relay: Relay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in KEYS:
        monkeypatch.delenv(name)
    with pytest.raises(ConfigurationError, match=r"^s3://: no credentials to write with; set AWS_ACCESS_KEY_ID and"):
        RemoteSaves("s3://runs/a", tmp_path)
    monkeypatch.setenv("S3_PROFILE", "mine")
    with pytest.raises(ConfigurationError, match=r"^s3://: .*mine"):
        RemoteSaves("s3://runs/a", tmp_path)
    (tmp_path / "nothing").write_text("[mine]\naws_access_key_id = a\naws_secret_access_key = b\n")
    RemoteSaves("s3://runs/a", tmp_path).check()


def test_no_server(relay: Relay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(OSError, match=r"^remote_save_folder: s3://runs/a: Connection refused$"):
        RemoteSaves("s3://runs/a", tmp_path).check()


ACTIONS = ["s3:ListBucket", "s3:GetObject", "s3:PutObject", "s3:DeleteObject"]


def test_no_permission(relay: Relay, server: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """moto asks for the rights of users as S3 does, once it is told to."""
    import requests

    def ask_for_rights(after: str) -> None:
        """After so many requests more."""
        requests.post(f"http://127.0.0.1:{server}/moto-api/reset-auth", data=after, timeout=10).raise_for_status()

    iam = client_of(server, "iam")
    iam.create_user(UserName="someone")
    made = iam.create_access_key(UserName="someone")["AccessKey"]
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", made["AccessKeyId"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", made["SecretAccessKey"])
    remote = RemoteSaves("s3://runs/of/someone", tmp_path)
    try:
        for lacking in [*ACTIONS, None]:
            ask_for_rights("inf")
            allowed = [action for action in ACTIONS if action != lacking]
            policy = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": allowed, "Resource": "*"}]}
            iam.put_user_policy(UserName="someone", PolicyName="some", PolicyDocument=json.dumps(policy))
            ask_for_rights("0")
            if lacking is None:
                remote.check()
            else:
                with pytest.raises(ConfigurationError, match=f"^remote_save_folder: {remote.place.url}.*: 403 Access"):
                    remote.check()
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAUNKNOWNUNKNOWNUN")
        with pytest.raises(ConfigurationError, match=r"^remote_save_folder: s3://runs/a: 403 InvalidAccessKeyId; it t"):
            RemoteSaves("s3://runs/a", tmp_path).check()
    finally:
        ask_for_rights("inf")
