"""Instances that a program gives: texts, rows of token ids, or an object of the library `datasets`; and tokenizers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from analysis.texts import Texts
from olmo.tokenizer import uncut

_KINDS = "a path, strings, rows of token ids (lists, an array or a tensor), or a dataset with 'input_ids' or 'text'"


@dataclass(frozen=True)
class Given:
    """Texts, or the rows of token ids, that a program gives as data; either is None."""

    name: str  # in errors and results
    texts: Texts | None = None
    rows: Sequence[NDArray[np.int64]] | None = None

    @classmethod
    def of(cls, data: Any, most: int) -> Given:
        """From anything but a path; of rows, at most the first `most` are read.

        Raises ValueError for data of another kind, and for rows that are not lists of whole numbers from 0.
        """
        columns = getattr(data, "column_names", None)
        if isinstance(columns, Mapping):
            raise ValueError(f"data: {type(data).__name__} of several datasets; pass one of {', '.join(columns)}")
        if _is_dataset(data):
            return cls._of_dataset(data, columns, most)
        if isinstance(data, (str, bytes, Mapping)) or not isinstance(data, Iterable):
            raise ValueError(f"data: {type(data).__name__}; expected {_KINDS}")
        if hasattr(data, "detach"):
            data = data.detach().cpu().numpy()
        if isinstance(data, np.ndarray):
            if data.ndim != 2 or data.dtype.kind not in "iu":
                found = f"shape {data.shape} of {data.dtype}"
                raise ValueError(f"data: {found}; token ids are whole numbers of shape (instances, tokens)")
            return cls("token ids", rows=token_rows(data[:most]))
        items = iter(data)
        first = next(items, None)
        if first is None:
            raise ValueError("data: empty")
        items = chain([first], items)
        if isinstance(first, str):
            return cls("strings", texts=Texts("strings", list(_checked(items))))
        if isinstance(first, (int, np.integer)):
            raise ValueError("data: a list of numbers; token ids are lists of them, one per instance: [ids]")
        return cls("token ids", rows=token_rows(islice(items, most)))

    @classmethod
    def _of_dataset(cls, data: Any, columns: list[str] | None, most: int) -> Given:
        """Of datasets.Dataset or IterableDataset; one that does not know its columns shows them in its first row."""
        name = f"{type(data).__name__} {getattr(data.info, 'dataset_name', None) or ''}".rstrip()
        columns = columns or list(next(iter(data), {}))
        if "input_ids" in columns:
            kept = [column for column in ("input_ids", "attention_mask") if column in columns]
            rows = token_rows((_unpadded(row) for row in islice(data.select_columns(kept), most)), name)
            return cls(name, rows=rows)
        if "text" in columns:
            return cls(name, texts=Texts(name, _Column(data, "text")))
        raise ValueError(f"data: {name} has {', '.join(columns) or 'no columns'}; expected 'input_ids' or 'text'")

    @property
    def longest(self) -> int | None:
        """Tokens of the longest row; None of texts."""
        return None if self.rows is None else max(map(len, self.rows))

    @property
    def about(self) -> dict[str, Any]:
        """What a result records of the data besides its name."""
        return {}

    def __str__(self) -> str:
        return self.name


def _is_dataset(data: Any) -> bool:
    return type(data).__module__.split(".")[0] == "datasets" and hasattr(data, "select_columns")


def _unpadded(row: Mapping[str, Any]) -> Any:
    """The token ids of a row of a dataset that are not padding."""
    ids = np.asarray(row["input_ids"])
    return ids[np.asarray(row["attention_mask"]) > 0] if row.get("attention_mask") is not None else ids


class _Column:
    """A column of texts, read anew by every loop."""

    def __init__(self, data: Any, column: str):
        self._data, self._column = data.select_columns([column]), column

    def __iter__(self) -> Iterator[str]:
        return _checked(row[self._column] for row in self._data)


def _checked(texts: Iterable[Any]) -> Iterator[str]:
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"data: text {number} is of type {type(text).__name__}, not str")
        yield text


def token_rows(rows: Iterable[Any], name: str = "data") -> list[NDArray[np.int64]]:
    """Rows as arrays of token ids."""
    found = []
    for number, row in enumerate(rows):
        try:
            ids = np.asarray(row.detach().cpu() if hasattr(row, "detach") else row)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name}: row {number}: not a list of token ids: {error}") from error
        if ids.ndim == 1 and not len(ids):
            raise ValueError(f"{name}: row {number}: no token")
        if ids.ndim != 1 or ids.dtype.kind not in "iu" or ids.min() < 0:
            what = f"shape {ids.shape} of {ids.dtype}" if ids.ndim != 1 or ids.dtype.kind not in "iu" else ids.min()
            raise ValueError(f"{name}: row {number}: {what}; expected a list of token ids, whole numbers from 0")
        found.append(ids.astype(np.int64))
    if not found:
        raise ValueError(f"{name}: empty")
    return found


@dataclass(frozen=True)
class GivenTokenizer:
    """A tokenizer object that a program gives, without the truncation and padding that it may be set to."""

    name: str  # in results
    tokenizer: Tokenizer
    eos: int | None  # the token that ends a document, where the object knows one

    @classmethod
    def of(cls, given: Any) -> GivenTokenizer:
        """From a fast tokenizer of transformers or a tokenizers.Tokenizer. Raises ValueError for anything else."""
        backend = given if isinstance(given, Tokenizer) else getattr(given, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise ValueError(
                f"tokenizer: {type(given).__name__}; expected a name, a path, a tokenizers.Tokenizer or a fast "
                "tokenizer of transformers"
            )
        own = uncut(Tokenizer.from_str(backend.to_str()))
        name = getattr(given, "name_or_path", None) or type(given).__name__
        return cls(str(name), own, getattr(given, "eos_token_id", None))

    def __str__(self) -> str:
        return self.name
