"""A server of token files, a cache of its own for each test, and no waiting between attempts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from olmo import net
from tests.remote_tokens import CONTENTS, NAMES
from tests.serving import Server, serving


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(net, "WAIT", 0.001)


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as server:
        server.add("/tokens", {name.rpartition("/")[2]: c for name, c in zip(NAMES, CONTENTS)})
        yield server
