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
from tokenizers import Tokenizer
from torch import nn

from analysis.choices import CONFIGURATIONS
from analysis.context import context_length
from analysis.given import Given, GivenTokenizer
from analysis.prefetch import FailedForAll
from analysis.texts import check_text, eos_of, one_each, packed
from olmo import checkpoint
from olmo.config import DataConfig, load
from olmo.data.masks import open_masks
from olmo.data.order import OrderFile, check_places, instances_at
from olmo.data.sources import TokenDataset, TokenFiles, TokenSource, open_source
from olmo.exceptions import ConfigurationError
from olmo.files.paths import provided
from olmo.tokenizer import load_tokenizer, tokenizer_of_folder

# For models of any tokenizer; the last one is a sample of what OLMo was trained on.
_TEXTS = (
    "--data FILE.txt, --data hub:allenai/c4:en:validation:text, or, closest to the paper, "
    "--data hub:emozilla/dolma-v1_7-3B:train:text"
)


@dataclass(frozen=True)
class Instances:
    """Which instances: the first `count` of `data`, or, with `at_most`, as many as it has up to that.

    data: token .npy (file or URL), datasets folder, JSON with `text`, plain text, a run's configuration (.yaml), for
    the first instances of that run, or what a program gives or the hub has (`hub_data.opened`). length: tokens per
    instance, or None for the model's context. order: file or URL of the data order of the run that `data` names.
    tokenizer: for text; None for the checkpoint's. pack: text is packed to full instances; otherwise each document is
    an instance, cut to `length`.
    of_official_run: `data` is the default, tokens of OLMo's tokenizer, which the checkpoint must have.
    """

    data: str | Given
    count: int
    length: int | None = None
    order: str | None = None
    tokenizer: str | GivenTokenizer | None = None
    pack: bool = True
    of_official_run: bool = False
    at_most: bool = False
    _kept: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def tokenizer_name(self) -> str | None:
        """As results record it; None for the model's own."""
        return None if self.tokenizer is None else str(self.tokenizer)

    @property
    def is_text(self) -> bool:
        if isinstance(self.data, Given):
            return self.data.texts is not None
        path = Path(self.data)
        return path.suffix not in (".npy", *CONFIGURATIONS) and not path.is_dir()

    @classmethod
    def official(cls, model_size: str, count: int, order: str | None = None, **more: Any) -> Instances:
        """The first instances of the official run. Raises ConfigurationError where its order is missing."""
        data = str(provided(Path(f"configs/official/OLMo-{model_size}.yaml")))
        if order is None:
            order = f"data/global_indices/{model_size}/global_indices.npy"
            if not Path(order).is_file():
                raise ConfigurationError(
                    f"{order}: no such data order, whose first instances are the default of --data; get it with: bash "
                    f"scripts/get_dataorder.sh --model_size {model_size}; or rebuild only as much as is needed with: "
                    f"python -m scripts.data_order rebuild {data} --first {count} --output {order}; a model with "
                    f"another tokenizer than OLMo's needs text: {_TEXTS}"
                )
        return cls(data, count, order=order, of_official_run=True, **more)

    def check_tokenizer(self, folder: Path) -> None:
        """Raise ConfigurationError where the model of a folder cannot have the tokenizer of the default data."""
        if not self.of_official_run:
            return
        assert isinstance(self.data, str)
        shape = checkpoint.read_config(folder) if checkpoint.is_olmo(folder) else None
        if shape is None or (shape.embedding_size or shape.vocab_size) != load(self.data).model.embedding_size:
            raise ConfigurationError(
                f"--data is missing: {folder} does not have the tokenizer of the default, OLMo's Dolma; give text: "
                f"{_TEXTS}"
            )

    def length_for(self, model: Path | nn.Module) -> int:
        """Tokens per instance, for a model or that of a folder."""
        return self.asked_length or context_length(model)

    @property
    def asked_length(self) -> int | None:
        """Tokens per instance, whatever the model; of rows that a program gives, those of the longest one."""
        return self.length or (self.data.longest if isinstance(self.data, Given) else None)

    def read(self, folder: Path) -> list[NDArray[np.int64]]:
        """The instances for the model of a checkpoint folder, token ids in rows of at most `length_for` it (ragged
        where rows or texts are shorter). They are kept for the next checkpoint, which usually has the same.

        Raises FailedForAll where the data has fewer or cannot be read, ConfigurationError where the folder names no
        tokenizer for text, or no EOS token to pack it.
        """
        length, tokenizer, eos = self.length_for(folder), None, None
        if self.is_text:
            tokenizer = self.tokenizer or tokenizer_of_folder(folder)
            self.check_is_text()
            if tokenizer is None:
                raise ConfigurationError(f"{folder}: names no tokenizer; give --tokenizer")
            opened = self.open_tokenizer(tokenizer)
            own = tokenizer.eos if isinstance(tokenizer, GivenTokenizer) else None
            if self.pack:
                eos = own if own is not None else eos_of(folder, opened)
        return self.rows(length, tokenizer, eos)

    def open_tokenizer(self, tokenizer: str | GivenTokenizer) -> Tokenizer:
        """By its identifier; the last one is kept."""
        if isinstance(tokenizer, GivenTokenizer):
            return tokenizer.tokenizer
        if self._kept.get("identifier") != tokenizer:
            self._kept.update(identifier=tokenizer, tokenizer=load_tokenizer(tokenizer))
        return self._kept["tokenizer"]

    def rows(self, length: int, tokenizer: str | GivenTokenizer | None, eos: int | None) -> list[NDArray[np.int64]]:
        """The instances of at most `length` tokens. tokenizer, eos: of text, the latter of text that is packed."""
        which = (length, tokenizer, eos)
        if self._kept.get("which") != which:
            opened = None if tokenizer is None else self.open_tokenizer(tokenizer)
            with _as_data_error():
                self._kept.update(rows=self._read(length, opened, eos), which=which)
        return self._kept["rows"]

    def check_is_text(self) -> None:
        """Raise FailedForAll where text is no file, or no text."""
        if isinstance(self.data, Given):
            return
        if not Path(self.data).is_file():
            raise FailedForAll(f"{self.data}: no such data (--data)")
        with _as_data_error():
            check_text(Path(self.data))

    def _read(self, length: int, tokenizer: Tokenizer | None, eos: int | None) -> list[NDArray[np.int64]]:
        if isinstance(self.data, Given) and self.data.rows is not None:
            given = self.data.rows
            return [row[:length] for row in given[: len(self._first(len(given), self.data.name))]]
        if self.is_text:
            assert tokenizer is not None
            texts = self.data.texts if isinstance(self.data, Given) else Path(self.data)
            assert texts is not None
            if self.pack:
                assert eos is not None
                return packed(texts, tokenizer, eos, self.count, length, self.at_most)
            return one_each(texts, tokenizer, self.count, length, self.at_most)
        assert isinstance(self.data, str)
        path = Path(self.data)
        if path.suffix in CONFIGURATIONS:
            return self._first_of_run(self.data, length)
        if path.is_dir():
            source: TokenSource = TokenDataset(path, length, length_key="--sequence_length")
        else:
            source = TokenFiles([self.data], length)
        return open_masks(DataConfig(), 0, source).rows(source, self._first(len(source), path), str(path))

    def _first_of_run(self, data: str, length: int) -> list[NDArray[np.int64]]:
        """The first instances of the run of a configuration, each cut to `length` tokens."""
        config = load(data, complete=checkpoint.complete)
        if not (config.data.paths or config.data.dataset_path):
            raise ConfigurationError(f"{data}: names no data; set data.paths or data.dataset_path")
        source = open_source(config.data, config.model.max_sequence_length)
        if self.order is not None:
            if not isinstance(source, TokenFiles):
                raise ConfigurationError(f"--order: {data} names a dataset folder; an order is of token files")
            order = OrderFile(self.order)
            places = order.read(0, len(self._first(len(order), self.order)))
            check_places(order, 0, places, source)
        else:
            first = self._first(len(source), data)
            places = instances_at(first, len(source), config.data_seed, config.epoch or 0, config.data_shuffling)
        masks = open_masks(config.data, config.model.pad_token_id, source)
        return [row[:length] for row in masks.rows(source, places, data)]

    def _first(self, available: int, where: Path | str) -> NDArray[np.int64]:
        if self.at_most and available:
            return np.arange(min(available, self.count))
        if available < self.count:
            asked = "" if self.at_most else f", --data_size asks for {self.count}"
            raise ValueError(f"{where}: {available} instances{asked}")
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
