"""The loss in parts against torch's own on all logits at once, in float64; its memory; held-out losses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from olmo.config import ModelConfig
from olmo.model import OLMo
from olmo.model.causal_lm import CausalLM
from olmo.train import loss as loss_module
from olmo.train.loss import Objective, linear_cross_entropy, predictions
from scripts.benchmarks.loss import peak_of_loss
from scripts.benchmarks.processes import run_in_subprocess
from tests.architectures import built
from tests.reference import tiny_config


def whole(logits: Tensor, input_ids: Tensor, z_multiplier: float | None, label_mask: Tensor | None) -> tuple[Any, ...]:
    """Cross-entropy and z-loss of logits (B, T, V), as their definitions say."""
    labels = input_ids if label_mask is None else input_ids.masked_fill(~label_mask, -100)
    cross_entropy = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    partitions = logits[:, :-1].logsumexp(-1)[labels[:, 1:] != -100]
    return cross_entropy, (z_multiplier or 0.0) * partitions.square().sum()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 4),
    length=st.integers(1, 9),
    part=st.integers(1, 12),
    vocabulary=st.integers(2, 40),
    scale=st.sampled_from([0.1, 3.0, 100.0]),
    biased=st.booleans(),
    divisor=st.sampled_from([1.0, math.sqrt(7)]),
    cap=st.sampled_from([None, 0.7, 30.0]),
    z_multiplier=st.sampled_from([None, 1e-4, 0.3]),
    masked=st.sampled_from([None, 0.5, 1.0]),
    upstream=st.sampled_from([1.0, 1 / 128]),
)
def test_equals_the_whole_loss(
    seed, rows, length, part, vocabulary, scale, biased, divisor, cap, z_multiplier, masked, upstream
) -> None:
    """Losses and all gradients, for parts of any size, and whatever is masked."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, length, 7, generator=generator, dtype=torch.float64)
    weight = scale * torch.randn(vocabulary, 7, generator=generator, dtype=torch.float64)
    bias = torch.randn(vocabulary, generator=generator, dtype=torch.float64) if biased else None
    ids = torch.randint(vocabulary, (rows, length), generator=generator)
    mask = None if masked is None else torch.rand(rows, length, generator=generator) >= masked

    def run(dtype: torch.dtype, ours: bool) -> tuple[list[Tensor], list[Tensor]]:
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in (hidden, weight, bias) if t is not None]
        offset = leaves[2] if biased else None
        if ours:
            flat, options = leaves[0].flatten(0, 1), {"divisor": divisor, "cap": cap, "z_multiplier": z_multiplier}
            total, *parts = linear_cross_entropy(flat, leaves[1], offset, *predictions(ids, mask), **options)
        else:
            logits = F.linear(leaves[0], leaves[1], offset) / divisor
            logits = logits if cap is None else torch.tanh(logits / cap) * cap
            parts = list(whole(logits, ids, z_multiplier, mask))
            total = parts[0] + parts[1]
        (total * upstream).backward()
        return [total, *parts], [leaf.grad for leaf in leaves]  # type: ignore[misc]

    loss_module.TOKENS_ELSEWHERE, kept = part, loss_module.TOKENS_ELSEWHERE
    try:
        expected, gradients = run(torch.float64, ours=False)
        for dtype, near in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
            found, found_gradients = run(dtype, ours=True)
            assert all(f.dtype == dtype for f in (*found, *found_gradients))
            for mine, wanted in zip((*found, *found_gradients), (*expected, *gradients)):
                # Of sums whose terms are as large as their largest element, the rest is what rounding left.
                atol = near * max(1.0, expected[0].item() if mine.ndim == 0 else wanted.abs().max().item())
                torch.testing.assert_close(mine.double(), wanted, rtol=0, atol=atol)
    finally:
        loss_module.TOKENS_ELSEWHERE = kept


def test_predictions_are_all_tokens_but_the_first_of_a_row() -> None:
    ids = torch.tensor([[5, 6, 7], [8, 9, 4]])
    assert [t.tolist() for t in predictions(ids)] == [[0, 1, 3, 4], [6, 7, 9, 4]]
    mask = torch.tensor([[True, False, True], [True, True, False]])
    assert [t.tolist() for t in predictions(ids, mask)] == [[1, 3], [7, 9]]
    assert mask[0, 0]  # what was given stays as it is
    assert [len(t) for t in predictions(ids, torch.zeros_like(mask))] == [0, 0]


@pytest.mark.parametrize("tying", [True, False])
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_objective_of_a_model(
    tying: bool, scaled: bool, precision: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss and gradients of every parameter are those of the model's own logits, with more embeddings than tokens."""
    monkeypatch.setattr(loss_module, "TOKENS_ELSEWHERE", 7)
    torch.manual_seed(0)
    config = tiny_config(weight_tying=tying, scale_logits=scaled, embedding_size=160, include_bias=True)
    model, ids = OLMo(config), torch.randint(128, (3, 16))
    found = {}
    for ours in (True, False):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
            if ours:
                total, *parts, auxiliary = Objective(model, 1e-2)(ids, *predictions(ids))
                assert auxiliary.item() == 0  # no experts to balance
            else:
                parts = list(whole(model(ids).float(), ids, 1e-2, None))
                total = parts[0] + parts[1]
        assert all(part.dtype == torch.float32 for part in parts)
        (total / ids.numel()).backward()
        found[ours] = [p.item() for p in parts], {n: p.grad.clone() for n, p in model.named_parameters()}  # type: ignore[union-attr]
    narrow = precision == torch.bfloat16
    assert found[True][0] == pytest.approx(found[False][0], rel=1e-6)  # of the same logits, also in bfloat16
    for name, wanted in found[False][1].items():
        # bfloat16 has 8 significant bits, and products of it are rounded more than once on the way.
        torch.testing.assert_close(
            found[True][1][name], wanted, rtol=0, atol=(2e-2 if narrow else 2e-6) * wanted.abs().max().item()
        )


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["Gemma 2", "Qwen2", "OLMoE"])
def test_objective_of_another_family(name: str, precision: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and gradients are those of the network's own logits, in the type that autocast gives them."""
    monkeypatch.setattr(loss_module, "TOKENS_ELSEWHERE", 7)
    settings = {"OLMoE": {"router_aux_loss_coef": 0.5}, "Gemma 2": {"final_logit_softcapping": 3.0}}
    network, ids = built(name, **settings.get(name, {})), torch.randint(2, 128, (3, 16))
    model, found = CausalLM(network, ModelConfig(), []), {}
    for ours in (True, False):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
            if ours:
                total, *parts = Objective(model, 1e-2)(ids, *predictions(ids))
                total = total + parts[-1]
            else:
                mixture = {"output_router_logits": True} if name == "OLMoE" else {}
                output = network(input_ids=ids, use_cache=False, **mixture)
                auxiliary = 0.5 * output.aux_loss if mixture else torch.zeros(())
                parts = [*whole(output.logits.float(), ids, 1e-2, None), auxiliary]
                total = sum(parts)
        (total / ids.numel()).backward()
        found[ours] = [p.item() for p in parts], {n: p.grad.clone() for n, p in model.named_parameters()}  # type: ignore[union-attr]
    narrow = precision == torch.bfloat16
    assert found[True][0] == pytest.approx(found[False][0], rel=1e-6)  # of the same logits, also in bfloat16
    for key, wanted in found[False][1].items():
        # As above; bfloat16 is rounded in every layer, and an expert that hardly any token uses adds few such numbers.
        largest = max(wanted.abs().max().item(), 1e-4)
        torch.testing.assert_close(
            found[True][1][key], wanted, rtol=0, atol=(3e-2 if narrow else 3e-6) * largest, msg=key
        )


def test_the_gradient_can_be_taken_once_and_only_where_it_is_wanted() -> None:
    hidden, weight = torch.randn(4, 3), torch.randn(5, 3, requires_grad=True)
    places = torch.arange(4)
    total, cross_entropy, _ = linear_cross_entropy(hidden, weight, None, places, places)
    assert not cross_entropy.requires_grad
    total.backward(retain_graph=True)
    assert weight.grad is not None and hidden.grad is None
    with pytest.raises(RuntimeError, match="once"):
        total.backward()
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, weight, None, places, places)[0].requires_grad


def test_all_logits_are_never_in_memory() -> None:
    """Of 8192 tokens the logits of 512, their logarithms, and what the model is given back."""
    tokens, vocabulary, width = 8192, 8192, 16
    logits = 4 * tokens * vocabulary
    in_parts, at_once = (
        run_in_subprocess(peak_of_loss, name, tokens, width, vocabulary, False)
        for name in ("ours, in parts", "all at once")
    )
    assert at_once > 2 * logits
    assert in_parts < 0.5 * logits
