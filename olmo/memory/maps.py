"""The linear maps of a layer: torch's and transformers' own, quantized ones, and those that adapters or hooks wrap.

A quantized map is known by its numbers of inputs and outputs and by packed weights, a wrapped one by the map in it;
what else they hold belongs to them. Of modules that an adapter keeps in two copies, only the one in use is looked at.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


def is_conv1d(module: nn.Module) -> bool:
    """Whether a linear map is transformers' Conv1D, whose rows are its columns."""
    return type(module).__name__ == "Conv1D"


def wrapped_map(module: nn.Module) -> nn.Module:
    """The map that adapters (PEFT) or hooks (TransformerLens) wrap; any other module itself."""
    own = vars(module)["_modules"]
    inner = own.get("base_layer") or own.get("_original_component")
    return module if inner is None else wrapped_map(inner)


def entry(module: nn.Module) -> nn.Module:
    """The module that is called with the input of a map: with TransformerLens a hook, where the weights of the map may
    be used without calling it."""
    return vars(module)["_modules"].get("hook_in") or module


def outlet(module: nn.Module) -> nn.Module:
    """The module that returns the output of a map, as `entry`."""
    return vars(module)["_modules"].get("hook_out") or module


def is_quantized(module: nn.Module) -> bool:
    """Whether a map holds its weights as integers or in 8 bits, such as those of bitsandbytes, GPTQ, AWQ and FP8."""
    tensors = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    return _has_sizes(module) and any(not t.is_floating_point() or t.dtype.itemsize == 1 for t in tensors)


def is_map(module: nn.Module) -> bool:
    """Whether a module is one linear map, adapted or not."""
    inner = wrapped_map(module)
    return isinstance(inner, nn.Linear) or is_conv1d(inner) or is_quantized(inner)


def _has_sizes(module: Any) -> bool:
    return isinstance(getattr(module, "in_features", None), int) and isinstance(
        getattr(module, "out_features", None), int
    )


def sizes(module: nn.Module) -> tuple[int, int]:
    """(inputs, outputs) of a linear map; transformers' Conv1D holds its weight transposed."""
    inner: Any = wrapped_map(module)
    if _has_sizes(inner):
        return inner.in_features, inner.out_features
    rows, columns = inner.weight.shape
    return (rows, columns) if is_conv1d(inner) else (columns, rows)


def modules_of(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """A module and those in it that compute, each once, by their names; none inside of a map that holds others."""
    yield from _modules_of(module, name, set())


def _modules_of(module: nn.Module, name: str, seen: set[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    name, module = _in_use(module, name)
    if module in seen:
        return
    seen.add(module)
    yield name, module
    if not (is_map(module) and (wrapped_map(module) is not module or is_quantized(module))):
        for child_name, child in module.named_children():
            yield from _modules_of(child, f"{name}.{child_name}" if name else child_name, seen)


def _in_use(module: Any, name: str) -> tuple[str, nn.Module]:
    """Of PEFT's modules_to_save, which hold the original and trained copies, the one that a forward pass calls."""
    own = vars(module)["_modules"]
    if not {"original_module", "modules_to_save"} <= own.keys():
        return name, module
    trained = [adapter for adapter in module.active_adapters if adapter in own["modules_to_save"]]
    step = f"modules_to_save.{trained[0]}" if trained and not module.disable_adapters else "original_module"
    return f"{name}.{step}" if name else step, module.get_submodule(step)


def _held_by_fsdp(linear: Any) -> bool:
    """Whether the weight of a map is a part of FSDP's flattened parameter, or a shard of it."""
    return linear._parameters.get("weight") is None or linear.weight.ndim != 2


def matrices_of(layer: nn.Module) -> dict[str, Tensor]:
    """The parameters of a layer with two dimensions or more, by name; for a map whose weights are packed, wrapped or
    sharded, an empty tensor of the shape that its weight stands for, (outputs, inputs)."""
    found: dict[str, Tensor] = {}
    for name, module in modules_of(layer):
        prefix = f"{name}." if name else ""
        inner: Any = wrapped_map(module)
        if is_map(module) and (inner is not module or is_quantized(module) or _held_by_fsdp(inner)):
            found[f"{prefix}weight"] = torch.empty(sizes(module)[::-1], device="meta")
            continue
        for own, parameter in module.named_parameters(recurse=False):
            if parameter.ndim > 1 and all(parameter is not other for other in found.values()):
                found[f"{prefix}{own}"] = parameter
    return found
