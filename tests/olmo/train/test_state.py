"""The state that a checkpoint keeps of a run, and what is refused as one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from olmo import checkpoint
from olmo.exceptions import ConfigurationError
from olmo.files.tensors import read_training_state
from tests.running import (
    BATCH,
    SHORT,
    indices,
    same,
    train,
    weights,
    write_world,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def plain(folder: Path) -> Path:
    """The configuration with neither: the least that trains."""
    return folder / "plain.yaml"


def test_a_checkpoint_holds_the_weights_of_its_step_and_the_position(plain: Path, tmp_path: Path) -> None:
    trainer = train(plain, tmp_path, "--save_interval=5")
    assert same(weights(trainer), checkpoint.read_state(tmp_path / "step7"))
    state = read_training_state(tmp_path / "step5", "train")
    assert state == {
        "epoch": 1,
        "global_step": 5,
        "global_train_examples_seen_this_epoch": BATCH,
        "global_train_tokens_seen": 5 * BATCH * SHORT,
        "world_size": 1,
        "restarted_at": None,
        "checkpoints": [],
        "unsharded_checkpoints": [],
        "ephemeral_checkpoints": [],
    }


def test_restore_dataloader_false_starts_the_epoch_again(plain: Path, tmp_path: Path) -> None:
    settings = ("--save_interval=2", "--max_duration=3")
    train(plain, tmp_path, *settings, "--stop_after=2")
    train(plain, tmp_path, *settings, "--try_load_latest_save", "--restore_dataloader=false")
    assert indices(tmp_path)[3] == indices(tmp_path)[1]


def test_another_batch_size_in_the_middle_of_an_epoch_is_refused(plain: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(plain, run, "--save_interval=3", "--stop_at=3")
    with pytest.raises(ConfigurationError, match="global_train_batch_size: 18 instances of this epoch are done"):
        train(plain, run, "--try_load_latest_save", "--global_train_batch_size=4")


@pytest.mark.parametrize(
    "saved", [{}, {"global_step": "a"}, {"global_step": -5}, [1], {"global_step": 1, "epoch": "x"}]
)
def test_a_trainers_state_that_is_none_is_named(plain: Path, tmp_path: Path, saved: Any) -> None:
    train(plain, tmp_path / "first", "--stop_at=2", "--save_interval=2")
    torch.save(saved, tmp_path / "first/step2/train.pt")
    (tmp_path / "first/step2/manifest.json").unlink()
    with pytest.raises(ValueError, match=r"its training state .*; set reset_trainer_state"):
        train(plain, tmp_path / "second", f"--load_path={tmp_path / 'first/step2'}")
