"""A configuration to report about, and a check that no handler of the log is left behind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from olmo.config import OptimizerConfig, TrainConfig
from olmo.console import log
from tests.reference import tiny_config


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    return TrainConfig(model=tiny_config(), optimizer=OptimizerConfig("adamw"), save_folder=str(tmp_path / "run"))


@pytest.fixture(autouse=True)
def no_handler_is_left() -> Iterator[None]:
    before = list(log.handlers)
    yield
    assert log.handlers == before
