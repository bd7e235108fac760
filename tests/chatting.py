"""A server for tests that speaks OpenAI's chat completions, and fails as such servers do.

`chatting()` starts one. It answers with the text that it is asked to paraphrase behind a clause that no answer repeats,
unless `answers` or `troubles` say otherwise. What it was asked is in `asked`.
"""

from __future__ import annotations

import hashlib
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

Body = dict[str, Any]


@dataclass
class Trouble:
    """A way to fail: with a status and a body, with a reset connection, or with one that ends too early."""

    kind: int | Literal["reset", "cut"]
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Asked:
    """One request: its body, its headers, and when it came (seconds, monotonic)."""

    body: Body
    headers: dict[str, str]
    time: float

    @property
    def prompt(self) -> str:
        return self.body["messages"][0]["content"]


def text_in(body: Body) -> str:
    """The text that a request wants to have paraphrased."""
    return body["messages"][0]["content"].partition("\nThe text:\n")[2]


def reworded(body: Body) -> str:
    """The text behind a clause that depends on all of the request."""
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return f"As account {digest[:8]} has it, {text_in(body)}"


class ChatServer(ThreadingHTTPServer):
    daemon_threads = True
    handle_error = lambda self, request, client_address: None  # noqa: E731

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"
        self.key: str | None = None  # asks for it where it is set
        # What the model says: the text, or the text and a finish_reason.
        self.answers: Callable[[Body], str | tuple[str | None, str | None]] = reworded
        self.troubles: list[Trouble] = []  # of the first, second, ... request
        self.asked: list[Asked] = []
        self.gate = threading.Event()  # while it is not set, no request beyond `open_for` is answered
        self.gate.set()
        self.open_for = 0
        self.lock = threading.Lock()
        self.at_once = self.most_at_once = 0
        self.seconds = 0.0  # that an answer takes
        self.pace = 0.0  # seconds between two bytes of an answer


class Handler(BaseHTTPRequestHandler):
    server: ChatServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _send(self, status: int, body: Any, headers: dict[str, str] | None = None, cut: bool = False) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        kind = "text/html" if isinstance(body, bytes) else "application/json"
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        for place in range(len(content) if self.server.pace else 0):
            self.wfile.write(content[place : place + 1])
            time.sleep(self.server.pace)
        if not self.server.pace:
            self.wfile.write(content[: len(content) // 2] if cut else content)
        self.close_connection = self.close_connection or cut

    def _error(self, status: int, message: str, code: str | None = None) -> None:
        self._send(status, {"error": {"message": message, "type": "error", "param": None, "code": code}})

    def do_GET(self) -> None:
        self._error(405, "Only POST is allowed")

    def do_POST(self) -> None:
        server = self.server
        content = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path != "/v1/chat/completions":
            self._error(404, f"Unknown request URL: POST {self.path}")
            return
        if server.key is not None and self.headers.get("Authorization") != f"Bearer {server.key}":
            self._error(401, f"Incorrect API key provided: {self.headers.get('Authorization')}", "invalid_api_key")
            return
        body = json.loads(content)
        with server.lock:
            server.asked.append(Asked(body, dict(self.headers), time.monotonic()))
            waits = len(server.asked) > server.open_for
            trouble = server.troubles.pop(0) if server.troubles else None
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
        try:
            if waits:
                server.gate.wait(30)
            time.sleep(server.seconds)
        finally:
            with server.lock:
                server.at_once -= 1
        if trouble is not None and trouble.kind == "reset":
            # Closed at once, with a reset instead of an end.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
        elif trouble is not None and isinstance(trouble.kind, int):
            self._send(trouble.kind, trouble.body, trouble.headers)
        else:
            said = server.answers(body)
            text, finish = said if isinstance(said, tuple) else (said, "stop")
            self._send(200, completion(body, text, finish), cut=trouble is not None)


def completion(body: Body, text: str | None, finish: str | None) -> Body:
    """A chat completion object."""
    message = {"role": "assistant", "content": text, "refusal": None}
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1700000000,
        "model": body["model"],
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": finish}],
        "usage": {"prompt_tokens": 9, "completion_tokens": 12, "total_tokens": 21},
    }


@contextmanager
def chatting() -> Iterator[ChatServer]:
    with ChatServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.gate.set()
            server.shutdown()
            thread.join()
