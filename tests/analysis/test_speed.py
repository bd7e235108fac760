"""The operations of a measurement against torch's own count of them, and what the progress line says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from analysis import speed as speed_module
from analysis.entropy import measure
from analysis.speed import Speed, matmul_peak, operations_a_token
from olmo.distributed import Ranks
from olmo.memory import instance_means, observe
from olmo.model import OLMo
from tests.reference import tiny_config, tiny_olmo2_config

CPU = torch.device("cpu")


def counted(model: nn.Module, length: int) -> tuple[float, float]:
    """Operations a token of one measurement by torch's count: of linear maps, and of attention to all tokens."""
    model.eval()
    ids = torch.zeros(2, length, dtype=torch.long)
    with observe(model) as observation, FlopCounterMode(display=False) as counter:
        instance_means(model, observation, ids)
    found = {str(name): count for name, count in counter.get_flop_counts()["Global"].items()}
    linear = sum(count for name, count in found.items() if name in ("aten.mm", "aten.addmm"))
    return linear / (2 * length), (sum(found.values()) - linear) / (2 * length)


@pytest.mark.parametrize("config", [tiny_config(), tiny_olmo2_config(n_kv_heads=2), tiny_config(weight_tying=False)])
def test_operations_of_our_models(config) -> None:
    model = OLMo(config)
    linear, _ = counted(model, 12)
    assert operations_a_token(model, 12) == linear + 2 * 12 * config.d_model * config.n_layers


def test_operations_of_another_family() -> None:
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, intermediate_size=48))
    linear, _ = counted(model, 12)
    last = 2 * model.model.layers[-1].mlp.down_proj.weight.numel()  # counted, although it is not computed
    assert operations_a_token(model, 12) == linear + last + 2 * 12 * 32 * 2
    experts = transformers.MixtralConfig(**sizes, intermediate_size=48, num_local_experts=2, num_key_value_heads=4)
    assert operations_a_token(transformers.MixtralForCausalLM(experts), 12) is None


def test_the_peak_is_that_of_large_products() -> None:
    peak = matmul_peak(CPU, torch.float32)
    assert 1e9 < peak < 1e14 and matmul_peak(CPU, torch.float32) == peak


def test_the_progress_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Tokens a second, the share of the peak once that is worth measuring, and H with its standard error."""
    monkeypatch.setattr(speed_module, "matmul_peak", lambda device, dtype: 1e12)
    model = OLMo(tiny_config()).eval()
    monkeypatch.setattr(speed_module.time, "perf_counter", iter(np.arange(0.0, 1e6, 4.0)).__next__)
    speed = Speed(model, 12, CPU, 2)
    speed.advance(4000)
    assert str(speed) == ", 1,000 tokens/s"
    speed.advance(4000)
    assert str(speed) == ", 1,000 tokens/s"
    speed.advance(4000)  # 12 s
    share = operations_a_token(model, 12) * 1000 / 2e12  # type: ignore[operator]
    assert str(speed) == f", 1,000 tokens/s, {share:.0%} of the matrix-multiply peak"

    notes: list[str] = []
    monkeypatch.setattr("olmo.console.Progress.advance", lambda self, count=1: notes.append(self.note))
    rows = list(np.random.default_rng(0).integers(0, 100, (130, 6)))
    measure(model, rows, 10, "abs", CPU, Ranks())
    assert "H " not in notes[6] and ", H " in notes[-1] and " +- " in notes[-1]
