"""A server for tests that answers what the client of Weights & Biases asks for one run, and counts it."""

from __future__ import annotations

import gzip
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

ENTITY, PROJECT = "somebody", "a-project"
KEY = "k" * 40


class Tracker(ThreadingHTTPServer):
    daemon_threads = True
    # A client that has lost patience leaves a broken pipe behind; nobody wants to read its traceback.
    handle_error = lambda self, request, client_address: None  # noqa: E731

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.tags: list[str] = []
        self.asked = 0  # how often for the run and its tags
        self.answer: str | int = "tags"  # to that: the tags, "nothing", as if there were no run, "late", or a status
        self.released = threading.Event()

    def environment(self, home: Path) -> dict[str, str]:
        """What makes the client talk to this server, and keep its files in a folder."""
        names = ("HOME", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR", "WANDB_ARTIFACT_DIR")
        own = {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": KEY, "WANDB_MODE": "online", "WANDB_CONSOLE": "off"}
        return {**dict.fromkeys(names, str(home)), **own, "WANDB_SILENT": "true", "NETRC": str(home / "netrc")}

    def data(self, query: str, variables: dict[str, Any]) -> dict[str, Any] | None:
        """The answer to a query of GraphQL."""
        if "upsertBucket" in query:
            project = {"id": "P", "name": PROJECT, "entity": {"id": "E", "name": ENTITY}}
            bucket = {"id": "B", "name": variables["name"], "displayName": "a run", "project": project}
            return {"upsertBucket": {"bucket": {**bucket, "config": "{}", "historyLineCount": 0}, "inserted": True}}
        if "createRunFiles" in query:
            return {"createRunFiles": {"runID": "B", "uploadHeaders": [], "files": []}}
        if re.search(r"\btags\b", query):
            self.asked += 1
            if self.answer == "late":
                self.released.wait(60)
            run = {
                **{"id": "B", "name": variables["name"], "displayName": "a run", "tags": self.tags, "state": "running"},
                **{"projectId": "1", "createdAt": "2026-01-01T00:00:00Z", "heartbeatAt": "2026-01-01T00:00:00Z"},
                **dict.fromkeys(("description", "notes", "group", "jobType", "commit"), ""),
                **dict.fromkeys(("config", "systemMetrics", "summaryMetrics"), "{}"),
                **{"readOnly": False, "historyLineCount": 1, "historyKeys": None, "sweepName": None},
                "user": {"name": "somebody", "username": ENTITY},
            }
            return {"project": {"internalId": "1", "run": None if self.answer == "nothing" else run}}
        if "viewer" in query:
            viewer = {"id": "U", "entity": ENTITY, "username": ENTITY, "email": "somebody@example.com", "flags": "{}"}
            return {"viewer": {**viewer, "teams": {"edges": []}}}
        return {}


class Handler(BaseHTTPRequestHandler):
    server: Tracker
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        status, answer = 200, b"{}"
        if self.path == "/graphql":
            asked = json.loads(body)
            before = self.server.asked
            answer = json.dumps({"data": self.server.data(asked["query"], asked.get("variables") or {})}).encode()
            if self.server.asked > before and isinstance(self.server.answer, int):
                status = self.server.answer
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def do_GET(self) -> None:
        self.send_response(404)
        self.send_header("Content-Length", "0")
        self.end_headers()


@contextmanager
def tracking() -> Iterator[Tracker]:
    with Tracker() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.released.set()
            server.shutdown()
            thread.join()
