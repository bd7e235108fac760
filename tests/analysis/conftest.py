"""What tests only read: a finished study in the paper's direction, with its report; tokens and a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from analysis import estimates, report, results
from olmo.exceptions import exit_status
from tests.analysis.measuring import INSTANCES, LENGTH, made_model, write
from tests.study import PAPER, Page, make_study


@pytest.fixture(scope="session", autouse=True)
def _records(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Where results are is recorded here, not in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        place = tmp_path_factory.mktemp("cache")
        patch.setattr(results, "cache_folder", lambda: place)
        yield


@pytest.fixture
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimates, "RESAMPLES", 300)


@pytest.fixture(scope="session")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_study(tmp_path_factory.mktemp("study") / "demo", PAPER, (1.0, 1.5, 2.0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(estimates, "RESAMPLES", 300)
        assert exit_status(report.main, [str(folder)]) == 0
    return folder


@pytest.fixture(scope="session")
def figures_of_study(study: Path) -> dict[str, Path]:
    """Drawn once, for pages on which other things are looked at."""
    return {path.stem: path for path in (study / "figures").glob("*.png")}


@pytest.fixture(scope="session")
def page(study: Path) -> Page:
    return Page((study / "report.html").read_text())


@pytest.fixture(scope="session")
def saved(study: Path) -> dict:
    return json.loads((study / "report.json").read_text())


@pytest.fixture(scope="session")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A token file; half an instance at its end counts for nothing."""
    path = tmp_path_factory.mktemp("data") / "tokens.npy"
    ids = np.random.default_rng(0).integers(2, 128, INSTANCES * LENGTH + LENGTH // 2).astype("<u2")
    path.write_bytes(ids.tobytes())
    return path


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One checkpoint that tests only read."""
    return write(tmp_path_factory.mktemp("shared") / "step90-unsharded", made_model(0))
