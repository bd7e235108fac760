"""Sharded checkpoints, `step{N}/`: every process writes its part, and any number of processes can read them.

`model_and_optim/` is a folder of torch.distributed.checkpoint: `model.{NAME}` are the weights,
`optim.state.{NAME}.{ENTRY}` the numbers that the optimizer keeps for them. Its index, `.metadata`, lists
where each part of each tensor is. That is a pickle; only the index's own classes can be created from it.
"""

from __future__ import annotations

import io
import math
import pickle
import warnings
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed.checkpoint as distributed_checkpoint
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException, FileSystemReader, FileSystemWriter, filesystem, metadata
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.distributed.tensor import DTensor
from torch.futures import Future

from ..distributed.ranks import Ranks, is_collective_error
from ..exceptions import short_message
from ..files.torch_files import check_torch_file
from ..files.unpickling import PATHS, unpickle
from ..model.causal_lm import distinct_state
from .saves import SHARDS

# torch warns whenever a single process reads or writes one.
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized", UserWarning)

WEIGHTS, MOMENTS = "model.", "optim.state."

# All that an index may name: its own parts, dtypes and paths.
_PARTS_OF_AN_INDEX: dict[str, Any] = {
    **{
        f"{part.__module__}.{part.__name__}": part
        for part in (
            *(metadata.Metadata, metadata.MetadataIndex, metadata.StorageMeta, metadata.ChunkStorageMetadata),
            *(metadata.TensorStorageMetadata, metadata.TensorProperties, metadata.BytesStorageMetadata),
            *(metadata._MEM_FORMAT_ENCODING, filesystem._StorageInfo, torch.Size, torch.serialization._get_layout),
        )
    },
    **{str(dtype): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)},
    **PATHS,
}


def read_index(folder: Path) -> Metadata:
    """What a sharded checkpoint holds, without its numbers. ValueError where it is damaged or hostile."""
    path = folder / SHARDS / ".metadata"
    try:
        with path.open("rb") as file:
            index = unpickle(file, _PARTS_OF_AN_INDEX)
        if not isinstance(index, Metadata) or any(name != Path(name).name for name in _parts(index)):
            raise ValueError("it names files elsewhere")
    except Exception as error:  # a damaged pickle raises anything
        raise ValueError(f"{path}: damaged, or not an index of a checkpoint: {error}") from error
    return index


def _parts(index: Metadata) -> set[str]:
    """The names of the files that hold the numbers."""
    return {info.relative_path for info in index.storage_data.values()}


class _Slice(io.RawIOBase):
    """The bytes [start, start + length) of a file, as a file."""

    def __init__(self, file: BinaryIO, start: int, length: int):
        self.file, self.start, self.length, self.place = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.place, io.SEEK_END: self.length}[whence]
        return self.place

    def readinto(self, buffer: Any) -> int:
        self.file.seek(self.start + self.place)
        read = self.file.readinto(memoryview(buffer)[: max(self.length - self.place, 0)])  # type: ignore[attr-defined]
        self.place += read
        return int(read)


class Reader(FileSystemReader):
    """torch's own reader with an index that was read once, and safely; it reads tensors only."""

    def __init__(self, folder: Path):
        super().__init__(folder / SHARDS)
        self.folder, self.index = folder, read_index(folder)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.index

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Check the parts that this process needs, before torch trusts the sizes that they state."""
        parts = {place: self.index.storage_data[place] for place in (item.storage_index for item in plan.items)}
        for info in parts.values():
            with (self.folder / SHARDS / info.relative_path).open("rb") as file:
                check_torch_file(io.BufferedReader(_Slice(file, info.offset, info.length)))
        return super().read_data(plan, planner)

    @cached_property
    def tensors(self) -> dict[str, TensorStorageMetadata]:
        """The tensors of the index by name. ValueError if they have more bytes than the parts: memory is allocated by
        it."""
        place, index = self.folder / SHARDS, self.index
        tensors = {n: h for n, h in index.state_dict_metadata.items() if isinstance(h, TensorStorageMetadata)}
        stated = sum(math.prod(held.size) * held.properties.dtype.itemsize for held in tensors.values())
        try:
            found = sum((place / part).stat().st_size for part in _parts(index))
        except OSError as error:
            raise ValueError(f"{place}: damaged: {error.filename}: {error.strerror}") from error
        if stated > found:
            raise ValueError(f"{place}: damaged: its index has tensors of {stated:,} bytes, its files {found:,}")
        return tensors

    def shapes(self, prefix: str) -> dict[str, Tensor]:
        """Meta tensors of the shapes and dtypes of the tensors whose names begin with `prefix`, without it."""
        return {
            name.removeprefix(prefix): torch.empty(held.size, dtype=held.properties.dtype, device="meta")
            for name, held in self.tensors.items()
            if name.startswith(prefix)
        }

    def read(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names begin with `prefix`, without it, in full and in memory, for one process by itself."""
        tensors = {name: torch.empty_like(like, device="cpu") for name, like in self.shapes(prefix).items()}
        self.read_into({f"{prefix}{name}": tensor for name, tensor in tensors.items()}, alone=True)
        return tensors

    def read_into(self, tensors: Mapping[str, Tensor], alone: bool) -> None:
        """Fill tensors with those of the same names, which must be there with the same shapes. ValueError otherwise.

        A collective, unless `alone`.
        """
        for name, tensor in tensors.items():
            held = self.index.state_dict_metadata.get(name)
            if not isinstance(held, TensorStorageMetadata):  # anything else would be unpickled
                raise ValueError(f"{self.folder}: no tensor {name}")
            if held.size != tensor.shape or not held.properties.dtype.is_floating_point:
                kind = f"{tuple(held.size)} and {held.properties.dtype}"
                raise ValueError(
                    f"{self.folder}: {name} has shape {kind}, not {tuple(tensor.shape)} and floating point"
                )
        try:
            distributed_checkpoint.load(dict(tensors), storage_reader=self, no_dist=alone)
        except (CheckpointException, OSError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
            if is_collective_error(error):
                raise RuntimeError(short_message(error)) from error
            raise ValueError(f"{self.folder / SHARDS}: damaged: {short_message(error)}") from error


def read_weights(folder: Path, model: nn.Module, prefix: str = "", alone: bool = False) -> None:
    """Fill a model, sharded by FSDP or not, with the weights of a sharded checkpoint whose names begin with `prefix`.

    A collective, unless `alone`. Raises ValueError where it has others than the model.
    """
    prefix, reader = f"{WEIGHTS}{prefix}", Reader(folder)
    state = {f"{prefix}{name}": tensor for name, tensor in distinct_state(model).items()}
    held = {name for name in reader.index.state_dict_metadata if name.startswith(WEIGHTS)}
    if differing := sorted(state.keys() - held) or sorted(held - state.keys()):
        what = "missing" if differing[0] in state else "not expected"
        names = ", ".join(name.removeprefix(WEIGHTS) for name in differing[:3])
        raise ValueError(f"{folder}: weights and config disagree: {what} {names}")
    reader.read_into(state, alone)


def read_moments(folder: Path, weights: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The optimizer's state of these weights, by name and entry, sharded as they are. A collective.

    Entries that the checkpoint lacks are missing; those of other weights are not read.
    """
    reader = Reader(folder)
    found: dict[str, dict[str, Tensor]] = {name: {} for name in weights}
    for key, held in reader.tensors.items():
        name, _, entry = key.removeprefix(MOMENTS).rpartition(".")
        if key.startswith(MOMENTS) and name in weights:
            whole = held.size == weights[name].shape
            found[name][entry] = (
                torch.zeros_like(weights[name]) if whole and held.size else torch.zeros(held.size, dtype=torch.float32)
            )
    reader.read_into(_flat(found), alone=False)
    return {name: entries for name, entries in found.items() if entries}


def _flat(moments: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{MOMENTS}{name}.{entry}": t for name, entries in moments.items() for entry, t in entries.items()}


def snapshot(model: nn.Module, moments: Mapping[str, Mapping[str, Tensor]], ranks: Ranks) -> dict[str, Tensor]:
    """Copies in main memory of what this process writes: its shards of tensors that FSDP has sharded, and an equal
    share of those that all processes have. Training may continue while they are written.

    What is on a GPU is copied into page-locked memory, which torch keeps for the next copies. All are complete on
    return.
    """
    tensors = {f"{WEIGHTS}{name}": tensor for name, tensor in distinct_state(model).items()} | _flat(moments)
    load = [0] * ranks.world_size
    chosen = {}
    for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].numel()):
        if not isinstance(tensor, DTensor):
            writer = load.index(min(load))
            load[writer] += tensor.numel()
            if writer != ranks.rank:
                continue
        # On CUDA, non_blocking makes torch allocate the copy in page-locked memory.
        chosen[name] = tensor.detach().to("cpu", copy=True, non_blocking=tensor.is_cuda)
    for device in {tensor.device for tensor in tensors.values() if tensor.is_cuda}:
        torch.cuda.synchronize(device)
    return chosen


class _Writer(FileSystemWriter):
    """torch's writer, whose errors name what the system answered, such as a full disk."""

    def write_data(self, *arguments: Any) -> Any:
        try:
            return super().write_data(*arguments)
        except RuntimeError as error:  # raised when torch closes the stream that could not be written
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None


def write(folder: Path, tensors: Mapping[str, Tensor], ranks: Ranks) -> None:
    """Write what `snapshot` has copied on every process into `folder`, which may exist. A collective of the thread
    that saves. Raises OSError on all processes where one fails."""
    writer = _Writer(folder / SHARDS)
    alone = ranks.world_size == 1
    try:
        distributed_checkpoint.save(dict(tensors), storage_writer=writer, process_group=ranks.saving, no_dist=alone)
    except CheckpointException as error:  # a BaseException
        raise (RuntimeError if is_collective_error(error) else OSError)(short_message(error)) from None


def check_parts(folder: Path) -> None:
    """Raise OSError if parts that other processes have written are missing."""
    for info in read_index(folder).storage_data.values():
        part = folder / SHARDS / info.relative_path
        if not part.is_file() or part.stat().st_size < info.offset + info.length:
            raise OSError(f"{part.name} of another process is not in its folder; save_folder must be one for all nodes")
