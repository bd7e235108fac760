"""An S3 API on this machine, moto's in a process of its own, and a relay before it that sees and spoils requests."""

from __future__ import annotations

import http.client
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

KEYS = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}


@contextmanager
def s3_server(log: Path, listed: int = 1000) -> Iterator[int]:
    """The port of an S3 API that lists so many objects in one answer."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    environment = {**os.environ, "MOTO_S3_DEFAULT_MAX_KEYS": str(listed)}
    with log.open("w") as out, subprocess.Popen(command, stdout=out, stderr=out, env=environment) as process:
        try:
            for _ in range(600):
                with socket.socket() as probe:
                    if not probe.connect_ex(("127.0.0.1", port)):
                        break
                assert process.poll() is None, log.read_text()
                time.sleep(0.05)
            yield port
        finally:
            process.terminate()


def client_of(port: int, service: str = "s3") -> Any:
    import boto3

    return boto3.client(
        service,
        endpoint_url=f"http://127.0.0.1:{port}",
        region_name="us-east-1",
        aws_access_key_id="a",
        aws_secret_access_key="b",
    )


def no_settings(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Let boto3 find nothing of this machine's own; profiles would lie in the file `nothing` of a folder."""
    for name in [n for n in os.environ if n.startswith(("AWS_", "S3_", "R2_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(folder / "nothing"))


class Relay(ThreadingHTTPServer):
    """Passes requests on to a server, and spoils the answers as `faults` says, one fault a GET of a key.

    `before(method, path)` may wait, or return the status of an error, which is then the answer.
    """

    daemon_threads = True
    handle_error = lambda self, request, client_address: None  # noqa: E731

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", 0), RelayHandler)
        self.port, self.url = port, f"http://127.0.0.1:{self.server_address[1]}"
        self.faults: list[str] = []
        self.before: Callable[[str, str], int | None] = lambda method, path: None
        self.seen: list[tuple[str, str | None, bool]] = []  # method, range, whether it is signed
        self.paths: list[str] = []  # method and path of each request that was passed on


class RelayHandler(BaseHTTPRequestHandler):
    server: Relay
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def relay(self) -> None:
        headers = {k: v for k, v in self.headers.items() if k.lower() not in ("connection", "expect")}
        part = headers.get("Range")
        self.server.seen.append((self.command, part, "Authorization" in headers))
        sent = self.rfile.read(int(headers.get("Content-Length") or 0))
        if refused := self.server.before(self.command, self.path):
            self.send_response(refused)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        fault = self.server.faults.pop(0) if self.server.faults and self.command == "GET" else ""
        if fault == "ignored":
            headers.pop("Range")
        upstream = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=30)
        upstream.request(self.command, self.path, sent or None, headers)
        response = upstream.getresponse()
        body = response.read()
        self.server.paths.append(f"{self.command} {self.path}")
        status = int(fault) if fault.isdigit() else response.status
        self.send_response(status)
        for name, value in response.getheaders():
            if name.lower() not in ("connection", "transfer-encoding", "date", "server"):
                if fault == "grown" and name.lower() == "content-range":
                    value = value.rpartition("/")[0] + "/9999"
                self.send_header(name, value)
        self.end_headers()
        if fault == "short":
            body, self.close_connection = body[:5], True
        if fault == "reset":
            body, self.close_connection = b"", True
        if self.command != "HEAD" and not fault.isdigit():
            self.wfile.write(body)
        elif fault.isdigit():
            self.close_connection = True

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = relay


@contextmanager
def relaying(port: int) -> Iterator[Relay]:
    with Relay(port) as relay:
        thread = threading.Thread(target=relay.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield relay
        finally:
            relay.shutdown()
            thread.join()
