"""The instances that a measurement sees: rows of token ids, from token files, datasets, texts or a run's own order."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analysis.context import context_length
from analysis.prefetch import FailedForAll
from analysis.texts import check_text, eos_of, one_each, packed
from olmo import checkpoint
from olmo.config import DataConfig, load
from olmo.data.masks import open_masks
from olmo.data.order import OrderFile, check_places, instances_at
from olmo.data.sources import TokenDataset, TokenFiles, TokenSource, open_source
from olmo.exceptions import ConfigurationError
from olmo.tokenizer import load_tokenizer, tokenizer_of_folder

CONFIGURATIONS = (".yaml", ".yml")


@dataclass(frozen=True)
class Instances:
    """Which instances: the first `count` of `data`.

    data: token .npy (file or URL), datasets folder, JSON with `text`, plain text, or a run's configuration (.yaml), for
    the first instances of that run. length: tokens per instance, or None for the model's context. order: file or
    URL of the data order of the run that `data` names. tokenizer: for text; None for the checkpoint's. pack: text is
    packed to full instances; otherwise each document is an instance, cut to `length`.
    of_official_run: `data` is the default, tokens of OLMo's tokenizer, which the checkpoint must have.
    """

    data: str
    count: int
    length: int | None = None
    order: str | None = None
    tokenizer: str | None = None
    pack: bool = True
    of_official_run: bool = False
    _kept: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def is_text(self) -> bool:
        path = Path(self.data)
        return path.suffix not in (".npy", *CONFIGURATIONS) and not path.is_dir()

    @classmethod
    def official(cls, model_size: str, count: int, order: str | None = None, **more: Any) -> Instances:
        """The first instances of the official run. Raises ConfigurationError where one of its files is missing."""
        data = f"configs/official/OLMo-{model_size}.yaml"
        if not Path(data).is_file():
            raise ConfigurationError(f"--data is missing, and the default, {data}, is not in this folder")
        if order is None:
            order = f"data/global_indices/{model_size}/global_indices.npy"
            if not Path(order).is_file():
                raise ConfigurationError(
                    f"{order}: no such data order, whose first instances are the default of --data; get it with: bash "
                    f"scripts/get_dataorder.sh --model_size {model_size}; or rebuild only as much as is needed with: "
                    f"python -m scripts.data_order rebuild {data} --first {count} --output {order}; a model with "
                    "another tokenizer than OLMo's needs --data"
                )
        return cls(data, count, order=order, of_official_run=True, **more)

    def check_tokenizer(self, folder: Path) -> None:
        """Raise ConfigurationError where the model of a folder cannot have the tokenizer of the default data."""
        if not self.of_official_run:
            return
        shape = checkpoint.read_config(folder) if checkpoint.is_olmo(folder) else None
        if shape is None or (shape.embedding_size or shape.vocab_size) != load(self.data).model.embedding_size:
            raise ConfigurationError(
                f"--data is missing: {folder} does not have the tokenizer of the default, OLMo's Dolma; give --data, "
                "text for this model's tokenizer"
            )

    def length_for(self, folder: Path) -> int:
        """Tokens per instance."""
        return self.length or context_length(folder)

    def read(self, folder: Path) -> list[NDArray[np.int64]]:
        """The instances for the model of a checkpoint folder, token ids in rows of at most `length_for` it (ragged
        where rows or texts are shorter). They are kept for the next checkpoint, which usually has the same.

        Raises FailedForAll where the data has fewer or cannot be read, ConfigurationError where the folder names no
        tokenizer for text, or no EOS token to pack it.
        """
        length, identifier, eos = self.length_for(folder), None, None
        if self.is_text:
            identifier = self.tokenizer or tokenizer_of_folder(folder)
            if not Path(self.data).is_file():
                raise FailedForAll(f"{self.data}: no such data (--data)")
            with _as_data_error():
                check_text(Path(self.data))
            if identifier is None:
                raise ConfigurationError(f"{folder}: names no tokenizer; give --tokenizer")
            if self._kept.get("identifier") != identifier:
                self._kept.update(identifier=identifier, tokenizer=load_tokenizer(identifier))
            eos = eos_of(folder, self._kept["tokenizer"]) if self.pack else None
        which = (length, identifier, eos)
        if self._kept.get("which") != which:
            with _as_data_error():
                self._kept.update(rows=self._read(length, eos), which=which)
        return self._kept["rows"]

    def _read(self, length: int, eos: int | None) -> list[NDArray[np.int64]]:
        path = Path(self.data)
        if self.is_text:
            tokenizer = self._kept["tokenizer"]
            if self.pack:
                assert eos is not None
                return packed(path, tokenizer, eos, self.count, length)
            return one_each(path, tokenizer, self.count, length)
        if path.suffix in CONFIGURATIONS:
            return self._first_of_run(length)
        if path.is_dir():
            source: TokenSource = TokenDataset(path, length, length_key="--sequence_length")
        else:
            source = TokenFiles([self.data], length)
        return open_masks(DataConfig(), 0, source).rows(source, self._first(len(source), path), str(path))

    def _first_of_run(self, length: int) -> list[NDArray[np.int64]]:
        """The first instances of the run of a configuration, each cut to `length` tokens."""
        config = load(self.data, complete=checkpoint.complete)
        if not (config.data.paths or config.data.dataset_path):
            raise ConfigurationError(f"{self.data}: names no data; set data.paths or data.dataset_path")
        source = open_source(config.data, config.model.max_sequence_length)
        if self.order is not None:
            if not isinstance(source, TokenFiles):
                raise ConfigurationError(f"--order: {self.data} names a dataset folder; an order is of token files")
            order = OrderFile(self.order)
            places = order.read(0, len(self._first(len(order), self.order)))
            check_places(order, 0, places, source)
        else:
            first = self._first(len(source), self.data)
            places = instances_at(first, len(source), config.data_seed, config.epoch or 0, config.data_shuffling)
        masks = open_masks(config.data, config.model.pad_token_id, source)
        return [row[:length] for row in masks.rows(source, places, self.data)]

    def _first(self, available: int, where: Path | str) -> NDArray[np.int64]:
        if available < self.count:
            raise ValueError(f"{where}: {available} instances, --data_size asks for {self.count}")
        return np.arange(self.count)


@contextmanager
def _as_data_error() -> Iterator[None]:
    try:
        yield
    except ConfigurationError:
        raise
    except (OSError, ValueError) as error:
        raise FailedForAll(str(error)) from error


def digest_of(rows: Sequence[NDArray[np.int64]]) -> str:
    """SHA-256 of instances, which identifies them in results."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(row.astype("<u4").tobytes())
    return digest.hexdigest()
