"""Runs of other families that end and go on: without the folder they began from, from every kind of checkpoint."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from analysis.change_parameters import main as change_parameters
from analysis.entropy import main as entropy
from olmo.distributed import Ranks
from olmo.exceptions import ConfigurationError, Interrupted
from olmo.train import Trainer
from olmo.train.stopping import Signals
from scripts.convert import main as convert
from tests.running import CPU, checkpoints, configure, metrics, same, train, weights, write_family, write_world

SAVES = ("--save_interval=2", "--save_interval_unsharded=3")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_world(tmp_path_factory.mktemp("world"))
    write_family(folder, "Qwen2", tie_word_embeddings=True)
    return folder


@pytest.fixture(scope="module")
def plain(world: Path) -> Path:
    return world / "family-plain.yaml"


@pytest.fixture(scope="module")
def whole(plain: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """An unbroken run of 7 steps; its folder and weights."""
    return plain.parent / "whole", weights(train(plain, plain.parent / "whole", *SAVES))


def test_a_run_needs_the_folder_it_began_from_no_more(world: Path, tmp_path: Path) -> None:
    """With probes and injection, which need the tokenizer."""
    shutil.copytree(world / "model", tmp_path / "model")
    probes = f"--evaluators=[{{label: once_memorization, data: {{dataset_path: '{world}/once.json'}}}}]"
    settings = (*SAVES, probes, f"--load_path={tmp_path / 'model'}", "--max_duration=3")
    whole = train(world / "family.yaml", tmp_path / "a", *settings)
    trainer = Trainer(configure(world / "family.yaml", tmp_path / "b", *settings, "--time_limit=1e-9"), CPU, Ranks())
    shutil.rmtree(tmp_path / "model")
    with pytest.raises(Interrupted, match="at step 1; saved"):
        trainer.fit()
    resumed = train(world / "family.yaml", tmp_path / "b", *settings, "--try_load_latest_save")
    assert same(weights(resumed), weights(whole)) and metrics(tmp_path / "b") == metrics(tmp_path / "a")
    assert checkpoints(tmp_path / "b") == checkpoints(tmp_path / "a")
    run = OmegaConf.load(tmp_path / "b/config.yaml")
    assert run.model.transformers == run.tokenizer.identifier == str(tmp_path / "model")


@pytest.mark.parametrize("kept", ["step4", "step3-unsharded"])
def test_a_run_resumes_from_either_kind(
    kept: str, plain: Path, whole: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    shutil.copytree(whole[0], tmp_path / "run", symlinks=True)
    for name in checkpoints(tmp_path / "run") - {kept}:
        shutil.rmtree(tmp_path / "run" / name)
    resumed = train(plain, tmp_path / "run", *SAVES, "--try_load_latest_save")
    assert resumed.start.folder == tmp_path / "run" / kept
    assert same(weights(resumed), whole[1]) and metrics(tmp_path / "run") == metrics(whole[0])


@pytest.mark.parametrize("name", ["step6", "latest-unsharded"])
def test_another_run_begins_from_each_checkpoint(
    name: str, plain: Path, whole: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    kept = ("--reset_optimizer_state=false", "--reset_trainer_state=false", "--save_interval=100")
    other = train(plain, tmp_path / "run", f"--load_path={whole[0] / name}", *kept)
    assert other.state.step == 7 and same(weights(other), whole[1])


@pytest.mark.parametrize("key", ["optimizer", "trainer"])
def test_a_folder_of_the_hub_has_no_state_to_go_on_from(key: str, plain: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"^\S+/(optim|train)\.pt: missing; set reset_optimizer_state and"):
        train(plain, tmp_path / "run", f"--reset_{key}_state=false")


def test_weights_alone(plain: Path, tmp_path: Path) -> None:
    settings = ("--save_unsharded_optimizer=false", "--save_interval_unsharded=2", "--save_interval=null")
    train(plain, tmp_path / "run", *settings, "--max_duration=2")
    names = {path.name for path in (tmp_path / "run/step2-unsharded").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} < names and not {"optim.pt", "train.pt"} & names
    again = ("--save_overwrite", "--force_save_unsharded", "--save_interval=null", "--max_duration=1")
    train(plain, tmp_path / "run", *again)
    assert checkpoints(tmp_path / "run") == {"step1-unsharded"}


def test_a_run_that_is_ended_early_goes_on(plain: Path, whole: tuple[Path, Any], tmp_path: Path) -> None:
    """By the time limit after step 1, then by a signal, which is there before step 2."""
    with pytest.raises(Interrupted, match=r"^time_limit of 1e-09 seconds at step 1; saved \S+/step1; add"):
        train(plain, tmp_path, *SAVES, "--time_limit=1e-9")
    with Signals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Interrupted, match=r"^SIGTERM at step 2; saved \S+/step2; add"):
            Trainer(configure(plain, tmp_path, *SAVES, "--try_load_latest_save"), CPU, Ranks(), signals).fit()
    resumed = train(plain, tmp_path, *SAVES, "--try_load_latest_save")
    assert same(weights(resumed), whole[1]) and checkpoints(tmp_path) == checkpoints(whole[0])


def test_commands_read_both_kinds(world: Path, whole: tuple[Path, Any], tmp_path: Path) -> None:
    found, written = {}, {}
    for name in ("step6", "step6-unsharded"):
        data = ["--data", str(world / "heldout32.npy"), "--data_size=2", "--sequence_length=32"]
        entropy(["--checkpoint", str(whole[0] / name), *data, "--output", str(tmp_path / name)])
        found[name] = load_file(tmp_path / name / "mlp_average_coefficients.safetensors")
        edit, target = tmp_path / f"{name}.safetensors", tmp_path / f"{name}-edited"
        settings = ["--resuscitation_ratio=0.5", "--amplifying_factor=2", "--coefficients", str(tmp_path / name)]
        change_parameters(["--checkpoint", str(whole[0] / name), *settings, "--output", str(edit)])
        convert([str(whole[0] / name), str(target), "--to", "hf", "--resuscitation", str(edit)])
        written[name] = load_file(target / "model.safetensors")
    assert same(found["step6"], found["step6-unsharded"]) and same(written["step6"], written["step6-unsharded"])


def test_a_restart_checkpoint_becomes_a_folder_of_transformers(whole: tuple[Path, Any], tmp_path: Path) -> None:
    convert([str(whole[0] / "step6"), str(tmp_path / "new"), "--to", "hf"])
    ours = {"config.yaml", "manifest.json", "optim.pt", "train.pt"}
    wanted = {path.name for path in (whole[0] / "step6-unsharded").iterdir()} - ours
    assert {path.name for path in (tmp_path / "new").iterdir()} == wanted | {"README.md"}
    for name in wanted:
        assert (tmp_path / "new" / name).read_bytes() == (whole[0] / "step6-unsharded" / name).read_bytes(), name
    with pytest.raises(ConfigurationError, match=r"step6: not an OLMo model; --to olmo writes"):
        convert([str(whole[0] / "step6"), str(tmp_path / "other"), "--to", "olmo"])
