"""Temperatures of attention and memories: what they divide, how they decay, what a checkpoint keeps of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from olmo import checkpoint
from olmo.config import TrainConfig, make_model_config
from olmo.exceptions import ConfigurationError
from olmo.memory import instance_means, observe
from olmo.memory.temperature import Temperatures
from olmo.model import OLMo
from olmo.train.optim import build_optimizer
from tests.reference import tiny_config, tiny_olmo2_config, to_transformers

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [100, 50, 25, 12, 6, 3, 1, 0]])


@pytest.mark.parametrize("temperature", [0.5, 2.0])
@torch.no_grad()
def test_attention_scores_are_divided(temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against transformers' model whose every attention has its scaling divided."""
    torch.manual_seed(0)
    model = OLMo(tiny_olmo2_config(n_kv_heads=2)).eval()
    theirs = to_transformers(model)
    plain = model(IDS)
    Temperatures(attention=temperature).apply(model)
    for layer in theirs.model.layers:  # type: ignore[union-attr]
        layer.self_attn.scaling /= temperature
    assert (model(IDS) - plain).abs().max() > 1e-3
    torch.testing.assert_close(model(IDS), theirs(IDS).logits, atol=1e-5, rtol=1e-5)
    Temperatures().apply(model)
    assert torch.equal(model(IDS), plain)


@torch.no_grad()
def test_memory_coefficients_are_divided() -> None:
    """The same as dividing the rows of the up projection, the coefficient being linear in it; seen by the observer."""
    torch.manual_seed(0)
    model = OLMo(tiny_config()).eval()
    divisors = torch.rand(2, 48) + 0.5
    other = OLMo(model.config).eval()
    other.load_state_dict(model.state_dict())
    for block, divisor in zip(other.blocks, divisors):
        block.ff_proj.weight[:48] /= divisor[:, None]
    Temperatures(memories=divisors).apply(model)
    torch.testing.assert_close(model(IDS), other(IDS), atol=1e-5, rtol=1e-5)
    for coefficient in ("abs", "relu"):
        seen = []
        for which in (model, other):
            with observe(which, coefficient) as observation:
                seen.append(instance_means(which, observation, IDS))
        torch.testing.assert_close(seen[0], seen[1])


def test_they_decay_linearly_to_one() -> None:
    start = Temperatures(2.0, torch.tensor([[0.5, 3.0]]))
    half = start.at(0.5)
    assert half.attention == 1.5 and half.memories is not None
    assert half.memories.tolist() == [[0.75, 2.0]]
    assert not start.at(1.0) and start.at(0.0).attention == 2.0
    constant = Temperatures(2.0, decay=False)
    assert constant.at(1.0) == constant


def test_divisors_are_where_the_model_is_before_the_first_step() -> None:
    """On `meta`, where numbers can be neither looked at nor brought from: a step that did would fail."""
    torch.manual_seed(0)
    model, start = OLMo.empty(tiny_config()), Temperatures(memories=torch.rand(2, 48) + 0.5)
    assert start.memories is not None
    meta = start.to(torch.device("meta"))
    now = meta.at(0.25)
    now.apply(model)
    assert now.memories is not None and now.memories.is_meta and start.memories.device.type == "cpu"
    assert all(block.memory_temperature.is_meta for block in model.blocks)  # type: ignore[union-attr]
    assert not meta.at(1.0)
    there = start.to(torch.device("cpu")).at(0.25).memories
    assert there is not None and torch.equal(there, 1 + (start.memories - 1) * 0.75)
    assert Temperatures(2.0).to(torch.device("meta")) == Temperatures(2.0)


def test_what_a_configuration_names(tmp_path: Path) -> None:
    divisors = torch.rand(2, 48) + 0.5
    torch.save(divisors, tmp_path / "divisors.pt")
    save_file({"anything": divisors}, tmp_path / "divisors.safetensors")
    for name in ("divisors.pt", "divisors.safetensors"):
        for path, folder in ((str(tmp_path / name), None), (name, tmp_path)):
            read = Temperatures.from_config(tiny_config(temperature_MLP=path), folder)
            assert read.memories is not None and torch.equal(read.memories, divisors)
    assert not Temperatures.from_config(tiny_config(temperature_attention=1.0))
    with pytest.raises(ConfigurationError, match=r"model\.temperature_attention: -1.0 must be more than 0"):
        make_model_config({"temperature_attention": -1.0}, "here")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pt: no such file"):
        Temperatures.from_config(tiny_config(temperature_MLP="nowhere.pt"))
    for wrong in (torch.ones(2, 47), -divisors):
        torch.save(wrong, tmp_path / "wrong.pt")
        with pytest.raises(ConfigurationError, match=r"must hold positive numbers of shape \(2, 48\)"):
            Temperatures.from_config(tiny_config(temperature_MLP=str(tmp_path / "wrong.pt")))


def test_a_checkpoint_computes_what_was_saved(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = OLMo(tiny_config(temperature_attention=3.0)).eval()
    now = Temperatures(2.0, torch.rand(2, 48) + 0.5)
    now.apply(model)
    config = TrainConfig(model=model.config)
    optimizer = build_optimizer(config.optimizer, model)
    checkpoint.save(tmp_path / "step1", model, config, optimizer, {}, now)
    loaded = checkpoint.load_model(tmp_path / "step1", torch.device("cpu"))
    with torch.no_grad():
        assert torch.equal(loaded(IDS), model(IDS))
    with pytest.raises(ConfigurationError, match="temperature_attention: missing, but the checkpoint"):
        checkpoint.load_model(tmp_path / "step1", torch.device("cpu"), config=tiny_config())
    checkpoint.save(tmp_path / "step2", model, config, optimizer, {}, now.at(1.0))
    assert checkpoint.read_config(tmp_path / "step2").temperature_attention is None
    Temperatures().apply(model)
    with torch.no_grad():
        assert torch.equal(checkpoint.load_model(tmp_path / "step2", torch.device("cpu"))(IDS), model(IDS))


def test_in_bfloat16_the_coefficients_stay_bfloat16() -> None:
    model = OLMo(tiny_config()).bfloat16()
    Temperatures(2.0, torch.full((2, 48), 2.0)).apply(model)
    assert model(IDS).dtype == torch.bfloat16
    assert F.cross_entropy(model(IDS)[:, :-1].flatten(0, 1).float(), IDS[:, 1:].flatten()).isfinite()
