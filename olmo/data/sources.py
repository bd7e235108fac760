"""Token ids by instance number: headerless token files (Dolma's format) and `datasets` folders.

Both kinds answer `len(source)` and `source.read(indices)`; masks lie in sources of these kinds, too. Local files are
memory-mapped, so opening costs nothing and only the pages of the instances that are read come from disk; of remote
ones, only their bytes come (`remote`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..config import DataConfig, PaddingDirection
from .remote import RemoteFiles

PADDING = -1  # in place of a token id where a row of a `datasets` folder is shorter than the sequence


class TokenSource(Protocol):
    """Instances of `sequence_length` token ids each, numbered from 0."""

    sequence_length: int

    def __len__(self) -> int: ...

    def read(self, indices: Sequence[int] | NDArray[np.integer]) -> NDArray[np.int64]:
        """Token ids or PADDING (n, sequence_length), int64, of the instances with these numbers, in this order."""
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
            # numpy cannot map an empty file. As a plain array: indexing a memmap takes longer than copying a row.
            mapped = np.memmap(path, self.dtype, "r", shape=shape) if shape[0] else np.empty(shape, self.dtype)
            self._files.append(mapped.view(np.ndarray))
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
        rows = np.empty((len(wanted), self.sequence_length), dtype=self.dtype)
        files = np.searchsorted(self.offsets, wanted, side="right") - 1
        places = wanted - self.offsets[files]
        is_remote = np.array([mapped is None for mapped in self._files])
        far = is_remote[files]
        for row, (file, place) in enumerate(zip(files.tolist(), places.tolist())):
            if (mapped := self._files[file]) is not None:
                rows[row] = mapped[place]
        if self._remote is not None and far.any():
            numbers = np.cumsum(is_remote)[files[far]] - 1  # among the remote ones
            width = self.dtype.itemsize * self.sequence_length
            content = self._remote.read(numbers, places[far] * width, width)
            rows[far] = np.frombuffer(content, self.dtype).reshape(-1, self.sequence_length)
        return rows.astype(np.int64)


class TokenDataset:
    """A Hugging Face `datasets` folder on disk with a column of rows of token ids; shorter rows are padded."""

    def __init__(
        self,
        path: str | Path,
        sequence_length: int,
        pad_direction: PaddingDirection = PaddingDirection.right,
        column: str = "input_ids",
    ):
        import datasets  # takes a second; only runs on such folders need it

        if not Path(path).is_dir():
            raise FileNotFoundError(f"{path}: no such dataset folder (data.dataset_path)")
        try:
            loaded = datasets.load_from_disk(str(path))
        except Exception as error:  # damaged and empty folders raise several types, down to IndexError
            raise ValueError(f"{path}: not a dataset folder, damaged or empty: {error}") from error
        if not isinstance(loaded, datasets.Dataset) or column not in loaded.column_names:
            raise ValueError(f"{path}: expected a dataset with a column '{column}'")
        if not len(loaded):
            raise ValueError(f"{path}: the dataset is empty")
        self.path, self.sequence_length = str(path), sequence_length
        self.pad_direction, self.column, self.columns = pad_direction, column, tuple(loaded.column_names)
        self._rows = loaded.select_columns([column]).with_format("numpy")

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, indices: Sequence[int] | NDArray[np.integer]) -> NDArray[np.int64]:
        wanted = np.asarray(indices, dtype=np.int64)
        check_range(wanted, len(self), self.path)
        rows = self._rows[wanted][self.column]
        padded = np.full((len(wanted), self.sequence_length), PADDING, dtype=np.int64)
        for place, row in zip(padded, rows):
            if len(row) > self.sequence_length:
                raise ValueError(
                    f"{self.path}: a row of {len(row)} tokens, the model takes {self.sequence_length} "
                    "(model.max_sequence_length)"
                )
            start = self.sequence_length - len(row) if self.pad_direction == PaddingDirection.left else 0
            place[start : start + len(row)] = row
        return padded


def open_source(data: DataConfig, sequence_length: int) -> TokenSource:
    """The source that `data.paths` or `data.dataset_path` names."""
    if data.dataset_path:
        return TokenDataset(data.dataset_path, sequence_length, data.pad_direction)
    return TokenFiles(data.paths or [], sequence_length, data.memmap_dtype)
