"""Token ids by instance number: headerless token files (Dolma's format) and `datasets` folders.

Both kinds answer `len(source)` and `source.read(indices)`. Local files are memory-mapped, so opening costs nothing
and only the pages of the instances that are read come from disk; of remote ones, only their bytes come (`remote`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..config import DataConfig
from .remote import RemoteFiles


class TokenSource(Protocol):
    """Instances of `sequence_length` token ids each, numbered from 0."""

    sequence_length: int

    def __len__(self) -> int: ...

    def read(self, indices: Sequence[int] | NDArray[np.integer]) -> NDArray[np.int64]:
        """Token ids (n, sequence_length), int64, of the instances with these numbers, in this order."""
        ...


def check_range(indices: NDArray[np.integer], size: int, where: str) -> None:
    """Raise ValueError for the first index that lies outside [0, size)."""
    outside = (indices < 0) | (indices >= size)
    if outside.any():
        bad = int(indices[outside][0])
        raise ValueError(
            f"instance {bad} is beyond the data set of {size} instances ({where}): data order and files disagree"
        )


def expand_ranges(pattern: str) -> list[str]:
    """The names that a pattern with brace ranges stands for, in the order in which a shell expands them.

    `part-{000..001}-{0..1}.npy` is part-000-0.npy, part-000-1.npy, part-001-0.npy, part-001-1.npy. Numbers are
    padded as the first one is. Raises ValueError for a range that runs backwards.
    """
    found = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if found is None:
        return [pattern]
    first, last, width = int(found[1]), int(found[2]), len(found[1])
    if first > last:
        raise ValueError(f"data.paths: {found[0]} in {pattern} runs backwards")
    before, after = pattern[: found.start()], expand_ranges(pattern[found.end() :])
    return [f"{before}{number:0{width}}{rest}" for number in range(first, last + 1) for rest in after]


class TokenFiles:
    """Headerless little-endian token files, cut into instances of `sequence_length`.

    The rest of each file that fills no instance is dropped; instances are numbered through the files in order
    (formats section 3). Paths may hold brace ranges, see `expand_ranges`, and may be URLs: http(s)://, s3:// or r2://.
    """

    def __init__(self, paths: Sequence[str | Path], sequence_length: int, dtype: str = "uint16"):
        if not paths:
            raise ValueError("no token files given (data.paths is empty)")
        self.sequence_length = sequence_length
        if dtype not in ("uint8", "uint16", "uint32", "uint64"):
            raise ValueError(f"data.memmap_dtype: {dtype!r} is none of uint8, uint16, uint32, uint64")
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.paths = [name for path in paths for name in expand_ranges(str(path))]
        remote = [path for path in self.paths if "://" in path]
        for path in self.paths:
            if "://" not in path and not Path(path).is_file():
                raise FileNotFoundError(f"{path}: no such token file")
        self._remote = RemoteFiles(remote) if remote else None
        sizes = iter(self._remote.sizes if self._remote else ())
        self.sizes = [next(sizes) if "://" in path else Path(path).stat().st_size for path in self.paths]
        self._files: list[NDArray[np.unsignedinteger] | None] = []  # None: the next one of the remote files
        width = self.dtype.itemsize * sequence_length
        for path, size in zip(self.paths, self.sizes):
            if size % self.dtype.itemsize:
                raise ValueError(f"{path}: {size} bytes are no whole number of {self.dtype.name} tokens")
            if "://" in path:
                self._files.append(None)
                continue
            shape = (size // width, sequence_length)
            # numpy cannot map an empty file.
            mapped = np.memmap(path, self.dtype, "r", shape=shape) if shape[0] else np.empty(shape, self.dtype)
            self._files.append(mapped)
        # First instance of each file, and the total at the end.
        self.offsets = np.cumsum([0, *(size // width for size in self.sizes)])
        if not self.offsets[-1]:
            raise ValueError(f"{', '.join(self.paths)}: fewer than {sequence_length} tokens, not one instance")

    def __len__(self) -> int:
        return int(self.offsets[-1])

    def extent(self) -> str:
        """How far the instances reach, for messages."""
        return f"{len(self.paths)} files, {sum(self.sizes)} bytes, the last {self.paths[-1]} of {self.sizes[-1]} bytes"

    def read(self, indices: Sequence[int] | NDArray[np.integer]) -> NDArray[np.int64]:
        wanted = np.asarray(indices, dtype=np.int64)
        check_range(wanted, len(self), self.extent())
        rows = np.empty((len(wanted), self.sequence_length), dtype=np.int64)
        files = np.searchsorted(self.offsets, wanted, side="right") - 1
        places = wanted - self.offsets[files]
        is_remote = np.array([mapped is None for mapped in self._files])
        far = is_remote[files]
        for row in np.flatnonzero(~far):
            mapped = self._files[files[row]]
            assert mapped is not None
            rows[row] = mapped[places[row]]
        if self._remote is not None and far.any():
            numbers = np.cumsum(is_remote)[files[far]] - 1  # among the remote ones
            width = self.dtype.itemsize * self.sequence_length
            content = self._remote.read(numbers, places[far] * width, width)
            rows[far] = np.frombuffer(content, self.dtype).reshape(-1, self.sequence_length)
        return rows


class TokenDataset:
    """A Hugging Face `datasets` folder on disk with a column `input_ids` of equally long rows."""

    def __init__(self, path: str | Path, sequence_length: int):
        import datasets  # takes a second; only runs on such folders need it

        if not Path(path).is_dir():
            raise FileNotFoundError(f"{path}: no such dataset folder (data.dataset_path)")
        try:
            loaded = datasets.load_from_disk(str(path))
        except Exception as error:  # damaged and empty folders raise several types, down to IndexError
            raise ValueError(f"{path}: not a dataset folder, damaged or empty: {error}") from error
        if not isinstance(loaded, datasets.Dataset) or "input_ids" not in loaded.column_names:
            raise ValueError(f"{path}: expected a dataset with a column 'input_ids'")
        if not len(loaded):
            raise ValueError(f"{path}: the dataset is empty")
        self.path, self.sequence_length = str(path), sequence_length
        self._rows = loaded.select_columns(["input_ids"]).with_format("numpy")

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, indices: Sequence[int] | NDArray[np.integer]) -> NDArray[np.int64]:
        wanted = np.asarray(indices, dtype=np.int64)
        check_range(wanted, len(self), self.path)
        rows = self._rows[wanted]["input_ids"]
        lengths = {len(row) for row in rows}
        if lengths != {self.sequence_length}:
            raise ValueError(
                f"{self.path}: rows of {sorted(lengths)} tokens, expected {self.sequence_length} "
                "(model.max_sequence_length)"
            )
        return np.stack(rows).astype(np.int64)


def open_source(data: DataConfig, sequence_length: int) -> TokenSource:
    """The source that `data.paths` or `data.dataset_path` names."""
    if data.dataset_path:
        return TokenDataset(data.dataset_path, sequence_length)
    return TokenFiles(data.paths or [], sequence_length, data.memmap_dtype)
