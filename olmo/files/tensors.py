"""Files of tensors, read without running code in them: safetensors with OLMo's spelling of keys, and torch's.

OLMo's safetensors spell each key as base64 of a pickled (path, flag), from which only strings, booleans, numbers and
tuples can be created.
"""

from __future__ import annotations

import base64
import io
import json
import os
import pickle
import stat
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .paths import check_readable
from .torch_files import check_plain, load_torch, tensors_of
from .unpickling import ForbiddenName, Refused, unpickle

_LONGEST_KEY = 4096  # characters


class LazyTensors(Mapping[str, Tensor]):
    """Tensors by name, each made at every access and not kept, so that one pass needs the memory of one tensor.
    `like` has their shapes and dtypes."""

    def __init__(self, like: Mapping[str, Tensor], make: Callable[[str], Tensor]):
        self.like = {name: tensor.to("meta") for name, tensor in like.items()}
        self._make = make

    def __getitem__(self, name: str) -> Tensor:
        return self._make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.like)

    def __len__(self) -> int:
        return len(self.like)


def shapes_of(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Tensors of the same names, shapes and dtypes, without making any."""
    return tensors.like if isinstance(tensors, LazyTensors) else tensors


def encode_key(*path: str) -> str:
    """A name, or a path through nested dictionaries, as OLMo's safetensors spell it."""
    return base64.urlsafe_b64encode(pickle.dumps((path, False), protocol=4)).decode("ascii")


def decode_path(key: str) -> tuple[str | int, ...] | None:
    """The path behind a key of a safetensors file, OLMo's or plain; None where its value is pickled.

    Creates strings, numbers and tuples only. Raises ValueError for a key that names anything else.
    """
    if len(key) > _LONGEST_KEY:
        raise ValueError(f"a key of {len(key):,} characters in a safetensors file")
    if "." in key:
        return (key,)  # base64 has no '.', but its decoder would skip it and the unpickler read on in what is left
    try:
        path, pickled_value = unpickle(io.BytesIO(base64.urlsafe_b64decode(key)), allowed={})
    except ForbiddenName as error:
        raise ValueError(f"hostile key in a safetensors file: {error}") from error
    except (ValueError, TypeError):  # not base64, not a pickle, not a pair: a plain name
        return (key,)
    if not isinstance(path, tuple) or not all(isinstance(part, (str, int)) for part in path):
        raise ValueError("a key of this safetensors file does not name a tensor")
    return None if pickled_value else path


def decode_key(key: str) -> str:
    """The name behind a key of a file that holds nothing but tensors; ValueError for another key."""
    path = decode_path(key)
    if path is None or not all(isinstance(part, str) for part in path):
        raise ValueError("a key of this safetensors file does not name a tensor")
    return ".".join(map(str, path))


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _check(tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Raise ValueError that names the first of the tensors that is not dense, of ordinary numbers and all there."""
    for name, tensor in tensors:
        try:
            check_plain(tensor)
        except Refused as error:
            raise ValueError(f"{' '.join(name.split())}: {error}") from error


def _tensor(file: Any, key: str) -> Tensor:
    """A tensor of an open safetensors file, checked."""
    tensor: Tensor = file.get_tensor(key)
    _check([(".".join(map(str, decode_path(key) or (key,))), tensor)])
    return tensor


def read_tensors(path: Path, mapped: bool = True) -> dict[str, Tensor]:
    """The tensors of a safetensors or torch file by name; ValueError where it holds anything else.

    They are mapped from the file; if `mapped` is false, they have memory of their own.
    """
    check_readable(path)
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                names = {key: decode_key(key) for key in file.keys()}  # noqa: SIM118
                if len(set(names.values())) < len(names):
                    raise ValueError("two keys name the same tensor")
                if mapped:
                    return {name: _tensor(file, key) for key, name in names.items()}
            state = {}
            for key, name in names.items():
                with safe_open(path, "pt") as file:  # closed each time, so that its pages do not count twice
                    state[name] = _tensor(file, key).clone()
            return state
        state = load_torch(path, mapped)
        _check(tensors_of(state))
    except Exception as error:  # each library has its own errors for damaged and hostile files
        raise ValueError(f"{path}: damaged or not a file of tensors: {_first_line(error)}") from error
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise ValueError(f"{path}: expected a flat dictionary of tensors")
    return state


def open_tensors(path: Path) -> Mapping[str, Tensor]:
    """`read_tensors`, each of a safetensors file mapped anew at every access: what is dropped has no pages left. Errors
    as there, at once."""
    tensors = read_tensors(path)
    if path.suffix != ".safetensors":
        return tensors
    with safe_open(path, "pt") as file:
        keys = {decode_key(key): key for key in file.keys()}  # noqa: SIM118

    def read(name: str) -> Tensor:
        with safe_open(path, "pt") as file:
            tensor: Tensor = file.get_tensor(keys[name])
        return tensor

    return LazyTensors(tensors, read)


def tensor_names(path: Path) -> Collection[str]:
    """The names in a safetensors or torch file, whatever numbers a safetensors file has. Errors as `read_tensors`."""
    if path.suffix != ".safetensors":
        return read_tensors(path)
    check_readable(path)
    try:
        with safe_open(path, "pt") as file:
            return list(file.keys())
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged or not a file of tensors: {_first_line(error)}") from error


def read_tensor(path: Path) -> Tensor:
    """The only tensor of a file: a safetensors file of one, or what `torch.save` makes of one."""
    check_readable(path)
    if path.suffix == ".safetensors":
        tensors = list(read_tensors(path).values())
    else:
        try:
            tensors = [load_torch(path, mapped=True)]
            _check([(path.stem, tensor) for tensor in tensors if isinstance(tensor, Tensor)])
        except Exception as error:
            raise ValueError(f"{path}: damaged or not a file of tensors: {_first_line(error)}") from error
    if len(tensors) != 1 or not isinstance(tensors[0], Tensor):
        raise ValueError(f"{path}: expected one tensor")
    return tensors[0]


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, contiguous, none sharing memory with another, as safetensors requires."""
    result: dict[str, Tensor] = {}
    places = set()
    for name, tensor in tensors.items():
        place = (tensor.untyped_storage().data_ptr(), tensor.storage_offset())
        result[name] = tensor.clone() if place in places else tensor.contiguous()
        places.add(place)
    return result


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file under these very names, with the permissions of any new file; OSError where it cannot.

    safetensors makes its files readable by the owner only, whatever the umask is.
    """
    with path.open("wb") as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
    try:
        save_file(_separate(tensors), path, metadata=metadata)
    except SafetensorError as error:
        path.unlink(missing_ok=True)
        raise OSError(f"{path}: cannot be written: {_first_line(error)}") from error
    path.chmod(mode)


def replace_tensors(path: Path, changes: Mapping[str, Callable[[Tensor], None]]) -> None:
    """Change tensors of a safetensors file where they are in it, each by a function that works in place.

    Needs the memory of the largest of them. Not atomic: for a file that does not have its name yet.
    """
    with path.open("r+b") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(start - 8))
        for name, change in changes.items():
            with safe_open(path, "pt") as mapped:
                tensor = mapped.get_tensor(name).clone()
            change(tensor)
            file.seek(start + header[name]["data_offsets"][0])
            file.write(tensor.flatten().view(torch.uint8).numpy().tobytes())


def write_olmo_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file with OLMo's spelling of names, as ai2-olmo and the published code read it."""
    write_safetensors(path, {encode_key(name): tensor for name, tensor in tensors.items()}, {"format": "pt"})


def write_torch_file(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a dictionary of tensors with `torch.save`; OSError that names the file where it cannot be written."""
    try:
        with path.open("wb") as file:  # torch's own streams do not report why they fail
            torch.save(dict(tensors), file)
    except (OSError, RuntimeError) as error:
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        raise OSError(f"{path}: cannot be written: {getattr(cause, 'strerror', None) or _first_line(error)}") from error


def read_training_state(folder: Path, *stems: str, mapped: bool = False) -> dict[str, Any]:
    """Optimizer or trainer state: the first of `{stem}.safetensors` and `{stem}.pt` that a checkpoint folder has, its
    tensors in memory or, if they can be, `mapped` from the file.

    Only numbers, strings, containers, arrays and tensors are created. Values that OLMo pickled into a
    safetensors file are left out (they repeat the optimizer's settings). Raises FileNotFoundError or ValueError.
    """
    candidates = [folder / f"{stem}.{suffix}" for stem in stems for suffix in ("safetensors", "pt")]
    path = next((candidate for candidate in candidates if candidate.is_file()), None)
    if path is None:
        raise FileNotFoundError(
            f"{folder / stems[0]}.pt: missing; "
            "set reset_optimizer_state and reset_trainer_state to start from the weights alone"
        )
    check_readable(path)
    try:
        if path.suffix == ".safetensors":
            return _read_nested(path)
        state: dict[str, Any] = load_torch(path, mapped)
        _check(tensors_of(state))
        return state
    except Exception as error:  # torch raises several types for damaged and refused files
        key = "reset_optimizer_state" if "optim" in stems else "reset_trainer_state"
        raise ValueError(
            f"{path}: damaged, or cannot be read safely ({_first_line(error)}); "
            f"to start without it, set load_path: {folder} and {key}"
        ) from error


def _read_nested(path: Path) -> dict[str, Any]:
    result: dict[str, Any] = {}
    with safe_open(path, "pt") as file:
        for key in file.keys():  # noqa: SIM118
            place = decode_path(key)
            if place is None:
                continue
            inner: Any = result
            for part in place[:-1]:
                inner = inner.setdefault(part, {})
            inner[place[-1]] = _tensor(file, key)
    return result
