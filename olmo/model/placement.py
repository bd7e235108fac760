"""Models that are spread over several devices, with parts in CPU memory or on disk, by accelerate's hooks.

A device map names a place for every module: a device, "cpu" or "disk". Where some module is on an accelerator, those on
"cpu" and "disk" are offloaded: their weights are copied to the first accelerator of the map whenever they compute.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ..exceptions import ConfigurationError, needs
from ..files.tensors import LazyTensors

DeviceMap: TypeAlias = dict[str, Any]  # the name of a module -> an index of a GPU, a device, "cpu" or "disk"
_FREE = 0.9  # of each device's free memory is for weights; the rest is for activations


def needs_accelerate() -> Any:
    """accelerate. Raises MissingPackage where it is not installed."""
    return needs("accelerate", "big", "--device_map")


def device_of(module: nn.Module) -> torch.device:
    """The device on which a module computes: that of its weights, or the one to which they are copied."""
    device = next(module.parameters()).device
    for part in module.modules() if device.type == "meta" else ():
        if (found := getattr(getattr(part, "_hf_hook", None), "execution_device", None)) is not None:
            return _as_device(found)
    return device


@contextmanager
def on_device(module: nn.Module) -> Iterator[None]:
    """The weights that a module itself has are on its device within, also offloaded ones."""
    hook = getattr(module, "_hf_hook", None)
    if hook is None or not getattr(hook, "offload", False):
        yield
        return
    hook.pre_forward(module)
    try:
        yield
    finally:
        hook.post_forward(module, None)


def weights_of(model: nn.Module) -> LazyTensors:
    """The state dict of a model, which has its offloaded weights too, each read at its access."""
    state = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    hooks: dict[str, Any] = {name: getattr(part, "_hf_hook", None) for name, part in model.named_modules()}

    def read(name: str) -> Tensor:
        steps = name.split(".") if state[name].is_meta else ()
        for end in range(len(steps) - 1, -1, -1):
            hook = hooks.get(".".join(steps[:end]))
            if hook is not None and getattr(hook, "offload", False):
                value: Tensor = hook.weights_map[".".join(steps[end:])]
                return value.to(state[name].dtype)
        return state[name]

    return LazyTensors(state, read)


def input_device(model: nn.Module) -> torch.device:
    """Where a model takes its tokens."""
    embedding = next((module for module in model.modules() if isinstance(module, nn.Embedding)), None)
    return device_of(embedding or model)


def to_one(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors on the device of the first one."""
    return [tensor.to(tensors[0].device) for tensor in tensors]


def copied(modules: tuple[nn.Module, ...]) -> tuple[nn.Module, ...]:
    """copy.deepcopy of a module and modules in it, without hooks, whose offloaded weights would be copied too."""
    hooks = [hook for part in modules[0].modules() if (hook := getattr(part, "_hf_hook", None)) is not None]
    copies = copy.deepcopy(modules, {id(hook): None for hook in hooks})
    for part in copies[0].modules() if hooks else ():
        if "_hf_hook" in vars(part):
            del part._hf_hook
            part.forward = vars(part).pop("_old_forward")
    return copies


def placed(model: nn.Module) -> dict[str, str] | None:
    """Where the modules of a model are that was opened with a device map, by name; None for another."""
    device_map: DeviceMap | None = getattr(model, "hf_device_map", None)
    return None if device_map is None else {name: _name(place) for name, place in device_map.items()}


def _name(place: Any) -> str:
    return str(place) if place in _OFFLOADED else str(_as_device(place))


_OFFLOADED = ("cpu", "disk")


def _as_device(place: Any) -> torch.device:
    if isinstance(place, int):
        kind = torch.accelerator.current_accelerator()
        return torch.device("cuda" if kind is None else kind.type, place)
    return torch.device(place)


def device_map_for(
    model: nn.Module, wanted: str | Mapping[str, Any], whole: Collection[type[nn.Module]], dtype: torch.dtype
) -> DeviceMap:
    """The places of the modules of a model on the meta device, whose weights will be `dtype`.

    wanted: "auto", the free memory of all accelerators evenly, then the CPU's, then the disk; or the map itself.
    whole: classes of modules that are not split.
    Raises ConfigurationError for a map that does not fit the model or this machine.
    """
    accelerate = needs_accelerate()
    if not isinstance(wanted, str):
        return _checked(model, wanted)
    if wanted != "auto":
        raise ConfigurationError(f"--device_map {wanted}: expected auto, or a JSON file of modules and their devices")
    names = [kind.__name__ for kind in whole]
    free = {place: int(_FREE * size) for place, size in accelerate.utils.get_max_memory().items()}
    balanced = accelerate.utils.get_balanced_memory(model, free, no_split_module_classes=names, dtype=dtype)
    found: DeviceMap = accelerate.infer_auto_device_map(model, balanced, no_split_module_classes=names, dtype=dtype)
    return found


def _checked(model: nn.Module, wanted: Mapping[str, Any]) -> DeviceMap:
    modules = {name for name, _ in model.named_modules()}
    if unknown := [name for name in wanted if name not in modules]:
        raise ConfigurationError(f"--device_map: {type(model).__name__} has no module {unknown[0]!r}")
    for name, place in wanted.items():
        if place in _OFFLOADED and isinstance(place, str):
            continue
        try:
            torch.empty(0, device=_as_device(place))
        except (RuntimeError, AssertionError, TypeError) as error:  # torch without CUDA asserts
            reason = next(iter(str(error).splitlines()), "")
            raise ConfigurationError(
                f"--device_map: {name!r} is on {place!r}, no device of this machine: {reason}"
            ) from error
    for name, _ in (*model.named_parameters(), *model.named_buffers()):
        if place_of(name, wanted) is None:
            raise ConfigurationError(f"--device_map: has no device for {name}; name it, or '' for the rest")
    return dict(_apart(model, "", wanted))


def _apart(module: nn.Module, name: str, wanted: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The outermost modules all of whose tensors have one place, with that place: accelerate wants none in another."""
    tensors = [*module.named_parameters(name), *module.named_buffers(name)]
    places = [place_of(tensor, wanted) for tensor, _ in tensors]
    if places and all(place == places[0] for place in places):
        yield name, places[0]
    elif places:
        for child, part in module.named_children():
            yield from _apart(part, f"{name}.{child}" if name else child, wanted)
        for own, _ in (*module.named_parameters(name, recurse=False), *module.named_buffers(name, recurse=False)):
            yield own, place_of(own, wanted)


def place_of(name: str, device_map: Mapping[str, Any]) -> Any:
    """The place of a tensor or module: that of the innermost module of the map that holds it; None without one."""
    steps = name.split(".")
    within = (".".join(steps[:end]) for end in range(len(steps), -1, -1))
    return next((device_map[module] for module in within if module in device_map), None)


def main_device(device_map: Mapping[str, Any]) -> torch.device:
    """The device that computes what is offloaded: the first accelerator of a map, or the CPU."""
    return next((_as_device(place) for place in device_map.values() if place not in _OFFLOADED), torch.device("cpu"))


def resident(place: Any, main: torch.device) -> torch.device | None:
    """The device on which weights in a place stay, None where they are offloaded; `main` computes these."""
    if place == "disk" or (place == "cpu" and main.type != "cpu"):
        return None
    return _as_device(place)


def offload(block: nn.Module, device: torch.device, weights: Mapping[str, Tensor]) -> None:
    """Keep a module, whose weights are on the meta device, without them: they are copied from `weights`, by their names
    in it, to the device whenever it computes."""
    hooks = needs_accelerate().hooks
    hook = hooks.AlignDevicesHook(device, offload=True, weights_map=weights, place_submodules=True)
    hooks.add_hook_to_module(block, hook)


def follow(module: nn.Module) -> None:
    """Make a module take its inputs to the device of its weights."""
    hooks = needs_accelerate().hooks
    hooks.add_hook_to_module(module, hooks.AlignDevicesHook(next(module.parameters()).device))
