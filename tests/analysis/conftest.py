"""What tests only read: tokens and a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from analysis import estimates, results
from tests.analysis.drawing import coarse_figures
from tests.analysis.measuring import INSTANCES, LENGTH, made_model, write


@pytest.fixture(scope="session", autouse=True)
def _records(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Where results are is recorded here, not in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        place = tmp_path_factory.mktemp("cache")
        patch.setattr(results, "cache_folder", lambda: place)
        yield


@pytest.fixture(autouse=True)
def _figures() -> Iterator[None]:
    """Drawing takes a tenth of all tests' time; test_canvas.py saves figures as they are."""
    with coarse_figures():
        yield


@pytest.fixture
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimates, "RESAMPLES", 300)


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
