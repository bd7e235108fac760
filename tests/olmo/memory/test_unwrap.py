"""Models in wrappers of other programs: the one that computes is measured, or one line names the wrapper."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from olmo.config import TrainConfig
from olmo.memory import observe
from olmo.memory.locate import describe, find_layers
from olmo.memory.unwrap import unwrapped
from olmo.model import OLMo
from olmo.model.causal_lm import CausalLM
from olmo.train.loss import Objective
from tests.architectures import built, observed
from tests.reference import tiny_config


def stack_of(model: Any) -> nn.ModuleList:
    return next(module for module in model.modules() if isinstance(module, nn.ModuleList))


def compiled(model: Any) -> Any:
    return torch.compile(model)


def compiled_in_place(model: Any) -> Any:
    model.compile()
    return model


def compiled_parts(model: Any) -> Any:
    """A layer, another in place, and everything below the head."""
    stack = stack_of(model)
    stack[0] = torch.compile(stack[0])
    stack[1].compile()
    setattr(model, model.base_model_prefix, torch.compile(model.base_model))
    return model


def recomputed(model: Any) -> Any:
    stack = stack_of(model)
    stack[1] = checkpoint_wrapper(stack[1])
    return model


def trained(model: Any) -> Any:
    return CausalLM(model, tiny_config(), [*stack_of(model)])


WRAPPERS = [compiled, compiled_in_place, compiled_parts, recomputed, trained]


@pytest.mark.parametrize("name", ["Llama", "Pythia", "Qwen2-MoE"])
@pytest.mark.parametrize("wrap", WRAPPERS)
def test_what_is_wrapped_is_measured_as_if_bare(name: str, wrap: Callable[[Any], Any]) -> None:
    variants = ("abs",) if name == "Pythia" else ("abs", "relu")
    bare, wrapped = built(name), wrap(built(name))
    assert describe(wrapped) == describe(bare)
    for variant in variants:
        assert torch.equal(observed(wrapped, variant, 3), observed(bare, variant, 3))
    assert [layer.name for layer in find_layers(wrapped)] == [layer.name for layer in find_layers(bare)]


def test_what_was_compiled_runs_compiled_again_after_a_measurement() -> None:
    calls: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        calls.append(1)
        return graph.forward

    model = torch.compile(nn.Linear(2, 2), backend=backend)
    compiled_llama = built("Llama")
    compiled_llama.compile(backend=backend)
    observed(compiled_llama, "abs", 3)
    assert not calls
    model(torch.ones(1, 2))
    assert calls


def test_our_own_wrappers() -> None:
    ours = OLMo(tiny_config())
    objective = Objective(ours, TrainConfig(model=tiny_config()))
    for wrapped in (objective, torch.compile(objective), nn.DataParallel(objective), torch.compile(ours)):
        assert unwrapped(wrapped) is ours
    assert torch.equal(observed(torch.compile(objective), "abs", 3), observed(ours, "abs", 3))
    llama = built("Llama")
    assert unwrapped(Objective(trained(llama), TrainConfig(model=tiny_config()))) is llama


def refusal(model: Any, coefficient: str = "abs") -> str:
    with pytest.raises(ValueError) as caught, observe(model, coefficient):
        pass
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kind", [PrefixTuningConfig, PromptTuningConfig])
def test_virtual_tokens_are_refused(kind: Any) -> None:
    model = get_peft_model(built("Llama"), kind(task_type="CAUSAL_LM", num_virtual_tokens=2))
    assert "adds virtual tokens, which are no tokens of an instance; measure the model without" in refusal(model)
    assert torch.equal(observed(model.get_base_model(), "abs", 3), observed(built("Llama"), "abs", 3))


def test_a_tuner_that_does_more_than_its_layers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = get_peft_model(built("Llama"), LoraConfig(target_modules=["q_proj"]))
    monkeypatch.setattr(model.peft_config["default"], "alora_invocation_tokens", [3])
    assert "an activated LoRA adapts only some tokens" in refusal(model)
    monkeypatch.undo()
    monkeypatch.setattr(type(model.base_model), "forward", lambda *_: None)  # as X-LoRA and Poly have
    assert refusal(model).startswith("PeftModel: LoraModel does more than its layers compute")


def test_what_is_no_model_is_refused() -> None:
    assert refusal("allenai/OLMo-1B") == ("str: no model; pass a torch.nn.Module, such as a model of transformers")
    model = nn.Module()
    model.add_module("policy", built("Llama"))
    assert refusal(model) == ("Module: an unknown wrapper, which may change what its .policy computes; pass that")
    assert refusal(nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(2, 3)])})) == (
        "ModuleDict: no model of transformers, whose base_model and get_input_embeddings it lacks"
    )


def test_weights_that_deepspeed_has_sharded_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class DeepSpeedEngine(nn.Module):
        def __init__(self, module: nn.Module):
            super().__init__()
            self.module = module

    library = ModuleType("deepspeed")
    vars(library)["DeepSpeedEngine"] = DeepSpeedEngine
    monkeypatch.setitem(sys.modules, "deepspeed", library)
    model = built("Llama")
    assert unwrapped(DeepSpeedEngine(model)) is model
    vars(next(model.parameters()))["ds_shape"] = (1,)
    assert refusal(DeepSpeedEngine(model)) == (
        "LlamaForCausalLM: DeepSpeed's ZeRO-3 has sharded its weights; measure a saved checkpoint instead"
    )


def test_a_hooked_transformer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of TransformerLens before 4.0; later versions have the bridge (tests/interop)."""
    library = ModuleType("transformer_lens")
    vars(library)["HookedTransformer"] = SimpleNamespace
    monkeypatch.setitem(sys.modules, "transformer_lens", library)
    assert refusal(SimpleNamespace()).endswith("or a TransformerBridge (TransformerBridge.boot_transformers)")


def test_weights_that_accelerate_offloads() -> None:
    """They are on the meta device but during a pass through their module."""
    from accelerate import cpu_offload

    for name in ("Llama", "OLMoE", "Qwen2-MoE"):
        bare, offloaded = built(name), cpu_offload(built(name), torch.device("cpu"))
        assert next(offloaded.parameters()).is_meta
        assert describe(offloaded) == describe(bare)
        for variant in ("abs", "relu"):
            assert torch.equal(observed(offloaded, variant, 3), observed(bare, variant, 3))
