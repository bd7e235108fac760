"""Parameter groups, AdamW, schedules and clipping, each against a direct transcription of its definition."""

import math

import numpy as np
import pytest
import torch

from olmo.config import ModelConfig, OptimizerConfig
from olmo.model import OLMo
from olmo.model.causal_lm import CausalLM
from olmo.train.optim import (
    LionW,
    build_optimizer,
    clip_each_gradient,
    clip_gradients,
    parameter_groups,
)
from tests import families
from tests.reference import scatter_, tiny_config


def everything() -> OLMo:
    """A model that has every kind of parameter."""
    torch.manual_seed(0)
    return OLMo(
        tiny_config(
            rope=False,
            include_bias=True,
            layer_norm_with_affine=True,
            attention_layer_norm=True,
            attention_layer_norm_with_affine=True,
            embedding_layer_norm=True,
            weight_tying=False,
        )
    )


# --- which parameters decay ---


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("embeddings", [False, True])
def test_which_parameters_decay(norms: bool, embeddings: bool) -> None:
    model = everything()
    config = OptimizerConfig(weight_decay=0.3, decay_norm_and_bias=norms, decay_embeddings=embeddings)
    decays = {}
    for group in parameter_groups(config, model):
        assert group["weight_decay"] in (0.3, 0.0)
        assert group["param_names"] == sorted(group["param_names"])
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            assert parameter is model.get_parameter(name)
            assert name not in decays
            decays[name] = group["weight_decay"] > 0
    linear = ("att_proj.weight", "attn_out.weight", "ff_proj.weight", "ff_out.weight")
    expected = {}
    for name, _ in model.named_parameters():
        if name in ("transformer.wte.weight", "transformer.wpe.weight"):
            expected[name] = embeddings
        else:
            expected[name] = True if name.endswith(linear) else norms
    assert decays == expected
    assert sum(expected[n] for n in expected if n.endswith(linear)) == 2 * 4 + 1


def test_tied_embedding_is_one_parameter_and_an_embedding() -> None:
    groups = parameter_groups(OptimizerConfig(weight_decay=0.1), OLMo(tiny_config()))
    names = {name: group["weight_decay"] for group in groups for name in group["param_names"]}
    assert names["transformer.wte.weight"] == 0.0
    assert "transformer.ff_out.weight" not in names


def test_no_empty_group() -> None:
    config = OptimizerConfig(decay_norm_and_bias=True, decay_embeddings=True)
    assert len(parameter_groups(config, everything())) == 1


# Names in other families, from their own code: of matrices that do not decay, and of what is no embedding there.
KEPT = ("embed", "wte", "wpe", "word_embeddings", "bias", "norm", "A_log", "ln_", "sinks")


@pytest.mark.parametrize(
    "family",
    ["llama", "gpt2", "gpt_neox", "gemma2", "opt", "bloom", "olmoe", "gpt_oss", "deepseek_v3", "falcon_h1", "jamba"],
)
def test_every_weight_of_another_family_is_in_one_group(family: str) -> None:
    network = families.built(family)
    frozen = next(p for p in network.parameters() if p.ndim == 2)
    frozen.requires_grad = False
    model = CausalLM(network, ModelConfig(), [])
    groups = parameter_groups(OptimizerConfig(weight_decay=0.1), model)
    names = [name for group in groups for name in group["param_names"]]
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(names) == len(set(names)) and set(names) == set(trained)
    assert not any(p is frozen for group in groups for p in group["params"])
    for group in groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            assert parameter is trained[name]
            kept = parameter.ndim == 1 or any(part in name for part in KEPT)
            assert group["weight_decay"] == (0.0 if kept else 0.1), name


def test_a_tied_head_before_its_embedding_is_an_embedding() -> None:
    class HeadFirst(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.tokens = torch.nn.Linear(4, 8, bias=False), torch.nn.Embedding(8, 4)
            self.head.weight = self.tokens.weight

    (group,) = parameter_groups(OptimizerConfig(weight_decay=0.1), HeadFirst())
    assert group["param_names"] == ["head.weight"] and group["weight_decay"] == 0.0


# --- AdamW ---


def test_adamw_step_by_hand() -> None:
    """Three steps of decoupled weight decay and bias-corrected moments, in float64 beside the float32 optimizer."""
    model = everything()
    config = OptimizerConfig("adamw", 1e-2, weight_decay=0.1, betas=(0.8, 0.95), eps=1e-6)
    optimizer = build_optimizer(config, model)
    decay = {name: g["weight_decay"] for g in optimizer.param_groups for name in g["param_names"]}
    weights = {name: p.detach().double().numpy().copy() for name, p in model.named_parameters()}
    first = {name: np.zeros_like(w) for name, w in weights.items()}
    second = {name: np.zeros_like(w) for name, w in weights.items()}
    generator = torch.Generator().manual_seed(1)
    for step, rate in enumerate((1e-2, 3e-2, 5e-3), start=1):
        for group in optimizer.param_groups:
            group["lr"] = rate
        for name, parameter in model.named_parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            gradient = parameter.grad.double().numpy()
            first[name] = 0.8 * first[name] + 0.2 * gradient
            second[name] = 0.95 * second[name] + 0.05 * gradient**2
            corrected = first[name] / (1 - 0.8**step), second[name] / (1 - 0.95**step)
            weights[name] *= 1 - rate * decay[name]
            weights[name] -= rate * corrected[0] / (np.sqrt(corrected[1]) + 1e-6)
        optimizer.step()
    for name, parameter in model.named_parameters():
        np.testing.assert_allclose(parameter.detach().numpy(), weights[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_optimizer_takes_its_settings() -> None:
    config = OptimizerConfig("adamw", 2e-3, weight_decay=0.2, betas=(0.7, 0.9), eps=1e-7)
    optimizer = build_optimizer(config, everything())
    assert isinstance(optimizer, torch.optim.AdamW)
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (2e-3, (0.7, 0.9), 1e-7)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.2, 0.0]


# --- LionW ---


def test_lion_step_by_hand() -> None:
    """Three steps in float64 beside the float32 optimizer (arXiv 2302.06675, algorithm 2, decoupled decay)."""
    model = everything()
    optimizer = build_optimizer(OptimizerConfig("lionw", 1e-2, weight_decay=0.1, betas=(0.8, 0.95)), model)
    assert isinstance(optimizer, LionW)
    decay = {name: g["weight_decay"] for g in optimizer.param_groups for name in g["param_names"]}
    weights = {name: p.detach().double().numpy().copy() for name, p in model.named_parameters()}
    momentum = {name: np.zeros_like(w) for name, w in weights.items()}
    generator = torch.Generator().manual_seed(1)
    for rate in (1e-2, 3e-2, 5e-3):
        for group in optimizer.param_groups:
            group["lr"] = rate
        for name, parameter in model.named_parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            gradient = parameter.grad.double().numpy()
            weights[name] *= 1 - rate * decay[name]
            weights[name] -= rate * np.sign(0.8 * momentum[name] + 0.2 * gradient)
            momentum[name] = 0.95 * momentum[name] + 0.05 * gradient
        optimizer.step()
    for name, parameter in model.named_parameters():
        np.testing.assert_allclose(parameter.detach().numpy(), weights[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_lion_leaves_parameters_without_gradients_alone() -> None:
    model = everything()
    before = [p.detach().clone() for p in model.parameters()]
    build_optimizer(OptimizerConfig("lionw", 1e-2, weight_decay=0.1), model).step()
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before))


# --- clipping ---


@pytest.mark.parametrize("limit", [None, 1e-3, 0.5, 1.0, 1e4])
def test_clip_gradients(limit: float | None) -> None:
    model = scatter_(everything())
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator) / 100
    before = {name: p.grad.double().clone() for name, p in model.named_parameters() if p.grad is not None}
    norm = math.sqrt(sum(float((g**2).sum()) for g in before.values()))
    assert 1 < norm < 10  # the limits lie on both sides
    returned, share = clip_gradients(model, limit)
    assert returned.item() == pytest.approx(norm, rel=1e-5)
    factor = 1.0 if limit is None else min(1.0, limit / (norm + 1e-6))
    assert share.item() == (factor < 1)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad.double(), before[name] * factor, rtol=1e-5, atol=1e-9)


def test_clipping_leaves_parameters_without_gradients_alone() -> None:
    model = everything()
    model.transformer["wte"].weight.grad = torch.full((128, 32), 2.0)
    assert clip_gradients(model, 1.0)[0].item() == pytest.approx(2.0 * math.sqrt(128 * 32))
    assert sum(p.grad is not None for p in model.parameters()) == 1


def test_clip_each_gradient_by_hand() -> None:
    """Four steps of gradients that grow and shrink, against the recursion written out in float64."""
    model = everything()
    optimizer = build_optimizer(OptimizerConfig("adamw", 1e-3, betas=(0.7, 0.9)), model)
    generator = torch.Generator().manual_seed(3)
    average: dict[str, float] = {}
    clipped, shares = 0, 0.0
    for step, scale in enumerate((1.0, 1.05, 3.0, 0.5), start=1):
        wanted = {}
        norms = []
        for name, parameter in model.named_parameters():
            parameter.grad = scale * torch.randn(parameter.shape, generator=generator)
            gradient = parameter.grad.double()
            norm = float(gradient.norm())
            norms.append(norm)
            before = average.get(name, norm)
            factor = min(1.0, 1.2 * before / (norm + 1e-6))
            clipped += factor < 1
            wanted[name] = gradient * factor
            if step > 1:  # OLMo keeps the average from the second step on
                average[name] = before + (norm * factor - before) * (1 - 0.9)
        joint, share = clip_each_gradient(optimizer, 1.2)
        assert joint.item() == pytest.approx(math.hypot(*norms), rel=1e-5)
        shares += share.item()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.grad.double(), wanted[name], rtol=1e-5, atol=1e-7)
        optimizer.step()
    assert clipped > 10 and shares == pytest.approx(clipped / len(average))
    kept = {name: float(optimizer.state[p]["grad_norm_exp_avg"]) for name, p in model.named_parameters()}
    assert kept == pytest.approx(average, rel=1e-5)
