"""Evaluators on a GPU: probes, packed as everywhere, and held-out losses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from olmo.distributed import Ranks
from olmo.eval.evaluators import Evaluators
from olmo.model import OLMo
from olmo.tokenizer import run_tokenizer
from tests.running import CPU, configure, write_world

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("precision", ["fp32", "amp_bf16"])
def test_metrics_equal_those_of_the_cpu(device: torch.device, tmp_path: Path, precision: str) -> None:
    config = configure(write_world(tmp_path) / "config.yaml", tmp_path / "run", f"--precision={precision}")
    torch.manual_seed(0)
    model = OLMo(config.model)
    wanted, found = (
        Evaluators(config, run_tokenizer(config), place, Ranks()).run(model.to(place), config.evaluators).metrics
        for place in (CPU, device)
    )
    losses = [name for name in wanted if name.endswith(("CrossEntropyLoss", "log_probability"))]
    assert len(losses) > 10 and found.keys() == wanted.keys()
    near = 1e-4 if precision == "fp32" else 2e-2
    assert [found[name] for name in losses] == pytest.approx([wanted[name] for name in losses], rel=near)
