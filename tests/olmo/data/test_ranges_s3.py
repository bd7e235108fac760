"""Byte ranges over S3 from a server on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from olmo.data.ranges import Changed
from olmo.data.sources import TokenFiles
from olmo.exceptions import ConfigurationError
from tests.remote_tokens import CONTENTS, EXPECTED, LENGTH, NAMES, kept, with_keys
from tests.s3 import Relay, client_of, no_settings, relaying, s3_server


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of an S3 API with the token files in the bucket `dolma`."""
    with s3_server(tmp_path_factory.mktemp("moto") / "log") as port:
        client = client_of(port)
        client.create_bucket(Bucket="dolma")
        for name, held in zip(NAMES, CONTENTS):
            client.put_object(Bucket="dolma", Key=name[1:], Body=held, ACL="public-read")
        yield port


@pytest.fixture
def relay(bucket: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Relay]:
    no_settings(monkeypatch, tmp_path)
    with relaying(bucket) as relay:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", relay.url)
        yield relay


S3_URLS = [f"s3://dolma{name}" for name in NAMES]


@pytest.mark.parametrize("signed", [True, False])
def test_instances_from_s3(relay: Relay, monkeypatch: pytest.MonkeyPatch, signed: bool) -> None:
    if signed:
        with_keys(monkeypatch)
    wanted = [36, 0, 7, 20, 6]
    source = TokenFiles(["s3://dolma/tokens/part-{0..3}.npy"], LENGTH)
    np.testing.assert_array_equal(source.read(wanted), EXPECTED[wanted])
    assert sorted(part or "" for _, part, _ in relay.seen) == [
        *[""] * 4,
        *("bytes=0-15", "bytes=16-31", "bytes=16-47", "bytes=240-255"),
    ]
    assert {with_signature for *_, with_signature in relay.seen} == {signed}
    before = len(relay.seen)
    np.testing.assert_array_equal(TokenFiles(S3_URLS, LENGTH).read(wanted), EXPECTED[wanted])
    assert len(relay.seen) == before


def test_r2_is_s3_at_an_endpoint(relay: Relay, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3")
    with pytest.raises(ConfigurationError, match="R2_ENDPOINT_URL"):
        TokenFiles(["r2://dolma/tokens/part-0.npy"], LENGTH)
    monkeypatch.setenv("R2_ENDPOINT_URL", relay.url)
    monkeypatch.setenv("R2_PROFILE", "mine")
    with pytest.raises(ConfigurationError, match=r"^r2://: .*mine"):
        TokenFiles(["r2://dolma/tokens/part-0.npy"], LENGTH)
    (tmp_path / "nothing").write_text("[mine]\naws_access_key_id = a\naws_secret_access_key = b\n")
    np.testing.assert_array_equal(TokenFiles(["r2://dolma/tokens/part-0.npy"], LENGTH).read([1]), EXPECTED[[1]])
    assert relay.seen[-1][2]


@pytest.mark.parametrize(
    ("faults", "said"),
    [
        (["500", "503", "short", "reset"], None),
        (["500"] * 5, r"s3://dolma/tokens/part-2\.npy: 500 Internal Server Error \(5 attempts\)"),
        (["short"] * 5, r"part-2\.npy: .* \(5 attempts\)"),
        (["ignored"], r"part-2\.npy: the server ignores byte ranges"),
        (["grown"], r"part-2\.npy: the file has 9999 bytes now, it had 484"),
        (["403"], r"part-2\.npy: 403 Forbidden"),
    ],
)
def test_faults_of_s3(
    relay: Relay, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, faults: list[str], said: str | None
) -> None:
    with_keys(monkeypatch)
    source = TokenFiles(S3_URLS, LENGTH)
    relay.faults = list(faults)
    if said is not None:
        with pytest.raises((OSError, ValueError), match=said):
            source.read([11])
        assert not kept(tmp_path, "ranges") and bool(kept(tmp_path, "sizes")) != (faults == ["grown"])
    np.testing.assert_array_equal(TokenFiles(S3_URLS, LENGTH).read([11]), EXPECTED[[11]])
    before = len(relay.seen)
    np.testing.assert_array_equal(TokenFiles(S3_URLS, LENGTH).read([11]), EXPECTED[[11]])
    assert len(relay.seen) == before


def test_what_s3_does_not_have(relay: Relay, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with_keys(monkeypatch)
    for place in ("s3://dolma/nothing.npy", "s3://no-such-bucket/a.npy"):
        with pytest.raises(FileNotFoundError, match=f"^{place}: 404 Not Found: no such file$"):
            TokenFiles([S3_URLS[0], place], LENGTH)
    assert not kept(tmp_path, "*")


def test_an_object_replaced_between_reads(relay: Relay, bucket: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with_keys(monkeypatch)
    client = client_of(bucket)
    client.put_object(Bucket="dolma", Key="mine.npy", Body=CONTENTS[2])
    source = TokenFiles(["s3://dolma/mine.npy"], LENGTH)
    client.put_object(Bucket="dolma", Key="mine.npy", Body=bytes(len(CONTENTS[2])))
    with pytest.raises(Changed, match=r"s3://dolma/mine\.npy: the file has changed on the server"):
        source.read([0])
    assert not TokenFiles(["s3://dolma/mine.npy"], LENGTH).read([0]).any()
