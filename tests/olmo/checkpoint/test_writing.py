"""Checkpoints that this program writes, and what a restart reads from them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from olmo import checkpoint
from olmo.checkpoint import saves, writing
from olmo.config import TrainConfig, load
from olmo.files.tensors import read_training_state
from olmo.train.optim import build_optimizer
from tests.checkpoints import CPU, made_model, same_weights, step, trained


def test_a_saved_run_comes_back_bit_for_bit(tmp_path: Path) -> None:
    model, optimizer, config = trained()
    trainer = {"step": 2, "epoch": 0, "batch": 2, "tokens": 32}
    checkpoint.save(tmp_path / "run/step2", model, config, optimizer, trainer)
    folder = tmp_path / "run/step2"
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.yaml",
        "manifest.json",
        "model.safetensors",
        "optim.pt",
        "train.pt",
    ]
    assert [path.name for path in folder.parent.iterdir()] == ["step2"]
    assert asdict(load(folder / "config.yaml")) == asdict(config)
    assert read_training_state(folder, "train") == trainer

    loaded = checkpoint.load_model(folder, CPU)
    same_weights(loaded, model)
    again = build_optimizer(config.optimizer, loaded)
    checkpoint.load_optimizer_state(again, read_training_state(folder, "optim"), "here")
    step(model, optimizer)
    step(loaded, again)
    same_weights(loaded, model)


@pytest.mark.parametrize("fails", ["the first file", "the weights", "the last file", "the rename"])
@pytest.mark.parametrize("older", [False, True])
def test_a_folder_is_whole_or_not_there(
    tmp_path: Path, fails: str, older: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer, config = trained()
    folder = tmp_path / "step2"
    if older:
        checkpoint.save(folder, made_model(1, include_bias=True), config, optimizer, {"step": 1})

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("disk full")

    real = torch.save
    broken = {
        "the first file": (TrainConfig, "save", fail),
        "the weights": (writing, "write_olmo_safetensors", fail),
        "the last file": (torch, "save", lambda o, p: fail() if Path(p.name).name == "train.pt" else real(o, p)),
        "the rename": (Path, "rename", fail),
    }[fails]
    with monkeypatch.context() as patch:
        patch.setattr(*broken)
        with pytest.raises(OSError, match="disk full"):
            checkpoint.save(folder, model, config, optimizer, {"step": 2})
    if folder.exists():  # then it is the older one, whole
        assert older
        same_weights(checkpoint.load_model(folder, CPU), made_model(1, include_bias=True))
        assert read_training_state(folder, "train") == {"step": 1}
    # What was left over is in nobody's way.
    assert saves.latest(tmp_path) in (None, folder)
    checkpoint.save(folder, model, config, optimizer, {"step": 2})
    same_weights(checkpoint.load_model(folder, CPU), model)
    assert [path.name for path in tmp_path.iterdir()] == ["step2"]


def test_latest_is_the_highest_step_that_can_restart(tmp_path: Path) -> None:
    assert saves.latest(tmp_path) is None
    assert saves.latest(tmp_path / "nowhere") is None
    for name in ("step9", "step10-unsharded", "step100", "step200.partial", ".step300.partial", "stepX", "step7"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.pt").touch()
    (tmp_path / "step500").mkdir()  # weights alone cannot restart a run
    (tmp_path / "step600").touch()
    assert saves.latest(tmp_path) == tmp_path / "step100"
    saves.delete(tmp_path / "step100")
    assert not list(tmp_path.glob("*step100*"))
    assert saves.latest(tmp_path) == tmp_path / "step10-unsharded"


def test_missing_training_state_names_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"optim\.pt: missing; set reset_optimizer_state"):
        read_training_state(tmp_path, "optim")
