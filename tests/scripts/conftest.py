"""What several tests of commands need: a web server on this machine, a SLURM, and no waiting between attempts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from olmo import net
from tests.serving import Server, serving
from tests.slurm import slurm  # noqa: F401, a fixture


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(net, "WAIT", 0.0)
    with serving() as server:
        yield server
