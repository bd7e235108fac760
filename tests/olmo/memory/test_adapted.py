"""PEFT's adapters: the coefficients are those of the merged model, and edits multiply what the adapters add too.

The reference is `merge_and_unload`, PEFT's own product of the weights, in a bare model. All in float64.
"""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from packaging.version import Version
from peft import IA3Config, LoHaConfig, LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.integrations.peft import MIN_PEFT_VERSION

from olmo.memory import observe
from olmo.memory.locate import describe
from olmo.memory.rescaling import rescale_model
from tests.architectures import built, observed

# Second projections of the families below; first ones have all other names.
DOWN = ["down_proj", "dense_4h_to_h", "mlp.c_proj"]
FIRST = ["gate_proj", "up_proj", "gate_up_proj", "dense_h_to_4h", "c_fc"]
ROUNDING = {"rtol": 1e-6, "atol": 1e-9}  # means are float32


def based(name: str) -> Any:
    model: Any = built(name).double()
    if name == "Qwen2-MoE":
        model.set_experts_implementation("eager")  # the others know no float64
    return model


def adapted(model: nn.Module, config: Any, name: str = "default") -> Any:
    """A model with adapters of random weights, in evaluation mode."""
    config.target_modules = [
        one for one in config.target_modules if any(n.endswith(one) for n, _ in model.named_modules())
    ]
    if isinstance(config, IA3Config):
        config.feedforward_modules = [one for one in config.target_modules if one in DOWN]
    return randomized(get_peft_model(model, config, name))


def randomized(model: Any) -> Any:
    generator = torch.Generator().manual_seed(3)
    for layer in model.modules():
        names = (*layer.adapter_layer_names, "modules_to_save") if isinstance(layer, BaseTunerLayer) else ()
        for parameter in (p for name in names if hasattr(layer, name) for p in getattr(layer, name).parameters()):
            parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.double().eval()


CONFIGS = {
    "LoRA on attention": LoraConfig(r=3, target_modules=["q_proj", "qkv_proj", "query_key_value", "c_attn"]),
    "LoRA": LoraConfig(r=3, target_modules=[*FIRST, *DOWN]),
    "DoRA": LoraConfig(r=3, target_modules=[*FIRST, *DOWN], use_dora=True),
    "IA3": IA3Config(target_modules=[*FIRST, *DOWN]),
    "LoHa": LoHaConfig(r=3, target_modules=[*FIRST, *DOWN]),
}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(("Llama", kind) for kind in CONFIGS),
        *((name, kind) for name in ("Pythia", "GPT-2", "Phi-3") for kind in ("LoRA", "IA3")),
        ("GPT-2", "DoRA"),
        ("Qwen2-MoE", "LoRA"),
    ],
)
def test_adapters_are_measured_as_if_merged(name: str, kind: str) -> None:
    """IA3 multiplies the input of the down projection inside of the adapted one: in the merged model it is the memory
    vectors that are longer, and the coefficient, what the layer computes from K, is the same."""
    bare = based(name)
    model = adapted(based(name), copy.deepcopy(CONFIGS[kind]))
    merged = copy.deepcopy(model).merge_and_unload()
    assert describe(model) == describe(bare)
    for variant in ("abs", "relu") if name != "Pythia" else ("abs",):
        found = observed(model, variant, 3)
        assert not torch.allclose(found, observed(bare, variant, 3), rtol=1e-3)
        torch.testing.assert_close(found, observed(merged, variant, 3), **ROUNDING)
    with model.disable_adapter():
        assert torch.equal(observed(model, "abs", 3), observed(bare, "abs", 3))


def test_of_several_adapters_the_active_one_is_measured() -> None:
    model = adapted(built("Llama"), LoraConfig(r=3, target_modules=["q_proj", "up_proj"]))
    model.add_adapter("second", LoraConfig(r=2, target_modules=["up_proj"], modules_to_save=["down_proj", "lm_head"]))
    found = {}
    for name in ("default", "second"):
        model.set_adapter(name)
        randomized(model)
        merged = copy.deepcopy(model).merge_and_unload()
        found[name] = observed(model, "abs", 3)
        torch.testing.assert_close(found[name], observed(merged, "abs", 3), **ROUNDING)
    assert not torch.allclose(found["default"], found["second"], rtol=1e-3)
    model.base_model.set_adapter(["default", "second"])
    both = observed(model, "abs", 3)
    assert not any(torch.allclose(both, one, rtol=1e-3) for one in found.values())
    merged = copy.deepcopy(model).merge_and_unload(adapter_names=["default", "second"])
    torch.testing.assert_close(both, observed(merged, "abs", 3), **ROUNDING)


@pytest.mark.skipif(
    Version(peft.__version__) < Version(MIN_PEFT_VERSION),
    reason=f"this transformers adds adapters only with peft {MIN_PEFT_VERSION}",
)
def test_adapters_that_transformers_adds_itself() -> None:
    model = built("Llama")
    model.add_adapter(LoraConfig(r=3, target_modules=["up_proj"]))
    assert observed(randomized(model), "abs", 3).shape == observed(built("Llama"), "abs", 3).shape
    assert not torch.allclose(observed(model, "abs", 3), observed(built("Llama"), "abs", 3), rtol=1e-3)


def test_adapters_of_fused_experts_are_refused() -> None:
    model = built("OLMoE")
    config = LoraConfig(r=2, target_modules=[], target_parameters=["mlp.experts.gate_up_proj"])
    with pytest.raises(ValueError, match=r"model\.layers\.0: cannot tell what mlp\.experts .*merge_and_unload"):
        describe(get_peft_model(model, config))


# --- edits -------------------------------------------------------------------------------------------------------


def factors(name: str) -> dict[int, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        layer: 0.5 + torch.rand(means.shape[-1], generator=generator) for layer, means in enumerate(built_means(name))
    }


def built_means(name: str) -> list[Tensor]:
    return [*observed(built(name), "abs", 3).unbind(1)]


@pytest.mark.parametrize("name", ["Llama", "GPT-2", "Phi-3"])
@pytest.mark.parametrize("kind", ["LoRA on attention", "LoRA", "IA3"])
def test_an_edit_is_that_of_the_merged_model(name: str, kind: str) -> None:
    config = copy.deepcopy(CONFIGS[kind])
    model = adapted(built(name), config)
    merged = copy.deepcopy(model).merge_and_unload()
    before, multipliers = observed(model, "abs", 3), factors(name)
    rescale_model(model, multipliers)
    rescale_model(merged, multipliers)
    after = observed(model, "abs", 3)
    torch.testing.assert_close(after, observed(merged, "abs", 3), **ROUNDING)
    if name != "GPT-2":  # the first layer of a gated one scales exactly
        torch.testing.assert_close(after[:, 0], before[:, 0] * multipliers[0], **ROUNDING)
    merged_later = model.merge_and_unload()
    torch.testing.assert_close(observed(merged_later, "abs", 3), after, **ROUNDING)


def test_an_edit_multiplies_the_adapters_that_are_not_active_and_their_biases_too() -> None:
    model = adapted(built("GPT-2"), LoraConfig(r=3, target_modules=["c_fc"], lora_bias=True))
    model.add_adapter("second", LoraConfig(r=2, target_modules=["c_fc"]))
    randomized(model)
    wanted = []
    for name in ("default", "second"):
        model.set_adapter(name)
        merged = copy.deepcopy(model).merge_and_unload()
        rescale_model(merged, factors("GPT-2"))
        wanted.append(observed(merged, "abs", 3))
    rescale_model(model, factors("GPT-2"))
    for name, means in zip(("default", "second"), wanted):
        model.set_adapter(name)
        torch.testing.assert_close(observed(model, "abs", 3), means, **ROUNDING)


@pytest.mark.parametrize("kind", ["DoRA", "LoHa"])
def test_an_edit_behind_other_adapters_is_refused(kind: str) -> None:
    model = adapted(built("Llama"), copy.deepcopy(CONFIGS[kind]))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(
        ValueError,
        match=r"^model\.layers\.0\.mlp\.down_proj: .* wrapped in peft's .*merge_and_unload",
    ):
        rescale_model(model, factors("Llama"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_hooks_of_adapted_models_are_removed() -> None:
    model = adapted(built("Llama"), copy.deepcopy(CONFIGS["LoRA"]))
    with observe(model, "relu"):
        pass
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
