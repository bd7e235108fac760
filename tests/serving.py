"""A web server for tests: files from memory with ranges and entity tags, and the ways in which servers fail.

`serving()` starts one. Its attributes say how it behaves and what it was asked, and may change between requests.
"""

from __future__ import annotations

import hashlib
import json
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal, TypeVar

import pytest

COMMIT = "c0ffee" + "0" * 34
Behaviour = Literal["ranges", "no ranges", "careless ranges"]  # the last ignores If-Range


@dataclass
class File:
    """What a path serves; `headers` replaces or (None) removes what the server would send."""

    content: bytes
    headers: dict[str, str | None] = field(default_factory=dict)
    modified: str = "Wed, 31 Jan 2024 10:00:00 GMT"
    status: int = 200

    @property
    def tag(self) -> str:
        return f'"{hashlib.sha256(self.content).hexdigest()[:20]}-1"'


@dataclass
class Asked:
    """One GET: the path, its Range and If-Range headers, how it was answered and the bytes of body sent."""

    path: str
    range: str | None
    condition: str | None
    status: int
    sent: int = 0


class Server(ThreadingHTTPServer):
    daemon_threads = True
    # A client that was killed leaves a broken pipe behind; nobody wants to read its traceback.
    handle_error = lambda self, request, client_address: None  # noqa: E731

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), self.handler())
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.files: dict[str, File] = {}
        self.behaviour: Behaviour = "ranges"
        self.cuts: dict[str, list[int]] = {}  # path -> after how many bytes its first, second, ... GET breaks off
        self.stall: dict[str, int] = {}  # path -> after how many bytes it sends nothing more, nor ends
        self.released = threading.Event()
        self.failures: dict[str, list[int]] = {}  # path -> statuses of its first, second, ... GET; "HEAD path": HEAD
        self.before_get: Callable[[str], None] = lambda path: None
        self.asked: list[Asked] = []
        self.heads: list[str] = []  # the paths of all HEAD requests
        self.drip: dict[str, float] = {}  # path -> seconds between two bytes of the body, or ("HEAD path") of the head
        self.endless: set[str] = set()  # paths whose bodies go on after the content
        self.received: list[dict[str, str]] = []  # the headers of all requests
        self.resets: dict[str, int] = {}  # path -> how many GETs find the connection reset

    def add(self, folder: str, files: dict[str, bytes], **headers: str | None) -> str:
        """Serve files under a folder; returns the folder's URL."""
        for name, content in files.items():
            self.files[f"{folder}/{name}"] = File(content, dict(headers))
        return f"{self.url}{folder}/"

    def add_hub_model(self, name: str, revision: str, files: dict[str, bytes], commit: str = COMMIT) -> None:
        """Serve a model as the Hugging Face hub does: files of weights lie elsewhere, behind a redirect."""
        siblings: list[dict[str, Any]] = []
        tree: list[dict[str, Any]] = []
        for file, content in files.items():
            about: dict[str, Any] = {"rfilename": file, "size": len(content)}
            about["blobId"] = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            place, said = f"/{name}/resolve/{commit}/{file}", {"X-Repo-Commit": commit}
            if not file.endswith(".json"):
                sha256 = hashlib.sha256(content).hexdigest()
                about["lfs"] = {"size": len(content), "sha256": sha256, "pointerSize": 135}
                there = f"/cdn/{file}" if commit == COMMIT else f"/cdn/{commit}/{file}"
                linked = {"X-Linked-Etag": f'"{sha256}"', "X-Linked-Size": str(len(content))}
                self.files[place] = File(b"", {"Location": self.url + there, **said, **linked}, status=302)
                place = there
            self.files[place] = File(content, dict(said))
            siblings.append(about)
            listed = {"type": "file", "path": file, "oid": about["blobId"], "size": len(content)}
            if "lfs" in about:
                listed["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 135}
            tree.append(listed)
        info = {"id": name, "modelId": name, "sha": commit, "siblings": siblings, "tags": [], "private": False}
        for asked in (revision, commit):
            self.files[f"/api/models/{name}/revision/{asked}"] = File(json.dumps(info).encode())
            self.files[f"/api/models/{name}/tree/{asked}"] = File(json.dumps(tree).encode())

    def sent(self, path: str) -> list[int]:
        """The bytes of body that each GET of a path has brought."""
        return [asked.sent for asked in self.asked if asked.path == path]

    def handler(self) -> type[Handler]:
        return Handler

    def find(self, path: str, headers: Mapping[str, str]) -> File | None:
        """What a path of a request, with its query, serves; None where that is nothing."""
        return self.files.get(path.partition("?")[0])


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def head(self, file: File, status: int, length: int, part: str | None = None) -> None:
        headers: dict[str, str | None] = {
            "Content-Length": str(length),
            "ETag": file.tag,
            "Last-Modified": file.modified,
            "Content-Range": part,
            **file.headers,
        }
        self.send_response(status)
        for name, value in headers.items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()

    def _found(self) -> File | None:
        file = self.server.find(self.path, self.headers)
        if file is None:
            self.send_response(404)
            if "/revision/" in self.path:
                self.send_header("X-Error-Code", "RevisionNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
        return file

    def do_HEAD(self) -> None:
        self.server.received.append(dict(self.headers))
        if pause := self.server.drip.get(f"HEAD {self.path}"):
            self._drip(b"HTTP/1.1 200 OK\r\n" + b"X-Header: 1\r\n" * 50, pause)
        self.server.heads.append(self.path)
        failures = self.server.failures.get(f"HEAD {self.path}")
        if failures and (failure := failures.pop(0)) != 200:
            self.send_response(failure)
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif file := self._found():
            self.head(file, file.status, len(file.content))

    def _drip(self, content: bytes, pause: float) -> None:
        for byte in content:
            self.wfile.write(bytes([byte]))
            if self.server.released.wait(pause):
                break
        self.close_connection = True

    def do_GET(self) -> None:
        self.server.received.append(dict(self.headers))
        self.server.before_get(self.path)
        if (file := self._found()) is None:
            return
        if self.server.resets.get(self.path, 0):
            self.server.resets[self.path] -= 1
            # Closed at once, with a reset instead of an end.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            return
        wanted, condition = self.headers.get("Range"), self.headers.get("If-Range")
        content, status, part = file.content, file.status, None
        fresh = condition in (None, file.tag, file.modified) or self.server.behaviour == "careless ranges"
        if wanted and fresh and status == 200 and self.server.behaviour != "no ranges":
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, stop = int(first), min(int(last or len(content)) + 1, len(content))
            status, part = 206, f"bytes {start}-{stop - 1}/{len(content)}"
            if start >= len(content):
                status, part = 416, f"bytes */{len(content)}"
            content = content[start:stop]
        failures = self.server.failures.get(self.path)
        if failures and (failure := failures.pop(0)) != 200:
            status, content = failure, b""
        asked = Asked(self.path, wanted, condition, status)
        self.server.asked.append(asked)
        self.head(file, status, len(content), part)
        if pause := self.server.drip.get(self.path):
            return self._drip(content, pause)
        cuts = self.server.cuts.get(self.path, [])
        end = cuts.pop(0) if cuts else self.server.stall.get(self.path, len(content))
        for first in range(0, end, 1 << 16):
            piece = content[first : min(first + (1 << 16), end)]
            asked.sent += len(piece)  # before the client can have it and look here
            self.wfile.write(piece)
        while self.path in self.server.endless and not self.server.released.is_set():
            self.wfile.write(bytes(1 << 16))
        if end < len(content):
            if self.path in self.server.stall:
                self.server.released.wait(30)
            self.close_connection = True


S = TypeVar("S", bound=Server)


@contextmanager
def serving(kind: type[S] = Server) -> Iterator[S]:
    with kind() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.released.set()
            server.shutdown()
            thread.join()


@contextmanager
def hub_serving(cache: Path, monkeypatch: pytest.MonkeyPatch, kind: type[S] = Server) -> Iterator[S]:
    """A server in place of the hub, whose client is real but for the address and the cache."""
    from huggingface_hub import constants

    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    with serving(kind) as server:
        for name, value in (
            ("ENDPOINT", server.url),
            ("HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"),
            ("HF_HUB_OFFLINE", False),
            ("HF_HUB_CACHE", str(cache)),
        ):
            monkeypatch.setattr(constants, name, value)
        yield server
