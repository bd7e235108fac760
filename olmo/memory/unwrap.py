"""The model that computes, in what other programs put around it: torch.compile, DDP, FSDP, accelerate, PEFT, DeepSpeed,
nnsight, TransformerLens, and our own training.

A wrapper whose forward pass does no more than call the model is taken off; one that changes what the model computes is
refused. No library is imported for it: a model can only be an instance of a class whose library its program imported.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn

from ..model.causal_lm import CausalLM
from ..model.olmo import OLMo
from ..model.placement import on_device
from .maps import is_map

_FSDP = "torch.distributed.fsdp"
# Where torch's wrappers hold the module that they call, which may be any part of a model.
_WITHIN = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def unwrapped(model: Any) -> nn.Module:
    """The model of transformers' or of ours in its wrappers; a bare model is returned as it is.

    Adapters in the layers of a PEFT model are not taken off: they are parts of what it computes. FSDP is left on, whose
    forward pass gathers the weights. Raises ValueError, naming wrapper and remedy, for a wrapper that changes what the
    model computes, and for a model without its weights.
    """
    outside, inside = None, model
    while inside is not outside:
        outside, inside = inside, _taken_off(inside)
    if not isinstance(inside, nn.Module):
        raise ValueError(f"{type(model).__name__}: no model; pass a torch.nn.Module, such as a model of transformers")
    if not isinstance(inside, OLMo) and not hasattr(inside, "base_model"):
        held = (name for name, module in inside.named_modules() if isinstance(module, OLMo) or _is_language(module))
        if name := next(held, None):
            raise ValueError(
                f"{type(inside).__name__}: an unknown wrapper, which may change what its .{name} computes; pass that"
            )
    if hasattr(next(inside.parameters(), None), "ds_shape"):
        raise ValueError(
            f"{type(inside).__name__}: DeepSpeed's ZeRO-3 has sharded its weights; measure a saved checkpoint instead"
        )
    return inside


def _taken_off(model: Any) -> Any:
    """What a wrapper holds; anything else itself."""
    if _is_a(model, "torch._dynamo", "OptimizedModule"):
        return model._orig_mod
    if _is_a(model, "torch.nn.parallel", "DistributedDataParallel", "DataParallel"):
        return model.module
    if _is_a(model, "deepspeed", "DeepSpeedEngine"):
        return model.module
    if isinstance(model, CausalLM):
        return model.network
    if isinstance(getattr(model, "model", None), OLMo | CausalLM):
        return model.model  # the objective of our own training
    if _is_a(model, "peft", "PeftModel", "PeftMixedModel"):
        return _of_peft(model)
    if _is_a(model, "nnsight", "Envoy"):
        if any(parameter.is_meta for parameter in model._module.parameters()):
            raise ValueError(f"{type(model).__name__}: its weights are not loaded; create it with dispatch=True")
        return model._module
    if _is_a(model, "transformer_lens.model_bridge", "TransformerBridge"):
        return model.original_model
    if _is_a(model, "transformer_lens", "HookedTransformer"):
        raise ValueError(
            "HookedTransformer: holds weights in a layout of its own; measure the transformers model that it was made "
            "from, or a TransformerBridge (TransformerBridge.boot_transformers)"
        )
    return model


def _is_a(model: Any, library: str, *names: str) -> bool:
    """Whether an object is an instance of a class of a library that has been imported."""
    module = vars(sys.modules[library]) if sys.modules.get(library) else {}
    return any(isinstance(kind := module.get(name), type) and isinstance(model, kind) for name in names)


def _is_language(module: nn.Module) -> bool:
    return hasattr(module, "base_model") and hasattr(module, "get_input_embeddings")


def _of_peft(model: Any) -> Any:
    """The model whose layers hold the adapters of a PEFT model."""
    name, tuner = type(model).__name__, model.base_model
    active = {model.active_adapter} if isinstance(model.active_adapter, str) else {*model.active_adapter}
    for config in (model.peft_config[adapter] for adapter in active):
        kind = getattr(config.peft_type, "value", config.peft_type)
        if config.is_prompt_learning:
            raise ValueError(
                f"{name}: {kind} adds virtual tokens, which are no tokens of an instance; measure the model without "
                "them, model.get_base_model()"
            )
        if getattr(config, "alora_invocation_tokens", None):
            raise ValueError(f"{name}: an activated LoRA adapts only some tokens, which cannot be measured")
    # AdaLoRA's adds a loss to that of labels.
    if "forward" in vars(type(tuner)) and type(tuner).__name__ not in ("BaseTuner", "AdaLoraModel"):
        raise ValueError(
            f"{name}: {type(tuner).__name__} does more than its layers compute, which cannot be measured; merge the "
            "adapter first, if it can be: model.merge_and_unload()"
        )
    return tuner.model


def kind_of(model: nn.Module) -> str:
    """The name of a model's class, without those that FSDP adds."""
    kinds = (kind for kind in type(computing(model)).__mro__ if kind.__name__ == "FSDPModule")
    sharding = next(kinds, type(None))
    return next(kind.__name__ for kind in type(computing(model)).__mro__ if not issubclass(kind, sharding))


def computing(module: nn.Module) -> nn.Module:
    """A part of a model without torch's wrappers around it."""
    held = vars(module)["_modules"]
    inner = next((held[name] for name in _WITHIN if name in held), None)
    return module if inner is None else computing(inner)


def plain_name(name: str) -> str:
    """The name of a module without the steps that torch's wrappers add, through which it is found too."""
    return ".".join(step for step in name.split(".") if step not in _WITHIN)


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP has sharded the weights, so that only a pass through the model as a whole has them. Raises
    ValueError for weights that are distributed in another way."""
    sharded = False
    for module in model.modules():
        sharded = sharded or _is_a(module, _FSDP, "FSDPModule")
        if _is_a(module, _FSDP, "FullyShardedDataParallel"):
            sharded, flat = True, cast(Any, module)._flat_param
            for info, shape in () if flat is None else zip(flat._param_infos, flat._shapes):
                if len(shape) > 1 and not (is_map(info.module) or isinstance(info.module, nn.Embedding)):
                    raise ValueError(
                        f"{info.module_name}.{info.param_name}: FullyShardedDataParallel has flattened it; shard the "
                        "model with fully_shard, or measure a saved checkpoint instead"
                    )
    if not sharded and any(_is_a(parameter, "torch.distributed.tensor", "DTensor") for parameter in model.parameters()):
        raise ValueError(f"{type(model).__name__}: its layers are split (tensor parallelism), which cannot be measured")
    return sharded


@contextmanager
def loaded(module: nn.Module) -> Iterator[None]:
    """The weights of a module, which accelerate may load for its own forward pass only, are there within. Raises
    ValueError if they are nowhere."""
    with on_device(module):
        if any(parameter.is_meta for parameter in module.parameters()):
            raise ValueError(f"{type(module).__name__}: its weights are not loaded")
        yield


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Nothing that torch.compile made of a model runs within: hooks on its parts would have no effect."""
    compiled = any(
        _is_a(module, "torch._dynamo", "OptimizedModule") or module._compiled_call_impl is not None
        for module in model.modules()
    )
    if not compiled:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
