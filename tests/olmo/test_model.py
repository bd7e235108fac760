"""The transformer against its definition written out in float64, its names and its laws."""

import math
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from olmo.config import ActivationType, LayerNormType, ModelConfig
from olmo.model import LayerNorm, OLMo, rotary_table, rotate
from tests.reference import scatter_, tiny_config


def build(config: ModelConfig, seed: int = 0) -> OLMo:
    """Random weights, with biases and norm weights that are not just zeros and ones."""
    torch.manual_seed(seed)
    return scatter_(OLMo(config), seed).eval()


def tokens(rows: int, length: int, seed: int = 0, below: int = 128) -> Tensor:
    return torch.randint(0, below, (rows, length), generator=torch.Generator().manual_seed(seed))


# --- the definition, written out ---


@torch.no_grad()
def direct(model: OLMo, ids: Tensor) -> Tensor:
    """Logits (B, T, V) in float64, head by head and position by position; rotations as complex numbers."""
    config = model.config
    weights = {name.removeprefix("transformer."): p.double() for name, p in model.state_dict().items()}
    size = config.d_model // config.n_heads
    shared = config.n_heads // config.effective_n_kv_heads

    def norm(x: Tensor, name: str) -> Tensor:
        if config.layer_norm_type == "rms":
            x = x / (x.square().mean(-1, keepdim=True) + config.layer_norm_eps).sqrt()
        else:
            x = x - x.mean(-1, keepdim=True)
            x = x / (x.square().mean(-1, keepdim=True) + config.layer_norm_eps).sqrt()
        return x * weights.get(f"{name}.weight", 1.0) + weights.get(f"{name}.bias", 0.0)

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0)

    def attention(x: Tensor, block: str) -> Tensor:
        qkv = linear(x, f"{block}.att_proj")
        if config.clip_qkv is not None:
            qkv = qkv.clip(-config.clip_qkv, config.clip_qkv)
        kv = config.effective_n_kv_heads * size
        q, k, v = qkv[:, : config.d_model], qkv[:, config.d_model : -kv], qkv[:, -kv:]
        if config.attention_layer_norm:
            q, k = norm(q, f"{block}.q_norm"), norm(k, f"{block}.k_norm")
        heads = []
        for head in range(config.n_heads):
            a, b = head * size, head // shared * size
            queries, keys, values = q[:, a : a + size], k[:, b : b + size], v[:, b : b + size]
            if config.rope:
                speed = config.rope_theta ** (-torch.arange(size // 2).double() / (size // 2))
                turn = torch.polar(torch.ones(len(x), size // 2).double(), torch.arange(len(x))[:, None] * speed)
                queries, keys = (
                    torch.complex(t[:, : size // 2].contiguous(), t[:, size // 2 :].contiguous()) * turn
                    for t in (queries, keys)
                )
                scores = (queries @ keys.conj().T).real
            else:
                scores = queries @ keys.T
            rows = []
            for place in range(len(x)):
                share = (scores[place, : place + 1] / math.sqrt(size)).softmax(0)
                rows.append(share @ values[: place + 1])
            heads.append(torch.stack(rows))
        return linear(torch.cat(heads, 1), f"{block}.attn_out")

    def feed_forward(x: Tensor, block: str) -> Tensor:
        inner = linear(x, f"{block}.ff_proj")
        if config.activation_type == "swiglu":
            up, gate = inner[:, : config.inner_size], inner[:, config.inner_size :]
            inner = up * gate / (1 + (-gate).exp())
        elif config.activation_type == "relu":
            inner = inner.clip(min=0)
        else:
            inner = inner * (1 + torch.erf(inner / math.sqrt(2))) / 2
        return linear(inner, f"{block}.ff_out")

    result = []
    for row in ids:
        x = weights["wte.weight"][row]
        if config.embedding_layer_norm:
            x = norm(x, "emb_norm")
        if not config.rope:
            x = x + weights["wpe.weight"][: len(row)]
        for layer in range(config.n_layers):
            block = f"blocks.{layer}"
            if config.norm_after:
                x = x + norm(attention(x, block), f"{block}.attn_norm")
                x = x + norm(feed_forward(x, block), f"{block}.ff_norm")
            else:
                x = x + attention(norm(x, f"{block}.attn_norm"), block)
                x = x + feed_forward(norm(x, f"{block}.ff_norm"), block)
        x = norm(x, "ln_f")
        scores = x @ weights["wte.weight"].T if config.weight_tying else linear(x, "ff_out")
        result.append(scores / math.sqrt(config.d_model) if config.scale_logits else scores)
    return torch.stack(result)


@torch.no_grad()
def assert_direct(config: ModelConfig, seed: int = 0) -> None:
    model, ids = build(config, seed), tokens(2, 9, seed)
    torch.testing.assert_close(model(ids).double(), direct(model, ids), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("activation", get_args(ActivationType))
@pytest.mark.parametrize("bias", [False, True])
def test_activations_and_biases(activation: ActivationType, bias: bool) -> None:
    assert_direct(tiny_config(activation_type=activation, include_bias=bias, weight_tying=False))


@pytest.mark.parametrize("kind", get_args(LayerNormType))
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("bias", [None, False, True])
def test_norms(kind: LayerNormType, affine: bool, bias: bool | None) -> None:
    config = tiny_config(
        layer_norm_type=kind,
        layer_norm_with_affine=affine,
        bias_for_layer_norm=bias,
        attention_layer_norm=True,
        attention_layer_norm_with_affine=affine,
        layer_norm_eps=1e-2,
    )
    model = OLMo(config)
    assert ("transformer.ln_f.weight" in model.state_dict()) == affine
    assert ("transformer.ln_f.bias" in model.state_dict()) == (affine and bias is True)
    assert_direct(config)


@pytest.mark.parametrize("affine", [False, True])
def test_norms_of_queries_and_keys_have_their_own_key(affine: bool) -> None:
    config = tiny_config(
        attention_layer_norm=True, attention_layer_norm_with_affine=affine, layer_norm_with_affine=not affine
    )
    names = OLMo(config).state_dict().keys()
    for norm in ("q_norm", "k_norm"):
        assert (f"transformer.blocks.0.{norm}.weight" in names) == affine
    for norm in ("blocks.0.attn_norm", "blocks.0.ff_norm", "ln_f"):
        assert (f"transformer.{norm}.weight" in names) != affine


@pytest.mark.parametrize(
    "keys",
    [
        {"rope": False},
        {"rope": False, "embedding_layer_norm": True},
        {"embedding_layer_norm": True, "layer_norm_with_affine": True},
        {"scale_logits": True},
        {"scale_logits": True, "weight_tying": False},
        {"clip_qkv": 0.1, "attention_layer_norm": True},
        {"norm_after": True},
    ],
    ids=str,
)
def test_other_keys(keys: dict[str, Any]) -> None:
    assert_direct(tiny_config(**keys))


@settings(max_examples=40)
@given(
    keys=st.fixed_dictionaries(
        {
            "activation_type": st.sampled_from(get_args(ActivationType)),
            "layer_norm_type": st.sampled_from(get_args(LayerNormType)),
            "n_kv_heads": st.sampled_from([None, 1, 2, 4]),
            "clip_qkv": st.sampled_from([None, 0.3]),
            "rope_theta": st.sampled_from([10, 10000]),
            "bias_for_layer_norm": st.sampled_from([None, False, True]),
            "d_model": st.sampled_from([8, 32]),
            "n_layers": st.integers(1, 3),
            **{
                key: st.booleans()
                for key in (
                    "rope",
                    "include_bias",
                    "layer_norm_with_affine",
                    "attention_layer_norm",
                    "attention_layer_norm_with_affine",
                    "embedding_layer_norm",
                    "weight_tying",
                    "scale_logits",
                    "norm_after",
                )
            },
        }
    ),
    seed=st.integers(0, 1000),
)
def test_any_combination_of_keys(keys: dict[str, Any], seed: int) -> None:
    assert_direct(tiny_config(**keys), seed)


# --- precision ---


def test_low_precision_norm_computes_in_the_type_of_autocast() -> None:
    norm = LayerNorm(tiny_config(layer_norm_type="low_precision"), 32, affine=True)
    with torch.no_grad():
        norm.weight.normal_(generator=torch.Generator().manual_seed(0))
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16):
        narrow = norm(x)
    assert narrow.dtype == torch.bfloat16
    assert torch.equal(narrow, F.layer_norm(x.bfloat16(), (32,), norm.weight.bfloat16(), None, 1e-5))
    wide = norm(x)
    assert wide.dtype == torch.float32
    assert torch.equal(wide, F.layer_norm(x, (32,), norm.weight, None, 1e-5))


def test_rms_norm_computes_in_float32() -> None:
    norm = LayerNorm(tiny_config(layer_norm_type="rms", layer_norm_eps=1e-8), 256, affine=False)
    x = torch.full((1, 256), 1e-4, dtype=torch.float16)  # whose square is 0 in float16
    assert norm(x).dtype == torch.float16
    torch.testing.assert_close(norm(x).float(), torch.full((1, 256), 0.5**0.5), atol=1e-3, rtol=0)


@pytest.mark.parametrize("kind", get_args(LayerNormType))
@pytest.mark.parametrize("norm_after", [False, True])
def test_autocast_runs_and_stays_near(kind: LayerNormType, norm_after: bool) -> None:
    config = tiny_config(
        layer_norm_type=kind,
        norm_after=norm_after,
        layer_norm_with_affine=True,
        attention_layer_norm=True,
        attention_layer_norm_with_affine=True,
        include_bias=True,
    )
    model, ids = build(config), tokens(2, 16)
    exact = model(ids).detach()
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(ids).float()
    rough.logsumexp(-1).sum().backward()
    assert (rough - exact).std() < 0.03 * exact.std()  # bfloat16 holds 8 bits
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_rope_in_full_precision() -> None:
    config = tiny_config()
    table = rotary_table(config, 64, torch.device("cpu"))
    x = torch.randn(2, 4, 64, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = rotate(x.double(), table, full_precision=False)
    full, narrow = rotate(x, table, full_precision=True), rotate(x, table, full_precision=False)
    assert full.dtype == narrow.dtype == torch.bfloat16
    assert torch.equal(full, exact.bfloat16())
    assert (narrow - exact).abs().max() > (full - exact).abs().max()


# --- names and shapes ---


def shapes(model: OLMo) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in model.state_dict().items()}


@pytest.mark.parametrize(
    "keys, count",
    [
        ({"d_model": 2048, "n_layers": 16, "n_heads": 16, "mlp_ratio": 8}, 1_176_764_416),
        (
            {"d_model": 4096, "n_layers": 32, "n_heads": 32, "mlp_hidden_size": 22016, "weight_tying": False},
            6_888_095_744,
        ),
    ],
    ids=["1B", "7B"],
)
def test_official_names_and_shapes(keys: dict[str, Any], count: int) -> None:
    config = ModelConfig(
        **keys,
        rope=True,
        include_bias=False,
        layer_norm_with_affine=False,
        vocab_size=50280,
        embedding_size=50304,
    )
    d, m = config.d_model, config.inner_size
    assert m == {2048: 8192, 4096: 11008}[d]
    expected = {"transformer.wte.weight": (50304, d)}
    for layer in range(config.n_layers):
        expected[f"transformer.blocks.{layer}.att_proj.weight"] = (3 * d, d)
        expected[f"transformer.blocks.{layer}.attn_out.weight"] = (d, d)
        expected[f"transformer.blocks.{layer}.ff_proj.weight"] = (2 * m, d)
        expected[f"transformer.blocks.{layer}.ff_out.weight"] = (d, m)
    if not config.weight_tying:
        expected["transformer.ff_out.weight"] = (50304, d)
    assert OLMo.empty(tiny_config()).transformer["wte"].weight.is_meta  # else the next line takes all memory
    model = OLMo.empty(config)
    assert shapes(model) == expected
    assert sum(p.numel() for p in model.parameters()) == count


def test_names_and_shapes_of_everything_else() -> None:
    config = tiny_config(
        n_kv_heads=2,
        rope=False,
        include_bias=True,
        layer_norm_with_affine=True,
        bias_for_layer_norm=False,
        attention_layer_norm=True,
        attention_layer_norm_with_affine=True,
        embedding_layer_norm=True,
        weight_tying=False,
        activation_type="gelu",
        n_layers=1,
        embedding_size=256,
    )
    block = "transformer.blocks.0."
    assert shapes(OLMo(config)) == {
        "transformer.wte.weight": (256, 32),
        "transformer.wpe.weight": (64, 32),
        "transformer.emb_norm.weight": (32,),
        "transformer.ln_f.weight": (32,),
        "transformer.ff_out.weight": (256, 32),
        "transformer.ff_out.bias": (256,),
        block + "attn_norm.weight": (32,),
        block + "ff_norm.weight": (32,),
        block + "q_norm.weight": (32,),
        block + "k_norm.weight": (16,),
        block + "att_proj.weight": (32 + 2 * 16, 32),
        block + "att_proj.bias": (64,),
        block + "attn_out.weight": (32, 32),
        block + "attn_out.bias": (32,),
        block + "ff_proj.weight": (96, 32),
        block + "ff_proj.bias": (96,),
        block + "ff_out.weight": (32, 96),
        block + "ff_out.bias": (32,),
    }


def test_empty_is_on_meta_and_can_be_filled() -> None:
    config = tiny_config(rope=False, include_bias=True, layer_norm_with_affine=True, weight_tying=False)
    empty = OLMo.empty(config)
    assert {t.device.type for t in [*empty.parameters(), *empty.buffers()]} == {"meta"}
    full = build(config)
    filled = empty.to_empty(device="cpu")
    filled.load_state_dict(full.state_dict())
    assert torch.equal(filled.eval()(tokens(1, 8)), full(tokens(1, 8)))


# --- laws of a causal model ---


@settings(max_examples=25)
@given(
    length=st.integers(2, 20),
    place=st.integers(0, 19),
    other=st.integers(1, 127),
    rope=st.booleans(),
    norm_after=st.booleans(),
    n_kv_heads=st.sampled_from([None, 2]),
)
@torch.no_grad()
def test_no_token_sees_a_later_one(length, place, other, rope, norm_after, n_kv_heads) -> None:
    place %= length
    model = build(tiny_config(rope=rope, norm_after=norm_after, n_kv_heads=n_kv_heads))
    ids = tokens(2, length)
    changed = ids.clone()
    changed[0, place] = (changed[0, place] + other) % 128
    before, after = model(ids), model(changed)
    torch.testing.assert_close(after[0, :place], before[0, :place], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(after[1], before[1], atol=1e-6, rtol=1e-6)  # nor one of another row
    assert ((after[0, place:] - before[0, place:]).abs().amax(-1) > 1e-5).all()
    torch.testing.assert_close(model(ids[:, : place + 1]), before[:, : place + 1], atol=1e-5, rtol=1e-5)


def test_rope_knows_distances_alone() -> None:
    """Scores of rotated queries and keys do not change when both move by the same number of places."""
    table = rotary_table(tiny_config(), 40, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, 1, 8, generator=generator).expand(1, 1, 40, 8) for _ in range(2))
    scores = (rotate(q, table, True) @ rotate(k, table, True).mT)[0, 0]
    for distance in range(0, 40, 7):
        diagonal = scores.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-5, rtol=1e-5)
    assert (scores[:, 0] - scores[0, 0]).abs().max() > 0.1


@pytest.mark.parametrize("key", ["attention_dropout", "residual_dropout", "embedding_dropout"])
def test_dropout_only_while_training(key: str) -> None:
    plain, dropping = build(tiny_config()), build(tiny_config(**{key: 0.5}))
    ids = tokens(2, 16)
    assert torch.equal(dropping(ids), plain(ids))
    torch.manual_seed(0)
    first, second = dropping.train()(ids), dropping(ids)
    assert not torch.allclose(first, plain(ids), atol=1e-2)
    assert not torch.allclose(first, second, atol=1e-2)
    assert torch.equal(plain.train()(ids), plain.eval()(ids))


def test_residual_dropout_drops_what_enters_the_residual_stream() -> None:
    """All of it dropped: the embedding alone is left. In the mean nothing changes."""
    model = build(tiny_config(residual_dropout=1.0)).train()
    ids = tokens(2, 8)
    table = model.transformer["wte"].weight
    torch.testing.assert_close(model(ids), F.linear(F.layer_norm(table[ids], (32,)), table))
