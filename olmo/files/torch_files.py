"""Files of `torch.save`: checked before `torch.load` reads them, which trusts the sizes that they state, and after.

Before: a compressed pickle of 3 GB took 36 s and 6.4 GB, tuples that hold one another hang (200 bytes suffice), and one
text encoded many times fills the memory; so the pickle, of bounded size, is first read by an unpickler that makes
nothing. After: a tensor can have 10^12 elements in a storage of one.
"""

from __future__ import annotations

import io
import math
import re
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor, nn

from .unpickling import PATHS, Refused, unpickle

LARGEST_PICKLE = 2**23  # bytes, of some 60,000 tensors
DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)
_core: Any = np._core  # type: ignore[attr-defined]
# Beside torch's own list: what train.pt of OLMo's trainer holds, the state of numpy's generator and paths of
# checkpoints. All of it is data: arrays, dtypes and names.
_SAFE: list[Any] = [
    *((_core.multiarray._reconstruct, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
    *(np.ndarray, np.dtype, type(np.dtype(np.uint32))),
    *((make, name) for name, make in PATHS.items()),
]


def load_torch(file: Path | BinaryIO, mapped: bool = False) -> Any:
    """What `torch.save` has written, if it is containers, numbers, strings, arrays, paths and tensors.

    mapped: from the path of a zip archive; files from before torch 1.6 are read into memory. Raises ValueError with
    one line.
    """
    if isinstance(file, Path):
        with file.open("rb") as opened:
            zipped = check_torch_file(opened)
    else:
        zipped = check_torch_file(file)
        file.seek(0)
    try:
        with torch.serialization.safe_globals(_SAFE):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped and zipped)
    except Exception as error:  # torch raises several types for damaged and refused files
        raise ValueError(_reason(error)) from error


def _reason(error: Exception) -> str:
    """The first line of torch's error, without its advice to unpickle what it refuses."""
    text = re.sub(r"\x1b\[\d*m", "", str(error)) or type(error).__name__
    if name := re.search(r"GLOBAL (\S+) was not an allowed global", text):
        return f"refused to make {name[1]}"
    if re.search("weights_?only", text, re.IGNORECASE):
        return "not a torch file, or it holds more than tensors, numbers and strings"
    return text.splitlines()[0]


def check_plain(tensor: Tensor) -> None:
    """Raise Refused unless a tensor is dense, of ordinary numbers, and has them all."""
    kinds = {
        "a subclass of tensors": type(tensor) not in (Tensor, nn.Parameter),
        "a nested tensor": tensor.is_nested,
        "a sparse tensor": tensor.layout != torch.strided,
        "a meta tensor": tensor.is_meta,
        f"a tensor of {str(tensor.dtype).removeprefix('torch.')}": tensor.dtype not in DTYPES,
    }
    if refused := next((kind for kind, is_so in kinds.items() if is_so), None):
        raise Refused(f"{refused} is not read")
    if tensor.numel() * tensor.itemsize > (held := tensor.untyped_storage().nbytes()):
        raise Refused(f"{tensor.numel():,} elements, of which {held // tensor.itemsize:,} are stored")


def tensors_of(value: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors in nested containers, with the keys that lead to them; each container is visited once."""
    seen, waiting = set(), [("", value)]
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, (dict, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            items = value.items() if isinstance(value, dict) else enumerate(value)
            waiting += [(f"{name}.{key}" if name else f"{key}", item) for key, item in items]


# --- before torch reads it ---------------------------------------------------------------------------------------


class _Inert:
    """Whatever a pickle makes; `count` of a storage: its numbers."""

    def __init__(self, *_: Any, count: int = 0) -> None:
        self.count = count

    append = extend = add = __setitem__ = __setstate__ = lambda self, *_: None


class _Rehearsal(dict[str, Any]):
    """The names in the pickle of a file of `size` bytes: they make nothing, and may state no more than the file has."""

    def __init__(self, size: int):
        super().__init__({"numpy.ndarray": None, "torch.Tensor": None, "_codecs.encode": self._encode})
        self |= dict.fromkeys(("builtins.bytearray", "__builtin__.bytearray"), None)  # never called, or of any length
        self |= {f"torch._utils._rebuild_tensor{version}": self._rebuild for version in ("", "_v2", "_v3")}
        self.size, self.left = size, LARGEST_PICKLE

    def __contains__(self, _: object) -> bool:
        return True

    def __missing__(self, _: str) -> Any:
        return _Inert

    def storage(self, pid: Any) -> _Inert:
        """What a persistent id names: ("storage", type, key, device, count, ...)."""
        count = pid[4] if isinstance(pid, tuple) and len(pid) > 4 else None
        if type(count) is not int or not 0 <= count <= self.size:
            raise Refused(f"more numbers than the file has, of {self.size:,} bytes")
        return _Inert(count=count)

    def _rebuild(self, storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> _Inert:
        count, last = math.prod(size), offset + sum((n - 1) * step for n, step in zip(size, stride))
        if min(offset, *size, *stride, 0) < 0 or count > storage.count or (count and last >= storage.count):
            raise Refused(f"{count:,} elements, not all of which are among the {storage.count:,} that are stored")
        return _Inert()

    def _encode(self, text: str, _: Any) -> bytes:
        self.left -= len(text)
        if self.left < 0:
            raise Refused("more bytes than a pickle of this size may make")
        return b""


def check_torch_file(file: BinaryIO) -> bool:
    """Raise ValueError for a torch file that states more than it has; returns whether it is a zip archive."""
    size = file.seek(0, io.SEEK_END)
    names = _Rehearsal(size)
    file.seek(0)
    if file.read(4) != b"PK\3\4":
        file.seek(0)
        pickles = io.BytesIO(file.read(LARGEST_PICKLE))
        try:
            if unpickle(pickles, {}) != torch.serialization.MAGIC_NUMBER:
                raise ValueError("another pickle")
        except ValueError as error:
            raise ValueError("not a torch file") from error
        for _ in range(3):  # version, system, content
            unpickle(pickles, names, names.storage)
        return False
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            for entry in entries:
                if entry.compress_type != zipfile.ZIP_STORED and not entry.filename.endswith(".pkl"):
                    raise Refused(f"{entry.filename} is compressed, which torch.save never does")
            if sum(entry.file_size for entry in entries) > size:
                raise Refused(f"its records have more bytes than the file, {size:,}")
            for entry in entries:
                if entry.filename.endswith(".pkl"):
                    pickled = archive.open(entry).read(LARGEST_PICKLE + 1)  # whatever the directory states
                    if len(pickled) > LARGEST_PICKLE:
                        raise Refused(f"{entry.filename} has more than {LARGEST_PICKLE:,} bytes")
                    unpickle(io.BytesIO(pickled), names, names.storage)
    except (zipfile.BadZipFile, zlib.error, RuntimeError, EOFError) as error:
        raise ValueError(f"a damaged zip archive: {error}") from error
    return True
