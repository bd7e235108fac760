"""Files of `torch.save`, read without torch: it trusts the sizes that a file states, and reports no tensor's name.

A file is a zip archive: `data.pkl` describes the tensors, each storage is a record `data/KEY`. Before torch 1.6 it was
five pickles and the storages behind them. All sizes are compared with the file before memory is allocated for them:
a few bytes can state a pickle or a tensor of terabytes.
"""

from __future__ import annotations

import io
import math
import re
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from .unpickling import PATHS, Refused, unpickle

LARGEST_PICKLE = 2**22  # bytes, of some 40,000 tensors
DTYPES = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
}
_LEGACY_MAGIC, _LEGACY_VERSION = 0x1950A86A20F9469CFC6C, 1001


@dataclass(frozen=True)
class Storage:
    """The numbers of one or several tensors."""

    flat: Tensor  # (n,)


def _check_dtype(dtype: Any) -> None:
    if dtype not in DTYPES.values():
        name = str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else "another type"
        raise Refused(f"numbers of {name} are not read")


def check_plain(tensor: Tensor) -> None:
    """Raise Refused unless a tensor is dense and of ordinary numbers."""
    if type(tensor) is not Tensor or tensor.layout != torch.strided or tensor.is_meta or tensor.is_nested:
        raise Refused("not a dense tensor")
    _check_dtype(tensor.dtype)


# --- what a pickle of torch may call -----------------------------------------------------------------------------


def rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Tensor:
    """A view of a storage, as `torch._utils._rebuild_tensor_v2`. Raises Refused if it has more elements than it."""
    numbers = (offset, *size, *stride)
    if not isinstance(storage, Storage) or len(size) != len(stride) or not all(type(n) is int for n in numbers):
        raise Refused("not a tensor")
    held, count = storage.flat.numel(), math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride))
    if min(numbers) < 0 or count > held or (count and last >= held):
        raise Refused(f"a tensor of {count:,} elements, not all of which are among the {held:,} that are stored")
    return storage.flat.as_strided(tuple(size), tuple(stride), offset)


def _rebuild_typed(
    storage: Any, offset: Any, size: Any, stride: Any, _grad: Any, _hooks: Any, dtype: Any, *_: Any
) -> Any:
    if not isinstance(storage, Storage):
        raise Refused("not a tensor")
    _check_dtype(dtype)
    return rebuild_tensor(Storage(storage.flat.view(dtype)), offset, size, stride)


def _refuse(what: str) -> Callable[..., Any]:
    def refused(*_: Any) -> Any:
        raise Refused(f"{what} tensors are not read")

    return refused


_CALLABLE: dict[str, Any] = {
    **{f"torch.{name}Storage": dtype for name, dtype in DTYPES.items()},
    "torch.storage.UntypedStorage": torch.uint8,
    **{f"torch.{name}Storage": getattr(torch, name.lower()) for name in ("QInt8", "QUInt8", "QInt32")},
    "torch.ComplexFloatStorage": torch.complex64,
    "torch.ComplexDoubleStorage": torch.complex128,
    **{str(dtype): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)},
    "torch._utils._rebuild_tensor": rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_typed,
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    "torch._utils._rebuild_sparse_tensor": _refuse("sparse"),
    "torch._utils._rebuild_qtensor": _refuse("quantized"),
    "torch._utils._rebuild_nested_tensor": _refuse("nested"),
    "torch._utils._rebuild_meta_tensor_no_storage": _refuse("meta"),
    "torch._utils._rebuild_wrapper_subclass": _refuse("subclasses of"),
    "torch._tensor._rebuild_from_type_v2": _refuse("subclasses of"),
    "torch.Size": torch.Size,
    "torch.serialization._get_layout": lambda name: name,
    "torch.device": lambda kind, *_: kind,
    "collections.OrderedDict": OrderedDict,
    "builtins.set": set,
    "__builtin__.set": set,
}


class _NumpyType:
    """A type of numbers; its state, set last, is their byte order."""

    def __init__(self, name: Any, *_: Any):
        if not isinstance(name, str) or not re.fullmatch(r"[<|=]?[biuf][1248]", name):
            raise Refused("arrays of anything but numbers are not read")
        self.dtype = np.dtype(name)

    def __setstate__(self, state: Any) -> None:
        if state[1] == ">":
            raise Refused("arrays of big-endian numbers are not read")


class _Array(np.ndarray[Any, Any]):
    """An array; its state, set last, is all that a pickle states of it."""

    def __setstate__(self, state: Any) -> None:
        version, shape, kind, fortran, content = state
        super().__setstate__((version, shape, kind.dtype, fortran, content))


def _encode(text: str, _: Any) -> bytes:
    """Bytes, as Python writes them into a pickle of protocol 2."""
    return text.encode("latin1")


def training_state() -> dict[str, Any]:
    """Names beside those of tensors in train.pt of OLMo's trainer: the state of numpy's generator, and paths of
    checkpoints on the machine it was written on, whatever system this is."""
    return {
        **{f"numpy.{core}.multiarray._reconstruct": lambda *_: _Array(0) for core in ("core", "_core")},
        "numpy.ndarray": None,  # only ever an argument of _reconstruct
        "numpy.dtype": _NumpyType,
        "_codecs.encode": cache(_encode),  # one text as many bytes objects would fill the memory
        **PATHS,
    }


# --- the file ----------------------------------------------------------------------------------------------------


def read_torch_file(file: BinaryIO, mapped: Path | None = None, more: Mapping[str, Any] | None = None) -> Any:
    """What `torch.save` has written: containers, numbers, strings and dense tensors, plain ones or storages.

    mapped: the path of the file, if the tensors shall be mapped from it; otherwise they have memory of their own.
    more: names that the pickle may call beside those of tensors. Raises ValueError, with the keys of the tensor.
    """
    allowed = {**_CALLABLE, **(more or {})}
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    head = file.read(4)
    file.seek(0)
    if head != b"PK\3\4":
        return _read_legacy(file, size, allowed)
    try:
        with zipfile.ZipFile(file) as archive:
            return _read_zip(file, size, archive, mapped, allowed)
    except (zipfile.BadZipFile, zlib.error, RuntimeError, EOFError, struct.error) as error:
        raise ValueError(f"a damaged zip archive: {error}") from error


def _read_zip(
    file: BinaryIO, size: int, archive: zipfile.ZipFile, mapped: Path | None, allowed: Mapping[str, Any]
) -> Any:
    entries = {entry.filename: entry for entry in archive.infolist()}
    root = next((name[: -len("data.pkl")] for name in entries if re.fullmatch(r"[^/]+/data\.pkl", name)), None)
    if root is None or f"{root}constants.pkl" in entries:
        raise Refused("a zip archive, but not of torch.save")
    if f"{root}byteorder" in entries and archive.open(f"{root}byteorder").read(8) != b"little":
        raise Refused("big-endian numbers are not read")
    pickled = archive.open(f"{root}data.pkl").read(LARGEST_PICKLE + 1)  # never more, whatever the archive states
    if len(pickled) > LARGEST_PICKLE:
        raise Refused(f"data.pkl, which describes the tensors, has more than {LARGEST_PICKLE:,} bytes")
    whole = torch.UntypedStorage.from_file(str(mapped), False, size) if mapped else None

    def read(key: str | int, length: int) -> Tensor:
        if (entry := entries.get(f"{root}data/{key}")) is None:
            raise Refused("its numbers are not in the file")
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            raise Refused("its numbers are compressed, which torch.save never does")
        file.seek(entry.header_offset)
        start = entry.header_offset + 30 + sum(struct.unpack("<HH", file.read(30)[26:]))
        if length != entry.file_size or start + length > size:
            raise Refused(f"{length:,} bytes of numbers, of which the file has {entry.file_size:,}")
        return _flat(file, start, length, whole)

    return unpickle(io.BytesIO(pickled), allowed, _Storages(size, read).get)


class _Storages:
    """The storages that a pickle names; `read` gives the bytes of one by its key and length. Together they have at most
    the bytes of the file, of `size`."""

    def __init__(self, size: int, read: Callable[[str | int, int], Tensor]):
        self.size, self.read = size, read
        self.left, self.found = size, dict[str | int, Storage]()

    def get(self, pid: Any) -> Storage:
        """The storage of a persistent id. Raises Refused."""
        parts: Sequence[Any] = pid if isinstance(pid, tuple) and len(pid) > 4 else [None] * 5
        kind, dtype, key, _, count, *view = parts
        if kind != "storage" or not isinstance(key, (str, int)) or type(count) is not int or count < 0 or any(view):
            raise Refused("not a tensor")
        _check_dtype(dtype)
        if key not in self.found:
            flat = self.read(key, count * dtype.itemsize)
            self.left -= flat.numel()
            if self.left < 0:
                raise Refused(f"more numbers than the file has, of {self.size:,} bytes")
            self.found[key] = Storage(flat.view(dtype))
        if (held := self.found[key].flat).dtype != dtype or held.numel() != count:
            raise Refused("two tensors disagree about the numbers that they share")
        return self.found[key]


def _flat(file: BinaryIO, start: int, length: int, whole: Any) -> Tensor:
    """Bytes of a file (length,) uint8, mapped from it if it is mapped as a `whole`."""
    if whole is not None and length:
        return torch.empty(0, dtype=torch.uint8).set_(whole[start : start + length])
    flat = torch.empty(length, dtype=torch.uint8)
    file.seek(start)
    if length and file.readinto(flat.numpy()) != length:  # type: ignore[attr-defined]
        raise ValueError("the file has become shorter while it was read")
    return flat


def _read_legacy(file: BinaryIO, size: int, allowed: Mapping[str, Any]) -> Any:
    """Magic number, version, system, content and keys as pickles; then of each storage its count, and its bytes."""
    pickles = io.BytesIO(file.read(LARGEST_PICKLE))
    try:
        magic, version, system = (unpickle(pickles, {}) for _ in range(3))
        if (magic, version, system["little_endian"]) != (_LEGACY_MAGIC, _LEGACY_VERSION, True):
            raise ValueError("another format")
    except (ValueError, TypeError, KeyError) as error:
        raise Refused("not a torch file, or of a machine with big-endian numbers") from error

    def room(_: str | int, length: int) -> Tensor:
        if length > size:
            raise Refused(f"{length:,} bytes of numbers, the file has {size:,}")
        return torch.empty(length, dtype=torch.uint8)

    storages = _Storages(size, room)
    content = unpickle(pickles, allowed, storages.get)
    keys = unpickle(pickles, {})
    place = pickles.tell()
    if not isinstance(keys, list) or set(keys) != storages.found.keys() or len(keys) > len(storages.found):
        raise Refused("the numbers are not those of the tensors")
    for key in keys:
        held = storages.found[key].flat
        file.seek(place)
        if struct.unpack("<q", file.read(8)) != (held.numel(),):
            raise Refused("not as many numbers as the tensors have")
        held.view(torch.uint8).copy_(_flat(file, place + 8, held.numel() * held.itemsize, None))
        place += 8 + held.numel() * held.itemsize
    return content
