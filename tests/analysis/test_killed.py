"""Commands of the analysis killed before a rename; `make crash-analysis` kills them at random instants."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

from analysis import change_parameters, entropy
from scripts import convert
from tests.analysis.editing import LENGTH, measure, uneven_model, write
from tests.crash_analysis import Main, contents, temporary
from tests.running import ROOT, command

COMMANDS: dict[str, tuple[Main, str]] = {
    "analysis.entropy": (
        entropy.main,
        "--checkpoint {0}/step90-unsharded --data {0}/tokens.npy --data_size 40 --output {1}",
    ),
    "analysis.change_parameters": (
        change_parameters.main,
        "--checkpoint {0}/step90-unsharded --resuscitation_ratio 0.5 --amplifying_factor 2 --output {1}/e.safetensors",
    ),
    "scripts.convert": (convert.main, "{0}/step90-unsharded {1}/hf --to hf"),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    tokens = folder / "tokens.npy"
    np.random.default_rng(0).integers(2, 128, 40 * LENGTH).astype("<u2").tofile(tokens)
    measure(write(folder / "step90-unsharded", uneven_model()), tokens)
    return folder


@pytest.mark.parametrize("name", COMMANDS)
def test_a_killed_command_leaves_nothing_under_a_final_name_and_runs_again(
    name: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # it has no tokenizer of this model
    main, line = COMMANDS[name]
    out = tmp_path / "out"
    out.mkdir()
    argv = line.format(world, out).split()
    run = command(["-m", "tests.killed", name, *argv], cwd=ROOT)
    assert run.returncode == -signal.SIGKILL, run.stderr
    assert temporary(out) and not contents(out)
    main(argv)
    again = contents(out)
    assert again and not temporary(out)
    shutil.rmtree(out)
    out.mkdir()
    main(argv)
    assert contents(out) == again
