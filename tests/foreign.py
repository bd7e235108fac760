"""A device like Apple's MPS, of tensors that lie on the CPU behind another name.

It shows what code takes for granted of a device that is neither CPU nor CUDA: float64 is an error, as on MPS, and so is
an operation on tensors of two devices; `OPERATIONS` gathers what ran. It shows nothing of the kernels of MPS. Torch
learns its name once and for good, so work with it belongs in a process of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

NAME = "foreign"
OPERATIONS: set[str] = set()  # as native_functions.yaml names them
_LIBRARY = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")  # of autocast there is the name
BETWEEN = ("_to_copy", "copy_", "index.Tensor", "index_put_")  # take tensors of the host as well


def _register() -> None:
    """Make torch know the device, of which there is one."""

    class Backend(backend_registration._DummyBackendModule):
        def get_amp_supported_dtype(self) -> list[torch.dtype]:
            return [torch.bfloat16]

    backend_registration._setup_privateuseone_for_python_backend(NAME, Backend())
    _LIBRARY.fallback(torch.library.fallthrough_kernel)


class Foreign(torch.Tensor):
    """A tensor of the device; `held` lies on the CPU."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> Foreign:
        if held.dtype == torch.float64:
            raise TypeError("the device has no float64")
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, held.stride(), held.storage_offset(), dtype=held.dtype, device=torch.device(NAME, 0)
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(operation, args, kwargs or {})


class _Dispatched(TorchDispatchMode):
    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(operation, args, kwargs or {})


class _Called(TorchFunctionMode):
    """What asks nobody in C++: to make a tensor of numbers, and numbers of a tensor."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.tensor and "device" in kwargs:
            device = kwargs.pop("device")
            return torch.tensor(*args, **kwargs).to(device)
        if function is torch.Tensor.tolist and isinstance(args[0], Foreign):
            return args[0].held.tolist()
        return function(*args, **kwargs)


@contextmanager
def device() -> Iterator[torch.device]:
    """The device; within `with` tensors can be made on it."""
    _register()
    with _Called(), _Dispatched():
        yield torch.device(NAME, 0)


def _held(value: Any) -> Any:
    if isinstance(value, torch.device) and value.type == NAME:
        return torch.device("cpu")
    return value.held if isinstance(value, Foreign) else value


def _run(operation: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
    foreign = [tensor for tensor in given if isinstance(tensor, Foreign)]
    name = operation.name().removeprefix("aten::")
    there = torch.device(kwargs["device"]).type == NAME if kwargs.get("device") is not None else bool(foreign)
    if there:
        OPERATIONS.add(name)
    if foreign and not name.startswith(BETWEEN):
        hosts = [tensor for tensor in given if not isinstance(tensor, Foreign) and tensor.ndim]
        if hosts:
            raise RuntimeError(f"{name}: expected all tensors to be on the same device")
    result = operation(*tree_map(_held, args), **tree_map(_held, kwargs))
    if not there:
        return result
    same = {id(tensor.held): tensor for tensor in foreign}  # what works in place returns what it was given

    def named(made: Any) -> Any:
        return (same[id(made)] if id(made) in same else Foreign(made)) if isinstance(made, Tensor) else made

    return tree_map(named, result)
