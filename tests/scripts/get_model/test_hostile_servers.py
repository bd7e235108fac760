"""Servers that mislead: every download ends in bounded time and one line, with nothing under the final names."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import requests

from olmo import net
from olmo.net import http_session
from scripts.prepare import download
from tests.fetching import MODEL, WEIGHTS, files, run, the_error
from tests.serving import File, Server, serving

PAGE = b"\n<!DOCTYPE html><html>Sign in</html>" + bytes(2**17)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limits of seconds, a hundredth of them."""
    monkeypatch.setattr(net, "WAIT", 0.001)
    monkeypatch.setattr(net, "WINDOW", 0.3)
    monkeypatch.setattr(net, "HEADERS", 0.4)
    monkeypatch.setattr(download, "TIMEOUT", (1, 0.3))
    monkeypatch.setattr(download, "LARGEST_UNSTATED", 2**22)


def redirects(target: str) -> Callable[[Server], None]:
    def prepare(server: Server) -> None:
        server.files[MODEL] = File(b"", {"Location": target.replace("SERVER", server.url)}, status=302)

    return prepare


def model(content: bytes = WEIGHTS, **headers: str | None) -> Callable[[Server], None]:
    def prepare(server: Server) -> None:
        server.files[MODEL] = File(content, {name.replace("_", "-"): value for name, value in headers.items()})

    return prepare


def endless(size: bool) -> Callable[[Server], None]:
    def prepare(server: Server) -> None:
        server.endless.add(MODEL)
        server.files[MODEL].headers = {} if size else {"Content-Length": None, "Connection": "close"}

    return prepare


def changing(server: Server) -> None:
    """Another version of the file at every request, with the same size, and ranges of whatever it is now."""
    server.behaviour = "careless ranges"
    server.cuts = {MODEL: [2**20] * 20}

    def change(path: str) -> None:
        if path == MODEL:
            first = server.files[MODEL].content[0]
            server.files[MODEL] = File(bytes([first ^ 1]) + WEIGHTS[1:])

    server.before_get = change


SERVERS: dict[str, tuple[Callable[[Server], None], str]] = {
    "redirects to itself": (redirects(f"SERVER{MODEL}"), "redirects more than 5 times"),
    "redirects to a file": (redirects("file:///etc/passwd"), "redirects to file://, which is not followed"),
    "redirects to ftp": (redirects("ftp://127.0.0.1/x"), "redirects to ftp://, which is not followed"),
    "redirects to nothing": (redirects("http://127.0.0.1:9/x"), "Connection refused"),
    "no size, and no end": (endless(size=False), "no size stated, and more than 4,194,304 bytes sent"),
    "a byte a moment": (
        lambda server: server.drip.update({MODEL: 0.02}),
        "fewer than 65,536 bytes came in 0.3 seconds",
    ),
    "a header a moment": (lambda server: server.drip.update({f"HEAD {MODEL}": 0.02}), "no complete headers within 0.4"),
    "a web page": (model(PAGE), "model.pt: a web page is in its place"),
    "less than stated": (model(Content_Length=str(len(WEIGHTS) + 1000)), "the same command continues the download"),
    "a size that is none": (model(Content_Length="many"), "(5 attempts); the same command continues"),
    "a tag that changes": (changing, "the file is changing on the server (5 attempts)"),
}


@pytest.mark.parametrize("kind", SERVERS)
def test_a_hostile_server_is_one_line_and_leaves_no_checkpoint(
    kind: str, tmp_path: Path, server: Server, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare, expected = SERVERS[kind]
    prepare(server)
    before = time.monotonic()
    assert run([url, f"--output={tmp_path / 'output'}"]) == 1
    assert expected in the_error(capsys)
    assert time.monotonic() - before < 15
    assert not {name for name in files(tmp_path / "output") if not name.startswith(".")}


def test_what_follows_a_complete_file_is_not_read(tmp_path: Path, server: Server, url: str) -> None:
    server.endless.add(MODEL)
    assert run([url, f"--output={tmp_path}"]) == 0
    assert (tmp_path / "model.pt").read_bytes() == WEIGHTS


def test_a_part_without_a_tag_is_not_joined_to_others(tmp_path: Path, server: Server, url: str) -> None:
    server.files[MODEL].headers = {"ETag": None, "Last-Modified": None}
    server.behaviour = "careless ranges"
    remote = download.Remote(server.url + MODEL, "model.pt", len(WEIGHTS), None, '"a-tag"')
    path = tmp_path / remote.partial
    path.write_bytes(bytes(1000))  # of another version
    with http_session() as session:
        with pytest.raises(
            net.TransferInterrupted, match="does not state of which version of the file it sends a part"
        ):
            download.transfer(session, remote, path)
        download.transfer(session, remote, path)
    assert path.read_bytes() == WEIGHTS


def test_secrets_are_neither_printed_nor_sent_elsewhere(
    tmp_path: Path, server: Server, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A password of the URL and a token of the session, at a server that redirects to another host."""
    with serving() as other:
        other.files["/cdn"] = File(WEIGHTS)
        elsewhere = other.url.replace("127.0.0.1", "localhost") + "/cdn?X-Amz-Signature=5ecr3t"
        server.files[MODEL] = File(b"", {"Location": elsewhere}, status=302)
        secret = url.replace("http://", "http://user:pa55word@")
        assert run([secret, f"--output={tmp_path / 'first'}"]) == 0
        with http_session() as session:
            session.headers["Authorization"] = "Bearer 5ecr3t"
            assert session.get(server.url + MODEL).content == WEIGHTS
        assert [headers.get("Authorization", "")[:6] for headers in server.received[-1:]] == ["Bearer"]
        assert other.received and not any("Authorization" in headers for headers in other.received)
        assert any(headers.get("Authorization", "").startswith("Basic ") for headers in server.received)
        other.files.clear()
        assert run([secret, f"--output={tmp_path / 'second'}"]) == 1
    error = the_error(capsys)
    assert "pa55word" not in error and "5ecr3t" not in error


def test_https_is_not_left_for_http() -> None:
    response = requests.Response()
    response.status_code, response.url = 302, "https://host/a"
    for target, refused in (("http://host/a", True), ("HTTP://host/a", True), ("//host/b", False), ("b", False)):
        response.headers["Location"] = target
        with http_session() as session:
            if refused:
                with pytest.raises(requests.exceptions.InvalidSchema, match="redirects to http://, which is not"):
                    session.get_redirect_target(response)
            else:
                assert session.get_redirect_target(response) == target
