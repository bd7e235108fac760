"""Downloads from a site: broken connections, files that change, hashes, and what is already there."""

from __future__ import annotations

import base64
import functools
import hashlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import pytest
import requests

from olmo import net
from olmo.files.lock import Lock
from scripts.prepare import download
from tests.fetching import CONFIG, FOLDER, MODEL, OTHER, WEIGHTS, files, run, the_error
from tests.serving import File, Server


def test_a_broken_connection_is_taken_up_where_it_broke(tmp_path: Path, server: Server, url: str) -> None:
    server.cuts = {MODEL: [2**20 + 5, 2**20, 100]}
    assert run([url, f"--output={tmp_path}"]) == 0
    assert (tmp_path / "model.pt").read_bytes() == WEIGHTS
    first, *others = (asked for asked in server.asked if asked.path == MODEL)
    assert first.range is None and len(others) == 3
    assert all(asked.range and asked.condition == server.files[MODEL].tag for asked in others[1:])
    assert sum(server.sent(MODEL)) < len(WEIGHTS) + 2**20, "no more than a piece comes twice"


def test_without_ranges_it_starts_again(tmp_path: Path, server: Server, url: str) -> None:
    server.behaviour = "no ranges"
    server.cuts = {MODEL: [2**21]}
    assert run([url, f"--output={tmp_path}"]) == 0
    assert (tmp_path / "model.pt").read_bytes() == WEIGHTS
    assert server.sent(MODEL) == [2**21, len(WEIGHTS)]


@pytest.mark.parametrize("behaviour", ["ranges", "no ranges", "careless ranges"])
@pytest.mark.parametrize("validators", [{}, {"ETag": None}, {"ETag": 'W/"1"'}], ids=["tag", "date", "weak tag"])
def test_a_file_that_changes_between_two_attempts_is_not_spliced(
    behaviour: str, validators: dict[str, str | None], tmp_path: Path, server: Server, url: str
) -> None:
    server.behaviour = behaviour  # type: ignore[assignment]
    server.cuts = {MODEL: [2**21]}
    server.files[MODEL].headers = validators
    newer = File(OTHER, validators, modified="Thu, 01 Feb 2024 10:00:00 GMT")

    def change(path: str) -> None:
        if server.sent(MODEL):  # the second attempt has looked already
            server.files[MODEL] = newer

    server.before_get = change
    assert run([url, f"--output={tmp_path}"]) == 0
    assert (tmp_path / "model.pt").read_bytes() == OTHER
    assert files(tmp_path) == {"config.yaml", "model.pt"}, "nothing of the older version stays"


def test_more_than_the_stated_size_is_not_written(tmp_path: Path) -> None:
    """A server that never ends would fill the disk."""

    class Body(BytesIO):
        def read1(self, size: int, decode_content: bool) -> bytes:  # type: ignore[override]
            return b"a" * size

    class Endless(requests.Session):
        def get(self, url: str, **_: object) -> requests.Response:  # type: ignore[override]
            response = requests.Response()
            response.status_code, response.raw = 200, Body()
            return response

    path = tmp_path / "partial"
    with pytest.raises(net.TransferInterrupted, match="more than the 3000000 bytes that the server states"):
        download.transfer(Endless(), download.Remote("http://host/a", "a", 3 * 10**6, None), path)
    assert path.stat().st_size == 0


@pytest.mark.parametrize("header", ["Content-Length", "Last-Modified"])
def test_headers_that_state_nothing(header: str) -> None:
    class Odd(requests.Session):
        def head(self, url: str, **_: object) -> requests.Response:  # type: ignore[override]
            response = requests.Response()
            response.status_code, response.raw = 200, BytesIO()
            response.headers[header] = "-3 soon"
            return response

    found = download.describe(Odd(), "http://host/", "a")
    assert found is not None and (found.size, found.modified) == (None, None)


def test_without_any_validator_nothing_is_continued(tmp_path: Path, server: Server, url: str) -> None:
    server.cuts = {MODEL: [2**21]}
    server.files[MODEL].headers = {"ETag": None, "Last-Modified": None}

    def change(path: str) -> None:
        if server.sent(MODEL):
            server.files[MODEL].content = OTHER

    server.before_get = change
    assert run([url, f"--output={tmp_path}"]) == 0
    assert (tmp_path / "model.pt").read_bytes() == OTHER
    assert [asked.range for asked in server.asked] == [None] * 3


def test_it_gives_up_in_one_line_and_keeps_what_came(
    tmp_path: Path, server: Server, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    server.cuts = {MODEL: [2**21] + [0] * 9}
    assert run([url, f"--output={tmp_path}"]) == 1
    assert "model.pt: the connection broke off (5 attempts); the same command continues" in the_error(capsys)
    assert len(server.sent(MODEL)) == net.ATTEMPTS
    assert {name[0] for name in files(tmp_path)} == {"."}
    server.cuts = {}
    assert run([url, f"--output={tmp_path}"]) == 0
    assert (tmp_path / "model.pt").read_bytes() == WEIGHTS
    assert server.sent(MODEL)[-1] == len(WEIGHTS) - 2**21


@pytest.mark.parametrize("difference", [-1, 1])
def test_a_file_of_another_length_than_announced_is_not_taken(
    difference: int, tmp_path: Path, server: Server, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tag = server.files[MODEL].tag
    announced: dict[str, str | None] = {"ETag": tag, "Content-Length": str(len(WEIGHTS) + difference)}

    def answer(path: str) -> None:
        server.files[MODEL].headers = {"ETag": tag}

    server.files[MODEL].headers = announced
    server.before_get = answer
    look = functools.partial(download.describe, requests.Session(), url)
    (remote,) = filter(None, [look("model.pt")])
    with pytest.raises(OSError, match=f"({len(WEIGHTS)} of|more than the) {len(WEIGHTS) + difference} bytes"):
        download.fetch(requests.Session(), lambda name: remote, "model.pt", tmp_path)
    assert "model.pt" not in files(tmp_path)


def test_a_server_that_fails_for_a_while_is_asked_again(tmp_path: Path, server: Server, url: str) -> None:
    server.cuts = {MODEL: [2**21]}
    server.failures = {MODEL: [200, 503, 429]}
    assert run([url, f"--output={tmp_path}"]) == 0
    assert (tmp_path / "model.pt").read_bytes() == WEIGHTS
    assert [asked.status for asked in server.asked if asked.path == MODEL] == [200, 503, 429, 206]


def test_a_file_without_a_stated_size_comes_too(tmp_path: Path, server: Server, url: str) -> None:
    server.files[f"{FOLDER}/config.yaml"].headers = {"Content-Length": None, "Connection": "close"}
    assert run([url, f"--output={tmp_path}"]) == 0
    assert (tmp_path / "config.yaml").read_bytes() == CONFIG


def encoded(algorithm: str, content: bytes) -> str:
    return base64.b64encode(hashlib.new(algorithm, content).digest()).decode()


STATEMENTS: dict[str, Callable[[bytes], dict[str, str | None]]] = {
    "Content-MD5": lambda content: {"Content-MD5": encoded("md5", content)},
    "Digest": lambda content: {"Digest": f"SHA-256={encoded('sha256', content)}"},
    "Repr-Digest": lambda content: {"Repr-Digest": f"md5=:AAAA:, sha-256=:{encoded('sha256', content)}:"},
    "Google": lambda content: {"x-goog-hash": f"crc32c=AAAAAA==, md5={encoded('md5', content)}"},
    "Amazon": lambda content: {"x-amz-checksum-sha256": encoded("sha256", content)},
    "S3": lambda content: {"ETag": f'"{hashlib.md5(content).hexdigest()}"', "x-amz-request-id": "1"},
}


@pytest.mark.parametrize("kind", STATEMENTS)
def test_a_stated_hash_is_verified(
    kind: str, tmp_path: Path, server: Server, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    statement = STATEMENTS[kind]
    server.files[MODEL].headers = statement(OTHER)
    assert run([url, f"--output={tmp_path}"]) == 1
    assert "the download does not have the" in the_error(capsys)
    assert not [name for name in files(tmp_path) if "model" in name], "damaged bytes are not kept"
    server.files[MODEL].headers = statement(WEIGHTS)
    assert run([url, f"--output={tmp_path}"]) == 0
    assert (tmp_path / "model.pt").read_bytes() == WEIGHTS


@pytest.mark.parametrize(
    "headers",
    [
        {"ETag": '"' + "0" * 32 + '"'},  # of any server
        {"ETag": '"' + "0" * 32 + '-5"', "x-amz-request-id": "1"},  # uploaded in parts
        {"ETag": '"' + "0" * 32 + '"', "x-amz-request-id": "1", "x-amz-server-side-encryption": "aws:kms"},
        {"x-amz-checksum-sha256": "A" * 43 + "-2"},
        {"Digest": "sha-256=too short", "Content-MD5": "not base64"},
    ],
)
def test_what_is_no_hash_of_the_content_is_not_taken_for_one(headers: dict[str, str]) -> None:
    assert download.stated_digest(headers) is None


@pytest.mark.parametrize("headers", [{}, STATEMENTS["Digest"](WEIGHTS)], ids=["size and date", "hash"])
def test_finished_files_are_not_fetched_again(
    headers: dict[str, str | None], tmp_path: Path, server: Server, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    server.files[MODEL].headers = headers
    assert run([url, f"--output={tmp_path}"]) == 0
    server.asked.clear()
    assert run([url, f"--output={tmp_path}"]) == 0
    assert not server.asked and "0 of 2 files to fetch" in capsys.readouterr().out
    (tmp_path / "model.pt").write_bytes(WEIGHTS[:-1])  # cut short by something else
    assert run([url, f"--output={tmp_path}"]) == 0
    assert (tmp_path / "model.pt").read_bytes() == WEIGHTS
    # All steps of a model have one size.
    server.files[MODEL] = File(OTHER, STATEMENTS["Digest"](OTHER) if headers else {}, "Fri, 02 Feb 2024 10:00:00 GMT")
    assert run([url, f"--output={tmp_path}"]) == 0
    assert (tmp_path / "model.pt").read_bytes() == OTHER


def test_weights_of_another_layout_are_not_mixed_in(
    tmp_path: Path, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"of another checkpoint")  # would be read instead of model.pt
    assert run([url, f"--output={tmp_path}"]) == 1
    assert "model.safetensors: not of this checkpoint; remove it" in the_error(capsys)
    assert files(tmp_path) == {"model.safetensors"}


def test_two_processes_do_not_write_one_file(
    tmp_path: Path, server: Server, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    server.cuts = {MODEL: [2**21] + [0] * 9}
    run([url, f"--output={tmp_path}"])
    capsys.readouterr()
    (partial,) = tmp_path.glob(".model.pt.*")
    with Lock(tmp_path / ".model.pt.lock"):
        assert run([url, f"--output={tmp_path}"]) == 1
    assert "model.pt: another process is fetching it" in the_error(capsys)
    assert partial.stat().st_size == 2**21


def test_a_checkpoint_larger_than_the_disk_is_not_begun(
    tmp_path: Path, server: Server, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    server.files[MODEL].headers = {"Content-Length": str(10**18)}
    assert run([url, f"--output={tmp_path}"]) == 1
    assert "do not fit on this disk" in the_error(capsys) and not server.asked
