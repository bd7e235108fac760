"""Several checkpoints of one run, and the files of their series."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from analysis import entropy
from olmo.exceptions import exit_status
from tests.analysis.measuring import LENGTH, made_model, write

SERIES = "knowledge_entropy_series.json"
INSTANCES = 70


def run(*argv: object) -> int:
    return exit_status(entropy.main, [str(a) for a in argv])


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def tokens_file(folder: Path) -> Path:
    """A token file of INSTANCES instances."""
    path = folder / "tokens.npy"
    np.random.default_rng(0).integers(2, 128, INSTANCES * LENGTH).astype("<u2").tofile(path)
    return path


def run_of_three(folder: Path) -> Path:
    """Three checkpoints of one run."""
    for step in (9, 10, 100):
        write(folder / f"step{step}-unsharded", made_model(step))
    return folder
