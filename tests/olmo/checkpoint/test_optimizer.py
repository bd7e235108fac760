"""Optimizer states by name, and those that do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from olmo import checkpoint
from olmo.config import OptimizerConfig
from olmo.train.optim import build_optimizer
from tests.checkpoints import trained


def test_optimizer_state_is_keyed_by_name_as_olmos_is(tmp_path: Path) -> None:
    model, optimizer, config = trained()
    checkpoint.save(tmp_path / "step2", model, config, optimizer, {})
    saved = torch.load(tmp_path / "step2/optim.pt", weights_only=True)
    names = [name for name, _ in model.named_parameters()]
    assert saved["state"].keys() == set(names)
    assert sorted(name for group in saved["param_groups"] for name in group["params"]) == sorted(names)
    for name, parameter in model.named_parameters():
        assert torch.equal(saved["state"][name]["exp_avg"], optimizer.state[parameter]["exp_avg"])
        assert torch.equal(saved["state"][name]["exp_avg_sq"], optimizer.state[parameter]["exp_avg_sq"])


def test_the_runs_own_learning_rate_survives_a_loaded_optimizer() -> None:
    model, optimizer, config = trained()
    saved = checkpoint.optimizer_state(optimizer)
    config.optimizer.learning_rate, config.optimizer.weight_decay = 0.5, 0.7
    again = build_optimizer(config.optimizer, model)
    checkpoint.load_optimizer_state(again, saved, "here")
    assert [(group["lr"], group["weight_decay"]) for group in again.param_groups] == [(0.5, 0.7), (0.5, 0.0)]


def test_optimizer_state_by_number_as_olmo_saves_it_under_ddp() -> None:
    model, optimizer, config = trained()
    plain = optimizer.state_dict()
    groups = [{**g, "param_names": [f"module.{name}" for name in g["param_names"]]} for g in plain["param_groups"]]
    again = build_optimizer(config.optimizer, model)
    checkpoint.load_optimizer_state(again, {"state": plain["state"], "param_groups": groups}, "here")
    for parameter in model.parameters():
        assert torch.equal(again.state[parameter]["exp_avg"], optimizer.state[parameter]["exp_avg"])


def test_a_parameter_without_optimizer_state_is_named() -> None:
    model, optimizer, config = trained()
    saved = checkpoint.optimizer_state(optimizer)
    del saved["state"]["transformer.blocks.1.ff_out.weight"]
    said = r"^here: no optimizer state for transformer\.blocks\.1\.ff_out\.weight; set reset_optimizer_state"
    with pytest.raises(ValueError, match=said):
        checkpoint.load_optimizer_state(build_optimizer(config.optimizer, model), saved, "here")


def spoiled(change: str, saved: dict[str, Any]) -> Any:
    name = "transformer.blocks.1.ff_out.weight"
    state = saved["state"][name]
    if change == "shape":
        state["exp_avg"] = state["exp_avg"].flatten()[:-1]
    elif change == "transposed":
        state["exp_avg_sq"] = state["exp_avg_sq"].T.contiguous()
    elif change == "type":
        state["exp_avg"] = state["exp_avg"].long()
    elif change == "step":
        del state["step"]
    elif change == "another optimizer":
        del state["exp_avg_sq"], state["step"]
    elif change == "no tensors":
        state["exp_avg"] = 3.0
    elif change == "numbers":
        saved["state"][name] = 3
    elif change == "groups":
        saved["param_groups"] = [{}]
    elif change == "a list":
        return [saved]
    return saved


@pytest.mark.parametrize(
    "change, told",
    [
        (
            "shape",
            r"exp_avg of transformer\.blocks\.1\.ff_out\.weight has shape \(1535,\) and torch.float32, not \(32, 48\)",
        ),
        ("transposed", r"exp_avg_sq of .* has shape \(48, 32\)"),
        ("type", r"exp_avg of .* and torch\.int64, not \(32, 48\) and floating point"),
        ("step", r"holds exp_avg, exp_avg_sq of .*, the optimizer keeps exp_avg, exp_avg_sq, step"),
        ("another optimizer", r"holds exp_avg of .*, the optimizer keeps"),
        ("no tensors", r"holds exp_avg, exp_avg_sq, step of "),
        ("numbers", "holds no optimizer state"),
        ("groups", "holds no optimizer state"),
        ("a list", "holds no optimizer state"),
    ],
)
def test_an_optimizer_state_that_does_not_fit_is_named(change: str, told: str) -> None:
    """Fused AdamW would read and write beyond moments of the wrong shape."""
    model, optimizer, config = trained()
    saved = spoiled(change, checkpoint.optimizer_state(optimizer))
    with pytest.raises(ValueError, match=f"^here: {told}.*; set reset_optimizer_state$"):
        checkpoint.load_optimizer_state(build_optimizer(config.optimizer, model), saved, "here")


def test_the_state_of_adamw_is_not_lions() -> None:
    model, optimizer, _ = trained()
    lion = build_optimizer(OptimizerConfig("lionw"), model)
    with pytest.raises(ValueError, match="the optimizer keeps exp_avg; set reset_optimizer_state"):
        checkpoint.load_optimizer_state(lion, checkpoint.optimizer_state(optimizer), "here")


def test_an_optimizer_state_of_wrapped_and_grouped_blocks() -> None:
    model, optimizer, config = trained()
    saved = checkpoint.optimizer_state(optimizer)
    for name in list(saved["state"]):
        renamed = name.replace("transformer.blocks.0.", "transformer.block_groups.0.0.")
        renamed = renamed.replace("transformer.blocks.1.", "transformer.block_groups.0.1.")
        saved["state"]["_fsdp_wrapped_module." + renamed] = saved["state"].pop(name)
    again = build_optimizer(config.optimizer, model)
    checkpoint.load_optimizer_state(again, {"state": saved["state"]}, "here")
    for parameter in model.parameters():
        assert torch.equal(again.state[parameter]["exp_avg"], optimizer.state[parameter]["exp_avg"])
