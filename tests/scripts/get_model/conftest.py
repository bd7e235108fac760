"""The URL of a checkpoint on a site on this machine, and a copy of the repository to fetch it into."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fetching import CONFIG, FOLDER, WEIGHTS
from tests.running import ROOT
from tests.serving import Server


@pytest.fixture
def url(server: Server) -> str:
    return server.add(FOLDER, {"config.yaml": CONFIG, "model.pt": WEIGHTS})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The repository at another place, so that nothing is fetched into this one."""
    root = tmp_path / "root"
    root.mkdir()
    for name in ("scripts", "olmo", "configs"):
        (root / name).symlink_to(ROOT / name)
    return root
