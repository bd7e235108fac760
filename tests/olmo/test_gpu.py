"""What must hold on a GPU; `make test-gpu` runs these alone, on a machine that has one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from analysis.entropy import measure
from olmo.distributed import Ranks, pick_device
from olmo.memory import layer_entropy
from olmo.model import OLMo
from olmo.train import Trainer
from tests.reference import tiny_config
from tests.running import configure, series, write_world

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: make test-gpu where there is one"),
]


def test_logits_equal_those_of_the_cpu() -> None:
    torch.manual_seed(0)
    model = OLMo(tiny_config()).eval()
    ids = torch.randint(0, model.config.vocab_size, (4, 64))
    with torch.no_grad():
        expected = model(ids)
        found = model.to(pick_device())(ids.to(pick_device())).cpu()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_entropy_equals_that_of_the_cpu() -> None:
    torch.manual_seed(0)
    model = OLMo(tiny_config()).eval()
    random = np.random.default_rng(0)
    rows = [random.integers(0, model.config.vocab_size, length) for length in (64, 64, 64, 64, 40, 3, 64, 10, 7)]
    expected = layer_entropy(measure(model, rows, 4, "abs", torch.device("cpu"), Ranks())["knowledge"].average)
    device = pick_device("cuda")
    model = model.to(device)
    for compiled in (False, True):
        averages = measure(model, rows, 4, "abs", device, Ranks(), compiled=compiled)
        np.testing.assert_allclose(layer_entropy(averages["knowledge"].average), expected, atol=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "amp_bf16"])
def test_a_run_trains(tmp_path: Path, precision: str) -> None:
    world = write_world(tmp_path / "world")
    config = configure(world / "config.yaml", tmp_path / "run", f"--precision={precision}")
    Trainer(config, pick_device(), Ranks()).fit()
    assert sorted(series(tmp_path / "run")) == list(range(1, 8))
