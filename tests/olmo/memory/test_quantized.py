"""Quantized models: what they compute is measured, with the sizes that their packed weights stand for."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from olmo.memory.locate import describe, find_memories
from olmo.memory.maps import is_quantized
from olmo.memory.rescaling import rescale_model
from tests.architectures import LAYERS, built, observed, ragged

bitsandbytes: Any = pytest.importorskip("bitsandbytes", reason="bitsandbytes has wheels for Linux and Windows only")
SIZES = {"hidden_size": 64, "intermediate_size": 128}  # four bits come in blocks of 64


def quantized(model: nn.Module, bits: int) -> nn.Module:
    """As transformers quantizes while it loads: all linear maps but the head."""
    model = copy.deepcopy(model)
    head = model.get_output_embeddings()  # type: ignore[operator]
    for name, module in [*model.named_modules()]:
        if isinstance(module, nn.Linear) and module is not head:
            shape = (module.in_features, module.out_features, module.bias is not None)
            if bits == 4:
                new = bitsandbytes.nn.Linear4bit(*shape, compute_dtype=torch.float32, quant_type="nf4")
            else:
                new = bitsandbytes.nn.Linear8bitLt(*shape, has_fp16_weights=False)
            new.load_state_dict(module.state_dict())
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, new.to("cpu"))
    return model.eval()


def dequantized(model: nn.Module, bare: nn.Module) -> nn.Module:
    """A bare model with the numbers that a quantized one, which has made no pass yet, has for its weights."""
    bare = copy.deepcopy(bare)
    for name, module in model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            weight = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        elif isinstance(module, bitsandbytes.nn.Linear8bitLt):
            weight = module.weight.data.float() * module.weight.SCB[:, None] / 127
        else:
            continue
        bare.get_submodule(name).weight.data.copy_(weight)
    return bare


def by_hooks(model: nn.Module) -> Tensor:
    """1/T_n sum_j C[n, j, i] (N, L, M), instance by instance, from hooks at the second projections alone."""
    rows: list[Tensor] = []
    seen: list[Tensor] = []
    downs = [part.down for [part] in find_memories(model)]  # type: ignore[union-attr]
    hooks = [down.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach())) for down in downs]
    for row in ragged():
        seen.clear()
        with torch.no_grad():
            model(row[None])
        rows.append(torch.stack([x.abs().double().reshape(-1, x.shape[-1]).mean(0) for x in seen]))
    for hook in hooks:
        hook.remove()
    return torch.stack(rows)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", ["Llama", "Pythia", "Phi-3", "OPT"])
def test_a_quantized_model_is_measured(name: str, bits: int) -> None:
    sizes = SIZES | ({"ffn_dim": 128, "word_embed_proj_dim": 64} if name == "OPT" else {})
    bare = built(name, **sizes)
    model = quantized(bare, bits)
    plain = dequantized(model, bare)
    assert describe(model) == describe(bare)
    found, wanted = observed(model, "abs", 1).double(), by_hooks(model)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    # bitsandbytes rounds what enters a map, to 8 bits of the largest in a token, or on a CPU to bfloat16.
    reference = observed(plain, "abs", 1).double()
    assert (found - reference).norm() < 0.03 * reference.norm()
    assert (reference - observed(bare, "abs", 1)).norm() > 0.003 * reference.norm()


def test_relu_of_a_quantized_gate() -> None:
    bare = built("Llama", **SIZES)
    model = quantized(bare, 4)
    reference = observed(dequantized(model, bare), "relu", 1)
    found = observed(model, "relu", 1)
    assert (found - reference).norm() < 0.03 * reference.norm()


def test_adapters_of_a_quantized_model() -> None:
    """QLoRA."""
    model = quantized(built("Llama", **SIZES), 4)
    before = observed(model, "abs", 1)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)).eval()
    assert "128 memories (gated)" in describe(adapted)
    after = observed(adapted, "abs", 1)
    torch.testing.assert_close(after.double(), by_hooks(adapted), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(after, before, rtol=1e-2)
    with adapted.disable_adapter():
        assert torch.equal(observed(adapted, "abs", 1), before)


@pytest.mark.parametrize("bits", [4, 8])
def test_an_edit_of_quantized_weights_is_refused(bits: int) -> None:
    with pytest.raises(ValueError) as caught:
        rescale_model(quantized(built("Llama", **SIZES), bits), {layer: torch.ones(128) for layer in range(LAYERS)})
    assert str(caught.value) == (
        "model.layers.0.mlp.down_proj: the up projection of this layer is quantized; edit the model before it is "
        "quantized"
    )


class Packed(nn.Module):
    """A map as GPTQ and AWQ hold it: eight numbers of four bits in an int32, scales, and no `weight`."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scale = float(linear.weight.detach().abs().max()) / 7
        numbers = (linear.weight.detach() / self.scale).round().int() + 8
        shifted = numbers.view(self.out_features, -1, 8) << torch.arange(0, 32, 4, dtype=torch.int32)
        self.register_buffer("qweight", shifted.sum(-1, dtype=torch.int32))
        self.register_buffer("scales", torch.full((1, self.out_features), self.scale))
        self.bias = linear.bias

    @property
    def unpacked(self) -> Tensor:
        numbers = (self.qweight[..., None] >> torch.arange(0, 32, 4, dtype=torch.int32)) & 15  # type: ignore[index]
        return (numbers.view(self.out_features, -1) - 8) * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.unpacked, self.bias)


@pytest.mark.parametrize("name", ["Llama", "Pythia"])
def test_maps_are_told_by_their_sizes_where_weights_are_packed(name: str) -> None:
    model, bare = built(name), built(name)
    for path, module in [*model.named_modules()]:
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings():
            packed = Packed(module)
            assert is_quantized(packed)
            parent, _, own = path.rpartition(".")
            setattr(model.get_submodule(parent), own, packed)
            bare.get_submodule(path).weight.data.copy_(packed.unpacked)
    assert describe(model) == describe(bare)
    for variant in ("abs", "relu") if name == "Llama" else ("abs",):
        torch.testing.assert_close(observed(model, variant, 3), observed(bare, variant, 3))
