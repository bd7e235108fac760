"""The operations of a measurement against torch's own count of them, and the peak of this machine."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from olmo.memory import instance_means, observe
from olmo.model import OLMo
from scripts.benchmarks.peak import measured_peak, operations_per_token
from tests.reference import tiny_config, tiny_olmo2_config
from tests.running import CPU


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
    assert operations_per_token(model, 12) == linear + 2 * 12 * config.d_model * config.n_layers


def test_operations_of_another_family() -> None:
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, intermediate_size=48))
    linear, _ = counted(model, 12)
    last = 2 * model.model.layers[-1].mlp.down_proj.weight.numel()  # counted, although it is not computed
    assert operations_per_token(model, 12) == linear + last + 2 * 12 * 32 * 2
    experts = transformers.MixtralConfig(**sizes, intermediate_size=48, num_local_experts=2, num_key_value_heads=4)
    assert operations_per_token(transformers.MixtralForCausalLM(experts), 12) is None


def test_the_peak_is_that_of_large_products() -> None:
    assert 1e9 < measured_peak(CPU, torch.float32) < 1e14
