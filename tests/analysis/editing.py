"""Measured checkpoints and their edits, which tests of resuscitation share."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from analysis import change_parameters, entropy
from olmo import checkpoint
from olmo.config import TrainConfig
from olmo.exceptions import exit_status
from olmo.model import OLMo
from olmo.train.optim import build_optimizer
from tests.reference import tiny_config


def uneven_model(seed: int = 0) -> OLMo:
    """A model some of whose memories are far more active than others, as in a trained one."""
    torch.manual_seed(seed)
    model = OLMo(tiny_config(max_sequence_length=LENGTH)).eval()
    with torch.no_grad():
        for block in model.blocks:
            block.ff_proj.weight[:MEMORIES] *= torch.logspace(-1, 1, MEMORIES)[torch.randperm(MEMORIES), None]
    return model


def write(folder: Path, model: OLMo) -> Path:
    config = TrainConfig(model=model.config)
    config.optimizer.name = "adamw"
    checkpoint.save(folder, model, config, build_optimizer(config.optimizer, model), {})
    return folder


def measure(folder: Path, tokens: Path, *more: object) -> float:
    argv = ["--checkpoint", folder, "--data", tokens, "--data_size", 40, *more]
    entropy.main([str(a) for a in argv])
    return json.loads((folder / "knowledge_entropy.json").read_text())["knowledge_entropy"]


def measure_to(folder: Path, tokens: Path, output: Path, *more: object) -> float:
    argv = ["--checkpoint", folder, "--data", tokens, "--data_size", 40, "--output", output, *more]
    entropy.main([str(a) for a in argv])
    return json.loads((output / "knowledge_entropy.json").read_text())["knowledge_entropy"]


def change(folder: Path, p: float, q: float, *more: object) -> None:
    argv = ["--checkpoint", folder, "--resuscitation_ratio", p, "--amplifying_factor", q, *more]
    change_parameters.main([str(a) for a in argv])


def coefficients(folder: Path) -> Tensor:
    return load_file(folder / "mlp_average_coefficients.safetensors")["mlp_average_coefficients"]


def failing(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str]:
    status = exit_status(change_parameters.main, [str(a) for a in argv])
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ") and shown.err.count("\n") == 1 and not shown.out
    return status, shown.err


LENGTH, MEMORIES = 16, 48
