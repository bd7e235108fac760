"""Checkpoints of what is on a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from olmo import checkpoint
from olmo.checkpoint import sharded
from olmo.config import TrainConfig
from olmo.distributed import Ranks
from olmo.model import OLMo
from olmo.train.optim import build_optimizer
from tests.reference import tiny_config

pytestmark = pytest.mark.gpu


def test_a_snapshot_is_complete_before_training_continues(device: torch.device, tmp_path: Path) -> None:
    """The device is busy when it is made, and the weights change right after it; on CUDA it is page-locked."""
    torch.manual_seed(0)
    config = TrainConfig(model=tiny_config())
    config.optimizer.name = "adamw"  # type: ignore[assignment]
    model = OLMo(config.model).to(device)
    optimizer = build_optimizer(config.optimizer, model)
    model(torch.arange(32, device=device).view(2, 16)).float().logsumexp(-1).sum().backward()
    optimizer.step()
    wanted = {name: weight.clone() for name, weight in model.state_dict().items()}
    busy = torch.ones(4096 if device.type == "cuda" else 64, device=device).diag()
    for _ in range(20):
        busy = busy @ busy
    tensors = sharded.snapshot(model, checkpoint.optimizer_state(optimizer)["state"], Ranks())
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(0.5)
    assert all(tensor.device.type == "cpu" for tensor in tensors.values())
    assert all(tensor.is_pinned() for tensor in tensors.values()) == (device.type == "cuda")
    checkpoint.save_sharded(tmp_path / "step1", tensors, model, config, {"global_step": 1}, None, False, Ranks())
    read = checkpoint.read_state(tmp_path / "step1")
    assert read.keys() == wanted.keys() and all(read[name].equal(weight.cpu()) for name, weight in wanted.items())
