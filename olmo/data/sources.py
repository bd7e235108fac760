"""Token ids by instance number: headerless token files (Dolma's format) and `datasets` folders.

Both have `len(source)` and `source.read(indices)`; masks are stored in the same two formats. Local files are
memory-mapped, so opening costs nothing and only the pages of the instances that are read are loaded; of remote files
only their byte ranges (`ranges.py`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..config.schema import DEFAULT_DTYPE, DataConfig, PaddingDirection
from ..console import log
from ..exceptions import ConfigurationError
from ..files.paths import read_json
from .ranges import RemoteFiles
from .token_type import HEAD, TYPES, wrong_type

NUMPY_HEADER = b"\x93NUMPY"
PADDING = -1  # in place of a token id where a row of a `datasets` folder is shorter than the sequence


def check_range(indices: NDArray[np.integer], size: int, where: str) -> None:
    """Raise ValueError for the first index outside [0, size)."""
    outside = (indices < 0) | (indices >= size)
    if outside.any():
        bad = int(indices[outside][0])
        raise ValueError(
            f"instance {bad} is beyond the data set of {size} instances ({where}): data order and files disagree"
        )


def check_tokens(tokens: NDArray[np.int64], instances: NDArray[np.integer], vocabulary: int, where: str = "") -> None:
    """Raise ValueError, with `where`, if the tokens (n, T) of these instances (n,) hold one that a model does not have;
    PADDING is none."""
    if tokens.view(np.uint64).max(initial=0) < vocabulary:  # one pass: a negative number is a large one
        return
    foreign = (tokens < PADDING) | (tokens >= vocabulary)
    if foreign.any():
        row = int(foreign.any(axis=1).argmax())
        raise ValueError(
            f"{where}instance {instances[row]} holds token {tokens[row][foreign[row]][0]}, "
            f"the model's vocabulary has {vocabulary}: tokenizer and model disagree"
        )


def expand_ranges(pattern: str) -> list[str]:
    """The names that a pattern with brace ranges expands to, in the order of a shell.

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
    (formats section 3). Paths may have brace ranges, see `expand_ranges`, and may be URLs: http(s)://, s3:// or r2://.
    `keep` caches what is read of those, `fresh` requests their sizes again. `key` is the configuration's name for the
    paths, if they are from one. dtype: None is uint16, and a ValueError if the content of a file looks like another
    type; with a type, that is a warning. Of a remote file the first rows that are read are examined.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        sequence_length: int,
        dtype: str | None = None,
        *,
        keep: bool = True,
        fresh: bool = False,
        key: str = "",
    ):
        kind = "label mask" if key == "data.label_mask_paths" else "token file"
        if not paths:
            raise ConfigurationError(f"no {kind}s given ({key or 'data.paths'} is empty)")
        self.sequence_length, self.keep, self._kind, self._key = sequence_length, keep, kind, key
        if dtype not in (None, *TYPES):
            raise ConfigurationError(f"data.memmap_dtype: {dtype!r} is none of {', '.join(TYPES)}")
        self.dtype, self._dtype_is_given = np.dtype(dtype or DEFAULT_DTYPE).newbyteorder("<"), dtype is not None
        self.paths = [name for path in paths for name in expand_ranges(str(path))]
        remote = [path for path in self.paths if "://" in path]
        for path in self.paths:
            if "://" not in path and not Path(path).is_file():
                raise FileNotFoundError(f"{path}: no such {kind}{key and f' ({key})'}")
        self._remote = RemoteFiles(remote, fresh=fresh) if remote else None
        sizes = iter(self._remote.sizes if self._remote else ())
        self.sizes = [next(sizes) if "://" in path else Path(path).stat().st_size for path in self.paths]
        self._warned = False
        self._files: list[NDArray[np.unsignedinteger] | None] = []  # None: the next one of the remote files
        width = self.dtype.itemsize * sequence_length
        for path, size in zip(self.paths, self.sizes):
            if size % self.dtype.itemsize:
                raise ValueError(f"{path}: {size} bytes are no whole number of {self.dtype.name} tokens")
            if "://" in path:
                self._files.append(None)
                continue
            with Path(path).open("rb") as file:
                self._check_content(path, file.read(HEAD))
            shape = (size // width, sequence_length)
            # numpy cannot map an empty file. As a plain array: indexing a memmap takes longer than copying a row.
            mapped = np.memmap(path, self.dtype, "r", shape=shape) if shape[0] else np.empty(shape, self.dtype)
            self._files.append(mapped.view(np.ndarray))
        self._unseen = {number for number, path in enumerate(self.paths) if "://" in path}
        # First instance of each file, and the total at the end.
        self.offsets = np.cumsum([0, *(size // width for size in self.sizes)])
        if not self.offsets[-1]:
            raise ValueError(f"{', '.join(self.paths)}: fewer than {sequence_length} tokens, not one instance")

    def __len__(self) -> int:
        return int(self.offsets[-1])

    def extent(self) -> str:
        """How far the instances reach, for messages."""
        return f"{len(self.paths)} files, {sum(self.sizes)} bytes, the last {self.paths[-1]} of {self.sizes[-1]} bytes"

    def remarks(self) -> Iterator[str]:
        """What of the files is not used."""
        tokens = [size // self.dtype.itemsize for size in self.sizes]
        if short := [path for path, held in zip(self.paths, tokens) if held < self.sequence_length]:
            more = f" and {len(short) - 1} more" if len(short) > 1 else ""
            yield f"{short[0]}{more}: fewer than {self.sequence_length} tokens, not one instance"
        if rest := sum(held % self.sequence_length for held in tokens):
            yield (
                f"{rest:,} of {sum(tokens):,} tokens are not used: at the ends of files they fill no instance of "
                f"{self.sequence_length} tokens"
            )

    def _check_content(self, path: str, content: bytes, is_head: bool = True) -> None:
        """Raise ValueError, or warn, if bytes of a file, its first or others, are no tokens of this type."""
        if is_head and content.startswith(NUMPY_HEADER):
            raise ValueError(
                f"{path}: begins with the header of numpy.save; a {self._kind} has none, see ndarray.tofile"
            )
        fits = self._kind == "token file" and wrong_type(content, self.dtype.name)
        if not fits:
            return
        setting = f"{self._key.removesuffix('.paths') or 'data'}.memmap_dtype"
        found = f"{path}: its content looks like tokens of {fits}, not of {self.dtype.name}"
        if not self._dtype_is_given:
            raise ValueError(
                f"{found}; give the type as {setting}: {fits} in a configuration, or {setting}: {self.dtype.name} if "
                "this is the right one"
            )
        if os.environ.get("RANK", "0") == "0" and not self._warned:  # once, whatever the number of files and processes
            log.warning("%s, which %s states", found, setting)
        self._warned = True

    def _check_remote(self, files: NDArray[np.int64], starts: NDArray[np.int64], content: bytes) -> None:
        """`_check_content` of remote rows: those at the start of a file, and the first that are read of each file."""
        width = len(content) // len(starts)
        new = self._unseen.intersection(files.tolist())
        self._unseen -= new
        parts: dict[int, bytes] = dict.fromkeys(new, b"")
        for row, (file, start) in enumerate(zip(files.tolist(), starts.tolist())):
            if start == 0:
                self._check_content(self.paths[file], content[row * width : row * width + len(NUMPY_HEADER)])
            if file in parts and len(parts[file]) < HEAD:
                first = row * width + -start % 8  # whole numbers of every type
                parts[file] += content[first : first + ((row + 1) * width - first) // 8 * 8]
        for file, part in parts.items():
            self._check_content(self.paths[file], part, is_head=False)

    def read(self, indices: Sequence[int] | NDArray[np.integer]) -> NDArray[np.int64]:
        """Token ids (n, sequence_length), int64, of the instances with these numbers, in this order."""
        wanted = np.asarray(indices, dtype=np.int64)
        check_range(wanted, len(self), self.extent())
        rows = np.empty((len(wanted), self.sequence_length), dtype=self.dtype)
        files = np.searchsorted(self.offsets, wanted, side="right") - 1
        places = wanted - self.offsets[files]
        is_remote = np.array([mapped is None for mapped in self._files])
        far = is_remote[files]
        for file in np.unique(files[~far]):
            # Reading a mapped file beyond its end raises no error: it ends the process.
            if (now := os.stat(self.paths[file]).st_size) != self.sizes[file]:
                raise ValueError(f"{self.paths[file]}: the file has {now} bytes now, it had {self.sizes[file]}")
        for row, (file, place) in enumerate(zip(files.tolist(), places.tolist())):
            if (mapped := self._files[file]) is not None:
                rows[row] = mapped[place]
        if self._remote is not None and far.any():
            numbers = np.cumsum(is_remote)[files[far]] - 1  # among the remote ones
            width = self.dtype.itemsize * self.sequence_length
            content = self._remote.read(numbers, places[far] * width, width, self.keep)
            self._check_remote(files[far], places[far] * width, content)
            rows[far] = np.frombuffer(content, self.dtype).reshape(-1, self.sequence_length)
        if self.dtype.itemsize == 8 and (large := rows >> 63).any():
            raise ValueError(f"{self.extent()}: token {rows[large > 0][0]} is none; is data.memmap_dtype uint64?")
        return rows.astype(np.int64)


class TokenDataset:
    """A Hugging Face `datasets` folder on disk with a column `input_ids` of rows of token ids.

    `columns` are those of its columns with a number for every token, see `read_column`. pad_rows: rows shorter than
    `sequence_length` are padded; otherwise they are a ValueError. Longer ones always are.
    """

    def __init__(
        self,
        path: str | Path,
        sequence_length: int,
        pad_direction: PaddingDirection = "right",
        pad_rows: bool = True,
        key: str = "data",
        length_key: str = "model.max_sequence_length",
    ):
        import datasets  # takes a second; only runs on such folders need it

        if not Path(path).is_dir():
            raise FileNotFoundError(f"{path}: no such dataset folder (data.dataset_path)")
        try:
            if (state := Path(path) / "state.json").is_file():
                for name in (file["filename"] for file in read_json(state)["_data_files"]):
                    if Path(name).name != name:
                        raise ValueError(f"state.json names a file outside of the folder: {name}")
            loaded = datasets.load_from_disk(str(path))
        except Exception as error:  # damaged and empty folders raise several types, down to IndexError
            raise ValueError(f"{path}: not a dataset folder, damaged or empty: {error}") from error
        if isinstance(loaded, datasets.DatasetDict):
            raise ValueError(f"{path}: holds several datasets; name one of {', '.join(f'{path}/{s}' for s in loaded)}")
        if not isinstance(loaded, datasets.Dataset) or "input_ids" not in loaded.column_names:
            raise ValueError(f"{path}: expected a dataset with a column 'input_ids'")
        if not len(loaded):
            raise ValueError(f"{path}: the dataset is empty")
        self.path, self.sequence_length, self.pad_direction = str(path), sequence_length, pad_direction
        self.columns = [name for name in ("input_ids", "label_mask", "attention_mask") if name in loaded.column_names]
        for name in self.columns:
            kind = getattr(getattr(loaded.features[name], "feature", None), "dtype", "")
            if not kind.startswith(("int", "uint", "bool")) or (name, kind) == ("input_ids", "bool"):
                raise ValueError(f"{path}: column '{name}' holds {loaded.features[name]}, not lists of whole numbers")
            try:  # reading a damaged one could end the process, or give what is elsewhere in its memory
                loaded.data.column(name).validate(full=True)
            except ValueError as error:
                raise ValueError(f"{path}: column '{name}' is damaged: {error}") from error
        # Rows without a list, which some releases of datasets cannot make arrays of.
        self._missing = {name: np.flatnonzero(loaded.data.column(name).is_null()) for name in self.columns}
        self._rows = loaded.select_columns(self.columns).with_format("numpy")
        self._lengths = self._row_lengths(loaded, pad_rows, key, length_key)

    def _row_lengths(self, loaded: Any, pad_rows: bool, key: str, length_key: str) -> NDArray[np.integer]:
        """Tokens in each row (n,), 0 where one is missing. Raises ValueError for rows of another length."""
        import pyarrow.compute as arrow

        lengths = arrow.fill_null(arrow.list_value_length(loaded.data.column("input_ids")), 0).to_numpy()
        shortest, longest, length = int(lengths.min()), int(lengths.max()), self.sequence_length
        if longest > length or (shortest < length and not pad_rows):
            found = f"{longest}" if shortest == longest else f"{shortest} to {longest} (mean {lengths.mean():.1f})"
            change = f"set it to {longest}, or " if shortest == longest or pad_rows else ""
            raise ValueError(
                f"{self.path}: its rows have {found} tokens, {length_key} is {length}: {change}"
                f"make rows of {length} tokens (scripts.prepare_pubmed --sequence_length {length})"
                + ("" if longest > length else f"; with {key}.pad_rows: true, short rows are padded")
            )
        return lengths

    def remarks(self) -> Iterator[str]:
        """How much of the rows is padding."""
        if share := self.padded_share(slice(None)):
            yield (
                f"rows of {self._lengths.min()} to {self._lengths.max()} tokens are padded to {self.sequence_length}: "
                f"{share:.1%} of what is read is padding"
            )

    def document_end(self) -> int | None:
        """The token that ends documents, which `scripts.prepare_pubmed` records beside the rows; None without it."""
        record = Path(self.path) / "about.json"
        about = read_json(record) if record.is_file() else None
        return about.get("eos_token_id") if isinstance(about, dict) else None

    def padded_share(self, indices: NDArray[np.integer] | slice) -> float:
        """Which share of these instances is padding."""
        return 1 - float(self._lengths[indices].mean()) / self.sequence_length

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, indices: Sequence[int] | NDArray[np.integer]) -> NDArray[np.int64]:
        """As `TokenFiles.read`, with PADDING."""
        return self.read_column("input_ids", indices)

    def read_column(self, name: str, indices: Sequence[int] | NDArray[np.integer]) -> NDArray[np.int64]:
        """One of `columns`, padded as the token ids are: `input_ids`, or a mask, 0 where the token is masked.

        Raises ValueError for a row that holds something else than whole numbers from 0 on, or as a mask does not have
        the length of its tokens.
        """
        wanted = np.asarray(indices, dtype=np.int64)
        check_range(wanted, len(self), self.path)
        for column in (name, "input_ids"):
            if len(missing := np.intersect1d(wanted, self._missing[column])):
                raise ValueError(f"{self.path}: instance {missing[0]}, column '{column}': a value is missing")
        batch = self._rows[wanted]
        padded = np.full((len(wanted), self.sequence_length), PADDING, dtype=np.int64)
        for place, number, row, ids in zip(padded, wanted, batch[name], batch["input_ids"]):
            where = f"{self.path}: instance {number}, column '{name}'"
            # numpy has no missing integers: if one row has one, all rows of the batch are floats, and it is NaN.
            if np.asarray(row).dtype.kind not in "iubf" or np.isnan(row).any():
                raise ValueError(f"{where}: a value is missing")
            if len(row) != len(ids):
                raise ValueError(f"{where}: a mask of {len(row)} numbers for {len(ids)} tokens")
            start = self.sequence_length - len(row) if self.pad_direction == "left" else 0
            place[start : start + len(row)] = row
            if len(row) and place[start : start + len(row)].min() < 0:
                raise ValueError(f"{where}: {place[start : start + len(row)].min()} is not a token")
        return padded


TokenSource: TypeAlias = TokenFiles | TokenDataset  # `sequence_length` ids an instance, numbered from 0


def open_source(data: DataConfig, sequence_length: int, keep: bool = True, key: str = "data") -> TokenSource:
    """The source that `data.paths` or `data.dataset_path` names. Remote ranges stay on this machine with `keep`; `key`
    is the section's name."""
    if data.dataset_path:
        return TokenDataset(data.dataset_path, sequence_length, data.pad_direction, data.pad_rows, key)
    return TokenFiles(data.paths or [], sequence_length, data.memmap_dtype, keep=keep, key=f"{key}.paths")
