"""What tests of checkpoints need: tiny trained models, and folders as OLMo writes them."""

from __future__ import annotations

import base64
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from olmo.config import OptimizerConfig, TrainConfig
from olmo.model import OLMo
from olmo.train.optim import build_optimizer
from tests.reference import tiny_config

CPU = torch.device("cpu")
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [100, 50, 25, 12, 6, 3, 1, 0]])


def made_model(seed: int = 0, **overrides: Any) -> OLMo:
    torch.manual_seed(seed)
    return OLMo(tiny_config(**overrides)).eval()


def olmo_key(name: str) -> str:
    """A key as OLMo's own code spells it: base64 of a pickled (path, whether the value is pickled)."""
    return base64.urlsafe_b64encode(pickle.dumps(((name,), False))).decode("ascii")


def write_olmo(folder: Path, model: OLMo, weights: str = "model.safetensors") -> Path:
    """A checkpoint folder as OLMo writes it: only the weights and config.yaml."""
    folder.mkdir(parents=True, exist_ok=True)
    TrainConfig(model=model.config).save(folder / "config.yaml")
    state = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    if weights.endswith(".pt"):
        torch.save(state, folder / weights)
    else:
        save_file({olmo_key(name): tensor for name, tensor in state.items()}, folder / weights)
    return folder


def same_weights(first: OLMo, second: OLMo) -> None:
    ours, theirs = first.state_dict(), second.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def trained(steps: int = 2) -> tuple[OLMo, torch.optim.Optimizer, TrainConfig]:
    chosen = OptimizerConfig("adamw", weight_decay=0.1)
    config = TrainConfig(model=tiny_config(include_bias=True), optimizer=chosen)
    torch.manual_seed(0)
    model = OLMo(config.model)
    optimizer = build_optimizer(config.optimizer, model)
    for _ in range(steps):
        step(model, optimizer)
    return model, optimizer, config


def step(model: OLMo, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(model(IDS)[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
    optimizer.step()
