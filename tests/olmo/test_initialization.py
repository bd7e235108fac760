"""Initial weights have the deviations of OLMo."""

import math
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import Tensor

from olmo.config import ModelConfig
from olmo.model import OLMo
from olmo.model.initialization import truncated_normal_
from tests.reference import tiny_config


def deviations(config: ModelConfig) -> dict[str, float]:
    """Standard deviation of each parameter before truncation, as OLMo 0.6.0 sets them."""
    d, m, base = config.d_model, config.inner_size, config.init_std
    kind = config.init_fn
    if kind == "normal":
        table = dict.fromkeys(("wte", "wpe", "top", "att_proj", "ff_proj"), base)
    elif kind == "mitchell":
        table = dict.fromkeys(("wte", "wpe", "top", "att_proj", "ff_proj"), d**-0.5)
    elif kind in ("kaiming_normal", "fan_in"):  # as OLMo 0.2 sets them
        gain = {"kaiming_normal": 2, "fan_in": 1}[kind]
        table = dict.fromkeys(("wte", "wpe", "top", "att_proj", "ff_proj"), (gain / d) ** 0.5)
    else:
        table = {"wte": base, "wpe": base, "top": d**-0.5, "att_proj": base, "ff_proj": base}
        if config.scale_emb_init:
            table["wte"] = base * d**0.5
    if config.emb_init_std:
        table["wte"] = config.emb_init_std
    result = {"wte.weight": table["wte"], "wpe.weight": table["wpe"], "ff_out.weight": table["top"]}
    for layer in range(config.n_layers):
        out = {
            "normal": (base, base),
            "mitchell": ((2 * d * (layer + 1)) ** -0.5, (2 * m * (layer + 1)) ** -0.5),
            "full_megatron": (base * (2 * config.n_layers) ** -0.5,) * 2,
            "kaiming_normal": ((2 / d) ** 0.5, (2 / m) ** 0.5),
            "fan_in": (d**-0.5, m**-0.5),
        }[kind]
        result[f"blocks.{layer}.att_proj.weight"] = table["att_proj"]
        result[f"blocks.{layer}.ff_proj.weight"] = table["ff_proj"]
        result[f"blocks.{layer}.attn_out.weight"], result[f"blocks.{layer}.ff_out.weight"] = out
    return result


@pytest.mark.parametrize("cutoff", [None, 1.5])
@pytest.mark.parametrize(
    "keys",
    [
        {"init_fn": "normal", "init_std": 0.05},
        {"init_fn": "normal", "emb_init_std": 0.7, "scale_emb_init": True},
        {"init_fn": "mitchell", "init_std": 9.0},
        {"init_fn": "mitchell", "emb_init_std": 0.7},
        {"init_fn": "full_megatron", "init_std": 0.05},
        {"init_fn": "full_megatron", "scale_emb_init": True},
        {"init_fn": "full_megatron", "scale_emb_init": True, "emb_init_std": 0.7},
        {"init_fn": "kaiming_normal", "init_std": 9.0},
        {"init_fn": "fan_in", "emb_init_std": 0.7},
    ],
    ids=lambda keys: "-".join(str(getattr(v, "value", v)) for v in keys.values()),
)
def test_initialisation(keys: dict[str, Any], cutoff: float | None) -> None:
    config = tiny_config(
        d_model=64,
        n_layers=3,
        mlp_hidden_size=384,
        rope=False,
        weight_tying=False,
        include_bias=True,
        layer_norm_with_affine=True,
        init_cutoff_factor=cutoff,
        **keys,
    )
    torch.manual_seed(0)
    weights = {name.removeprefix("transformer."): t for name, t in OLMo(config).state_dict().items()}
    if config.init_fn in ("kaiming_normal", "fan_in"):
        cutoff = None
    elif cutoff is None and config.init_fn != "normal":
        cutoff = 3.0
    shrink = 1.0
    if cutoff is not None:  # variance of a normal cut at +-c
        density = math.exp(-(cutoff**2) / 2) / math.sqrt(2 * math.pi)
        shrink = math.sqrt(1 - 2 * cutoff * density / math.erf(cutoff / math.sqrt(2)))
    expected = deviations(config)
    assert expected.keys() == {name for name, t in weights.items() if t.ndim == 2}
    for name, deviation in expected.items():
        w = weights[name].double()
        errors = 5 / math.sqrt(w.numel())  # five standard errors of the mean, seven of the deviation
        assert abs(w.mean()) < errors * deviation, name
        assert w.std() == pytest.approx(deviation * shrink, rel=errors), name
        if cutoff is None:
            assert w.abs().max() > 3 * deviation, name
        else:
            assert 0.85 * min(cutoff, 3.2) * deviation < w.abs().max() <= cutoff * deviation * (1 + 1e-6), name
    for name, t in weights.items():
        if t.ndim == 1:
            assert (t == (1.0 if name.endswith("norm.weight") or name == "ln_f.weight" else 0.0)).all(), name


def test_initialisation_follows_the_seed() -> None:
    def first(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return torch.cat([p.flatten() for p in OLMo(tiny_config()).parameters()])

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))


@pytest.mark.skipif(Version(torch.__version__) < Version("2.13"), reason="draws other numbers for a seed")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cutoff", [3.0, 1.5, 0.5, 0.3])
def test_truncated_normals_are_those_of_torch(cutoff: float, dtype: torch.dtype) -> None:
    ours, theirs = torch.empty(50, 101, dtype=dtype), torch.empty(50, 101, dtype=dtype)
    torch.manual_seed(7)
    truncated_normal_(ours, 0.02, cutoff)
    torch.manual_seed(7)
    torch.nn.init.trunc_normal_(theirs, std=0.02, a=-cutoff * 0.02, b=cutoff * 0.02)
    assert torch.equal(ours, theirs)


def test_truncated_normals_of_a_seed_are_those_of_every_release() -> None:
    """The sum that PyTorch 2.13 and 2.15 give; 2.11 gives another."""
    weight = torch.empty(1000)
    torch.manual_seed(0)
    truncated_normal_(weight, 0.02, 3.0)
    assert weight.double().sum().item() == pytest.approx(0.2559131, abs=1e-6)
