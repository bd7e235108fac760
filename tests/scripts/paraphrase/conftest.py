"""Entries, a chat server on this machine, and a command line that asks it for paraphrases."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scripts.prepare import chat
from scripts.prepare.fictional_knowledge import make_entries
from tests.chatting import ChatServer, chatting


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ChatServer]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(chat, "WAIT", 0.0)
    with chatting() as server:
        yield server


@pytest.fixture
def raw() -> list[dict[str, Any]]:
    """Three entries, with 1, 0 and 2 paraphrases."""
    raw = make_entries(3, 2)
    raw[0]["paraphrases"].pop()
    raw[1]["paraphrases"].clear()
    return raw


@pytest.fixture
def entries(raw: list[dict[str, Any]], tmp_path: Path) -> Path:
    path = tmp_path / "entries.json"
    path.write_text(json.dumps(raw), encoding="utf-8")
    return path


@pytest.fixture
def arguments(entries: Path, server: ChatServer, tmp_path: Path) -> list[str]:
    """A command line that has 9 paraphrases to ask for: 3, 4 and 2."""
    where = [str(entries), "--output", str(tmp_path / "out.json")]
    return [*where, "--paraphrases", "4", "--endpoint", server.url, "--model", "small"]


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    return tmp_path / "out.json.partial.jsonl"
