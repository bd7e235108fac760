"""Checkpoints, tokens and direct computations that tests of measurements share."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from analysis import entropy
from olmo import checkpoint
from olmo.config import TokenizerConfig, TrainConfig
from olmo.exceptions import exit_status
from olmo.model import OLMo
from olmo.train.optim import build_optimizer
from tests import running
from tests.reference import tiny_config
from tests.running import ROOT

TEXTS = [
    "The warden of the silver lake.",
    "A lake",
    "In the town of stone and water, the owl is in the tower of the old inn.",
    "Rain",
    "He is there.",
]


def made_model(seed: int) -> OLMo:
    torch.manual_seed(seed)
    return OLMo(tiny_config(max_sequence_length=LENGTH)).eval()


def write(folder: Path, model: OLMo, tokenizer: str = "gpt2") -> Path:
    config = TrainConfig(model=model.config, tokenizer=TokenizerConfig(identifier=tokenizer))
    config.optimizer.name = "adamw"  # type: ignore[assignment]
    checkpoint.save(folder, model, config, build_optimizer(config.optimizer, model), {})
    return folder


def rows_of(tokens: Path) -> np.ndarray:
    return np.fromfile(tokens, "<u2")[: INSTANCES * LENGTH].reshape(INSTANCES, LENGTH).astype(np.int64)


@torch.no_grad()
def direct(theirs: Any, places: list[str], rows: Sequence[Sequence[int]]) -> Tensor:
    """Cbar (L, M) of a transformers model: each instance alone, mean over its tokens, then over instances."""
    heard: dict[str, Tensor] = {}
    total: Any = 0.0

    def listen(place: str) -> Any:
        def hook(_: Any, args: Any) -> None:
            heard[place] = args[0][0].double()

        return hook

    handles = [theirs.get_submodule(p).register_forward_pre_hook(listen(p)) for p in places]
    for row in rows:
        theirs(torch.as_tensor(row)[None])
        signed = torch.stack([heard[place] for place in places])
        total = total + signed.abs().mean(1)
    for handle in handles:
        handle.remove()
    return total / len(rows)


def olmo_places(layers: int = 2) -> list[str]:
    return [f"model.layers.{layer}.mlp.down_proj" for layer in range(layers)]


def entropies(average: Tensor) -> list[float]:
    p = average / average.sum(1, keepdim=True)
    return (-(p * p.log()).sum(1)).tolist()


def run(*argv: object) -> None:
    entropy.main([str(a) for a in argv])


def result_in(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "knowledge_entropy.json").read_text())


def coefficients_in(folder: Path) -> Tensor:
    return load_file(folder / "mlp_average_coefficients.safetensors")["mlp_average_coefficients"]


def check(folder: Path, average: Tensor) -> None:
    result = result_in(folder)
    np.testing.assert_allclose(result["layers"], entropies(average), rtol=0, atol=1e-6)
    assert result["knowledge_entropy"] == pytest.approx(sum(entropies(average)), abs=1e-6)
    torch.testing.assert_close(coefficients_in(folder), average.float(), rtol=1e-5, atol=1e-7)


def command(*argv: object, cwd: Path = ROOT, new: bool = False) -> subprocess.CompletedProcess[str]:
    return running.command(["-m", *map(str, argv)], cwd, new=new)


def failing(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """The one line of a failure while running."""
    assert exit_status(entropy.main, [str(a) for a in argv]) == 1
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ") and shown.err.count("\n") == 1 and not shown.out
    return shown.err


LENGTH, INSTANCES = 16, 100
