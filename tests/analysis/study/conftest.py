"""A study with planted effects, which tests only read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from analysis import estimates
from analysis.study.gather import gather
from analysis.study.plan_file import read_plan
from tests.study import PAPER, make_plan


@pytest.fixture(scope="session")
def gathered() -> Callable[[Path], dict]:
    def of(folder: Path) -> dict:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(estimates, "RESAMPLES", 300)
            return gather(read_plan(folder))

    return of


@pytest.fixture(scope="session")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pretrainings with the effects of the paper."""
    return make_plan(tmp_path_factory.mktemp("planted") / "study", PAPER, (1.0, 1.5, 2.0), seeds=2)


@pytest.fixture(scope="session")
def found(planted: Path, gathered: Callable[[Path], dict]) -> dict:
    return gathered(planted)
