"""scripts/resuscitation.sh: the published flow on a small checkpoint that lies where OLMo-1B's would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from olmo import checkpoint
from olmo.config import TrainConfig, load
from olmo.memory.rescaling import load_multipliers, rescale
from olmo.model import OLMo
from olmo.train.optim import build_optimizer
from tests.reference import tiny_config
from tests.running import ROOT, SHORT, write_world
from tests.warm import warm_python

SETTING = "step738020_ratio0.5_factor2_select_random"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder that looks like the repository's, with a measured checkpoint's data and the configuration of a run."""
    world = write_world(tmp_path / "world")
    place = tmp_path / "place"
    place.mkdir()
    for name in ("olmo", "analysis", "scripts"):
        (place / name).symlink_to(ROOT / name)
    torch.manual_seed(0)
    config = TrainConfig(model=tiny_config(max_sequence_length=SHORT))
    model = OLMo(config.model)
    folder = place / "checkpoints/pretrained_1B/738020-unsharded"
    checkpoint.save(folder, model, config, build_optimizer(config.optimizer, model), {})
    np.random.default_rng(0).integers(2, 128, 40 * SHORT).astype("<u2").tofile(place / "tokens.npy")
    (place / "run.yaml").write_text((world / "plain.yaml").read_text())
    return place


def script(place: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if k not in ("WORLD_SIZE", "RANK", "LOCAL_RANK")}
    environment = {
        **inherited,
        "PATH": f"{Path(warm_python()).parent}:{os.environ['PATH']}",
        "PYTHON_EXEC": warm_python(),  # of torchrun
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "ENTROPY_FLAGS": "--data tokens.npy --data_size 40",
        "CHANGE_FLAGS": "--select random",
        "PROCESSES": "1",
        **variables,
    }
    command = ["bash", str(place / "scripts/resuscitation.sh"), *arguments]
    return subprocess.run(command, cwd=place.parent, env=environment, capture_output=True, text=True, timeout=180)


def test_entropy_parameters_training_and_again(place: Path) -> None:
    """On two ranks; with a learning rate of 0 the last checkpoint holds the weights that training started from."""
    asked = ["738020", "0.5", "2", "run.yaml", "--optimizer.learning_rate=0", "--save_folder=runs/${run_name}"]
    asked += ["--save_interval_unsharded=2", "--max_duration=2", "--reset_optimizer_state", "--reset_trainer_state"]
    done = script(place, *asked, PROCESSES="2")
    assert done.returncode == 0, done.stdout + done.stderr
    folder = place / "checkpoints/pretrained_1B/738020-unsharded"
    assert json.loads((folder / "knowledge_entropy.json").read_text())["number_of_instances"] == 40
    edit = place / f"checkpoints/resuscitated/1B/{SETTING}.safetensors"
    assert load_multipliers(edit).about["select"] == "random"
    [run] = place.glob("runs/*")
    assert run.name.startswith(f"run_{SETTING}_optimizer.learning_rate_0_max_duration_2")
    wanted = rescale(checkpoint.read_state(folder), load_multipliers(edit).values)
    found = checkpoint.read_state(run / "step2-unsharded")
    assert wanted.keys() == found.keys() and all(torch.equal(wanted[name], found[name]) for name in wanted)
    assert not torch.equal(
        found["transformer.blocks.0.ff_proj.weight"],
        checkpoint.read_state(folder)["transformer.blocks.0.ff_proj.weight"],
    )
    stamps = [path.stat().st_mtime_ns for path in (folder / "knowledge_entropy.json", edit)]
    lines = (run / "metrics.jsonl").read_text()
    again = script(place, *asked, PROCESSES="2")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "done before" in again.stdout and (run / "metrics.jsonl").read_text() == lines
    assert [path.stat().st_mtime_ns for path in (folder / "knowledge_entropy.json", edit)] == stamps


def test_a_failure_ends_it(place: Path) -> None:
    folder = place / "checkpoints/pretrained_1B/738020-unsharded"
    failed = script(place, "738020", "0.5", "2", "run.yaml", ENTROPY_FLAGS="--data none.npy --data_size 40")
    assert failed.returncode == 1 and "none.npy" in failed.stderr
    assert not (place / "checkpoints/resuscitated").exists() and not list(folder.glob("mlp_*"))
    failed = script(place, "738020", "1.5", "2", "run.yaml")
    assert failed.returncode == 2 and "ratio 1.5 is not in (0, 1]" in failed.stderr
    assert not list((place / "checkpoints").glob("resuscitated/1B/*")) and not (place / "runs").exists()


def test_what_is_not_verified_is_never_trained_on(place: Path) -> None:
    """Nothing is left that a second time would take for done."""
    failed = script(place, "738020", "0.5", "2", "run.yaml", CHANGE_FLAGS="--verify\n--device none")
    assert failed.returncode == 2 and "error: no such device: none" in failed.stderr
    assert not list(place.glob("checkpoints/resuscitated/1B/*")) and not (place / "runs").exists()


def test_an_edit_of_older_coefficients_ends_it(place: Path) -> None:
    """They are measured again where ENTROPY_FLAGS change, and a run may have begun with the edit that they made."""
    edit = place / f"checkpoints/resuscitated/1B/{SETTING}.safetensors"
    edit.parent.mkdir(parents=True)
    edit.write_text("made before")
    os.utime(edit, (1e9, 1e9))
    failed = script(place, "738020", "0.5", "2", "run.yaml")
    said = "older than the coefficients of checkpoints/pretrained_1B/738020-unsharded; remove it, and the run run_"
    assert failed.returncode == 1 and f"error: {edit}: {said}{SETTING} if there is one\n" in failed.stderr
    assert edit.read_text() == "made before" and not (place / "runs").exists()


def test_temperatures_instead_of_an_edit_and_a_run_that_begins_anew(place: Path) -> None:
    setting = SETTING.replace("select_random", "format_temperature")
    overrides = "max_duration_1_reset_optimizer_state_reset_trainer_state"
    asked = ["738020", "0.5", "2", "run.yaml", "--max_duration=1"]
    asked += ["--reset_optimizer_state", "--reset_trainer_state"]
    run = place / f"checkpoints/resuscitated/1B/run_{setting}_{overrides}"  # where the script puts it
    run.mkdir(parents=True)
    (run / "metrics.jsonl").touch()  # it ended before its first checkpoint
    done = script(place, *asked, "--save_overwrite", CHANGE_FLAGS="--format temperature")
    assert done.returncode == 0, done.stdout + done.stderr
    edit = place / f"checkpoints/resuscitated/1B/{setting}.safetensors"
    config = load(run / "config.yaml")
    assert config.model.temperature_MLP == str(edit) and config.model.resuscitation is None
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 1


def test_a_configuration_that_is_not_there_is_told_before_anything_is_measured(place: Path, tmp_path: Path) -> None:
    """From wherever it is called, and in whatever folder an interactive job of SLURM began."""
    failed = script(place, "738020", "0.5", "2", "none.yaml", SLURM_SUBMIT_DIR=str(tmp_path))
    assert failed.returncode == 2
    assert failed.stderr == f"error: none.yaml: not in {place}, where this script runs\n" and not failed.stdout


def names(place: Path, *overrides: str, **variables: str) -> tuple[str, str]:
    """The run's name and its edit, as the script gives them to a stub of Python."""
    stub = place / ".venv/bin/python"
    stub.parent.mkdir(parents=True, exist_ok=True)
    stub.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    stub.chmod(0o755)
    given = dict(
        line.split("=", 1)
        for line in script(place, "738020", "0.5", "2", "run.yaml", *overrides, **variables).stdout.splitlines()
        if line.startswith(("--run_name=", "--model.resuscitation=", "--save_folder="))
    )
    assert given["--save_folder"] == f"checkpoints/resuscitated/1B/{given['--run_name']}"
    return given["--run_name"], given["--model.resuscitation"]


def test_every_override_that_changes_the_run_names_it(place: Path) -> None:
    first = names(place)
    assert first[0] == f"run_{SETTING}" and first == names(
        place, "--save_interval=3", "--save_overwrite", "--device=cpu"
    )
    others = [["--seed=2"], ["--seed=22"], ["--seed=2", "--max_duration=3"], ["--optimizer.learning_rate=1e-3"]]
    others += [["--optimizer.learning_rate=1e+3"], ["--data_shuffling=false"]]
    others += [[f"--data.paths=[{'long/' * 60}{name}]"] for name in "ab"]
    found = [names(place, *overrides) for overrides in others]
    assert len({first[0], *(name for name, _ in found)}) == 1 + len(others)
    assert {edit for _, edit in found} == {first[1]}  # one edit serves all of them
    assert found[0][0] == f"run_{SETTING}_seed_2" and max(len(name) for name, _ in found) < 220


def test_too_few_arguments(place: Path) -> None:
    failed = script(place, "738020", "0.5", "2")
    assert failed.returncode == 2 and failed.stderr.startswith("usage: bash scripts/resuscitation.sh STEP RATIO")


def test_slurm_reads_its_header_and_it_runs_where_it_was_submitted(place: Path, tmp_path: Path) -> None:
    """SLURM copies the script to a folder of its own, and reads #SBATCH lines before the first command."""
    text = (ROOT / "scripts/resuscitation.sh").read_text().splitlines()
    first_command = next(number for number, line in enumerate(text) if line and not line.startswith("#"))
    header = [line for line in text[:first_command] if line.startswith("#SBATCH --")]
    assert text[0].startswith("#!") and len(header) == sum(line.startswith("#SBATCH") for line in text) > 3
    copy = tmp_path / "spool" / "slurm_script"
    copy.parent.mkdir()
    copy.write_text("\n".join(text) + "\n")
    environment = {**os.environ, "SLURM_SUBMIT_DIR": str(place), "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}
    command = ["bash", str(copy), "1", "0.5", "2", "run.yaml"]
    failed = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert failed.returncode == 2
    assert "checkpoints/pretrained_1B/1-unsharded: no such checkpoint" in failed.stderr
