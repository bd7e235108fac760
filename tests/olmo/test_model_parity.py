"""The transformer against transformers' implementation."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from olmo.config import ModelConfig
from olmo.model import OLMo
from tests.reference import scatter_, tiny_config, tiny_olmo2_config, to_transformers


def build(config: ModelConfig, seed: int = 0) -> OLMo:
    """Random weights, with biases and norm weights that are not just zeros and ones."""
    torch.manual_seed(seed)
    return scatter_(OLMo(config), seed).eval()


def tokens(rows: int, length: int, seed: int = 0, below: int = 128) -> Tensor:
    return torch.randint(0, below, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def assert_parity(config: ModelConfig) -> None:
    model = build(config)
    theirs = to_transformers(model)
    ids = tokens(3, 33)
    ours = model(ids)
    assert ours.std() > 0.1  # numbers worth comparing
    torch.testing.assert_close(ours, theirs(ids).logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("config", [tiny_config(n_kv_heads=2), tiny_olmo2_config()])
def test_parity_where_tokens_are_masked(config: ModelConfig) -> None:
    """At the front, in the middle and at the end. What a token gives that sees nothing but padding is nobody's."""
    model = build(config)
    ids = tokens(4, 9)
    mask = torch.tensor(
        [[0, 0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 1, 1, 0, 1, 1], [1] * 9, [1, 1, 1, 1, 0, 0, 0, 0, 0]]
    )
    theirs = to_transformers(model)(ids, attention_mask=mask).logits
    ours = model(ids, mask.bool())
    for row in range(4):
        seeing = mask[row].cumsum(0) > 0
        torch.testing.assert_close(ours[row][seeing], theirs[row][seeing], atol=1e-5, rtol=1e-5)
    assert ours.isfinite().all()
    torch.testing.assert_close(ours[2:3], model(ids[2:3]), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(ours[0, 3:], model(ids[:1])[0, 3:], atol=1e-2)


@pytest.mark.parametrize("n_kv_heads", [None, 2, 1])
@pytest.mark.parametrize("clip_qkv", [None, 0.5])
@pytest.mark.parametrize("weight_tying", [True, False])
def test_parity_with_the_first_olmo(n_kv_heads: int | None, clip_qkv: float | None, weight_tying: bool) -> None:
    assert_parity(tiny_config(n_kv_heads=n_kv_heads, clip_qkv=clip_qkv, weight_tying=weight_tying))


@pytest.mark.parametrize("n_kv_heads", [None, 2, 1])
@pytest.mark.parametrize("weight_tying", [True, False])
def test_parity_with_the_second_olmo(n_kv_heads: int | None, weight_tying: bool) -> None:
    assert_parity(tiny_olmo2_config(n_kv_heads=n_kv_heads, weight_tying=weight_tying))


@pytest.mark.parametrize("make", [tiny_config, tiny_olmo2_config])
@pytest.mark.parametrize(
    "shape",
    [
        {"rope_theta": 500},
        {"rope_theta": 500000},
        {"mlp_hidden_size": None, "mlp_ratio": 6},
        {"mlp_hidden_size": 10},
        {"d_model": 24, "n_heads": 2, "n_layers": 4},
        {"n_heads": 1, "n_layers": 1},
        {"multi_query_attention": True},
        {"vocab_size": 130, "embedding_size": 192},
        {"embedding_size": None},
    ],
    ids=str,
)
def test_parity_of_other_shapes(make: Any, shape: dict[str, Any]) -> None:
    assert_parity(make(**shape))


def test_parity_of_another_epsilon() -> None:
    assert_parity(tiny_olmo2_config(layer_norm_eps=1e-2))


@pytest.mark.parametrize(
    "config",
    [tiny_config(), tiny_config(n_kv_heads=2, clip_qkv=0.5), tiny_olmo2_config(), tiny_olmo2_config(n_kv_heads=2)],
    ids=["first", "first, clipped", "second", "second, grouped"],
)
@torch.no_grad()
def test_parity_in_bfloat16(config: ModelConfig) -> None:
    """Both round where they please: ours is as near to the float32 logits as theirs."""
    model, ids = build(config), tokens(3, 33)
    exact = model(ids)
    theirs = to_transformers(model).bfloat16()(ids).logits.float()
    ours = model.bfloat16()(ids).float()
    assert (ours - exact).std() < 1.2 * (theirs - exact).std()
    assert (ours - theirs).std() < 0.02 * exact.std()  # bfloat16 holds 8 bits


@pytest.mark.parametrize(
    "config", [tiny_config(n_kv_heads=2), tiny_olmo2_config(n_kv_heads=2)], ids=["first", "second"]
)
def test_parity_of_gradients(config: ModelConfig) -> None:
    model = build(config)
    theirs = to_transformers(model)
    ids = tokens(2, 17)
    for module, logits in ((model, model(ids)), (theirs, theirs(ids).logits)):
        F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        assert all(p.grad is not None for p in module.parameters())
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    stacked = {"transformer.wte.weight": ["model.embed_tokens.weight"]}
    if config.norm_after:
        stacked["transformer.ff_out.weight"] = ["lm_head.weight"]
        stacked["transformer.ln_f.weight"] = ["model.norm.weight"]
    for layer in range(config.n_layers):
        ours, other = f"transformer.blocks.{layer}.", f"model.layers.{layer}."
        stacked[f"{ours}att_proj.weight"] = [f"{other}self_attn.{x}_proj.weight" for x in "qkv"]
        stacked[f"{ours}attn_out.weight"] = [f"{other}self_attn.o_proj.weight"]
        stacked[f"{ours}ff_proj.weight"] = [f"{other}mlp.{x}_proj.weight" for x in ("up", "gate")]
        stacked[f"{ours}ff_out.weight"] = [f"{other}mlp.down_proj.weight"]
        if config.norm_after:
            stacked[f"{ours}q_norm.weight"] = [f"{other}self_attn.q_norm.weight"]
            stacked[f"{ours}k_norm.weight"] = [f"{other}self_attn.k_norm.weight"]
            stacked[f"{ours}attn_norm.weight"] = [f"{other}post_attention_layernorm.weight"]
            stacked[f"{ours}ff_norm.weight"] = [f"{other}post_feedforward_layernorm.weight"]
    assert stacked.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        expected = torch.cat([gradients[part] for part in stacked[name]])
        torch.testing.assert_close(parameter.grad, expected, atol=1e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
