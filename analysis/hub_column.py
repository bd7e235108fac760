"""The values of one column of a dataset on the Hugging Face hub, streamed from the first one on and kept here.

The beginning of a column stays in `cache_folder()`, in pieces of JSON lines that their names number:
`{first}-{end}.jsonl`, the last one of the column `{first}-{end}.last.jsonl`. What one command has read, the next one
reads from there, and a command that needs more continues where the pieces end, also after it was killed.

When a connection breaks off, a new stream continues behind the last complete piece. `datasets` itself would repeat only
the read that failed, which in a gzip file can lose what the failed one had unpacked, and documents with it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

from olmo.console import Progress
from olmo.data.ranges import cache_folder
from olmo.exceptions import ConfigurationError, short_message
from olmo.files.atomic import write_text
from olmo.files.paths import read_json
from olmo.net import TransferInterrupted, describe_failure, retry

MASK = "attention_mask"
PIECE = 2**20  # characters, or token ids, of a piece at least
FORMATS = ("parquet", "json", "csv", "text", "arrow")  # of files that `datasets` reads without decoding anything else
_MB = 10**6
# Modules whose errors without a response are those of a connection.
_CLIENTS = ("httpx", "httpcore", "requests", "urllib3", "aiohttp")


@dataclass(frozen=True)
class HubColumn:
    """A column of texts, or of rows of token ids, in one commit of a dataset on the hub."""

    dataset: str
    commit: str
    config: str
    split: str
    column: str
    is_text: bool
    is_masked: bool = False  # whether the column MASK states which of its tokens are padding

    def __str__(self) -> str:
        """The name by which --data finds the same instances again."""
        return f"hub:{self.dataset}@{self.commit}:{self.config}:{self.split}:{self.column}"

    @property
    def folder(self) -> Path:
        """Where its first values are kept."""
        return cache_folder() / "hub" / hashlib.sha256(str(self).encode()).hexdigest()[:32]


class Values:
    """The values of a column in order: texts, or lists of token ids without padding.

    name: of the data, in errors. show: progress. Iterating raises ConfigurationError for a value that is missing or of
    another type, OSError where the hub is unreachable for several attempts, and as `failure`.
    """

    def __init__(self, column: HubColumn, name: str, show: bool = True):
        self._column, self._name, self._show = column, name, show
        self._stream: _Stream | None = None

    def __iter__(self) -> Iterator[Any]:
        first, is_last, streamed = 0, False, 0
        pieces = {_numbers(path)[0]: path for path in self._column.folder.glob("*.jsonl")}
        with Progress(f"reading {self._name}", 0, "MB", show=self._show) as progress:
            while not is_last:
                piece = pieces.get(first)
                if piece is None:
                    piece = self._next(first)
                    streamed += piece.stat().st_size
                    progress.advance(streamed // _MB - progress.done)
                yield from _lines(piece)
                first, is_last = _numbers(piece)[1], piece.name.endswith(".last.jsonl")

    def _next(self, first: int) -> Path:
        """Stream the piece that begins with value number `first`, and write it."""

        def attempt() -> tuple[list[Any], bool]:
            try:
                with quiet():
                    if self._stream is None or self._stream.place != first:
                        self._stream = _Stream(self._column, first)
                    return self._stream.piece()
            except Exception as error:  # of many types, from all libraries below
                self._stream = None
                raise failure(error, self._name, self._column.dataset) from error

        values, ended = retry(attempt, self._name, advice="; the same command continues from here")
        folder, end = self._column.folder, first + len(values)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{first:09d}-{end:09d}{'.last' if ended else ''}.jsonl"
        write_text(path, "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values))
        if self._stream is not None and not ended:
            write_text(_resume_of(self._column), json.dumps(self._stream.state()))
        return path


class _Stream:
    """An open stream of a column, whose next value has the number `place`."""

    def __init__(self, column: HubColumn, first: int):
        import datasets

        self._column, self.place = column, first
        wanted = [column.column, MASK] if column.is_masked else [column.column]
        of_splits = streams(column.dataset, column.commit, column.config, wanted)
        self._stream = of_splits[column.split].select_columns(wanted)
        self._version = datasets.__version__
        self._skipped = 0  # values; the form of the stream's state depends on whether it skips any
        if first:
            resume = read_json(_resume_of(column)) if _resume_of(column).is_file() else {}
            is_next = "skipped" in resume and (resume["first"], resume["datasets"]) == (first, self._version)
            # Else of a command that was killed, or that had another version's form of a state.
            self._skipped = resume["skipped"] if is_next else first
            if self._skipped:
                self._stream = self._stream.skip(self._skipped)
            if is_next:
                self._stream.load_state_dict(resume["state"])
        self._rows = iter(self._stream)

    def state(self) -> dict[str, Any]:
        about = {"first": self.place, "datasets": self._version, "skipped": self._skipped}
        return {**about, "state": self._stream.state_dict()}

    def piece(self) -> tuple[list[Any], bool]:
        """The next values, and whether they are the last ones."""
        values, size = list[Any](), 0
        for row in self._rows:
            values.append(self._value(row, self.place + len(values)))
            size += len(values[-1])
            if size >= PIECE:
                self.place += len(values)
                return values, False
        return values, True

    def _value(self, row: dict[str, Any], number: int) -> Any:
        value = row.get(self._column.column)
        where = f"row {number} of column '{self._column.column}'"
        if value is None:
            raise ConfigurationError(f"{where} has no value")
        if self._column.is_text:
            if not isinstance(value, str):
                raise ConfigurationError(f"{where} holds {type(value).__name__}, not text")
            return value
        if not isinstance(value, list) or not all(type(token) is int and token >= 0 for token in value):
            raise ConfigurationError(f"{where} is not a list of token ids, whole numbers from 0")
        mask = row.get(MASK)
        if mask is not None and len(mask) != len(value):
            raise ConfigurationError(f"{where} has {len(value)} tokens, its {MASK} {len(mask)}")
        return value if mask is None else [token for token, counts in zip(value, mask) if counts]


def _numbers(piece: Path) -> tuple[int, int]:
    """The number of the first value of a piece, and that of the first one behind it."""
    first, end = piece.name.partition(".")[0].split("-")
    return int(first), int(end)


def _resume_of(column: HubColumn) -> Path:
    """Where the position of the stream behind the last piece is kept."""
    return column.folder / "resume.json"


def _lines(path: Path) -> Iterator[Any]:
    with path.open(encoding="utf-8", newline="\n") as file:
        for line in file:
            try:
                yield json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}: damaged; delete it: {error}") from error


def streams(dataset: str, commit: str, config: str, columns: Sequence[str] = ()) -> dict[str, Any]:
    """A `datasets.IterableDataset` for each split of a configuration; of Parquet files only these columns are read.

    Raises ConfigurationError for files of other formats than FORMATS.
    """
    builder = _builder(dataset, commit, config)
    format_of = type(builder).__module__.rpartition(".")[2]
    if format_of not in FORMATS:
        raise ConfigurationError(f"holds {format_of} files; readable are {', '.join(FORMATS)}")
    if columns and format_of == "parquet":
        _builder.cache_clear()
        builder.config.columns = columns
    return builder.as_streaming_dataset()


@lru_cache(1)
def _builder(dataset: str, commit: str, config: str) -> Any:
    """The builder of a configuration. It is kept, as of JSON it learns the columns by reading what is streamed then."""
    import datasets

    return datasets.load_dataset_builder(dataset, config, revision=commit)


@contextmanager
def quiet() -> Iterator[None]:
    """`datasets` and the hub's client without log lines and bars, and without attempts of its own to repeat a read."""
    import datasets
    from huggingface_hub import utils

    attempts = [name for name in vars(datasets.config) if name.startswith("STREAMING_")]
    level, hub_level = datasets.logging.get_verbosity(), utils.logging.get_verbosity()
    with ExitStack() as stack:
        for name in attempts:
            stack.callback(setattr, datasets.config, name, getattr(datasets.config, name))
            setattr(datasets.config, name, 1 if name.endswith("MAX_RETRIES") else 0)
        stack.callback(datasets.logging.set_verbosity, level)
        stack.callback(utils.logging.set_verbosity, hub_level)
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)
        utils.logging.set_verbosity_error()
        for library in (datasets, utils):
            if not library.are_progress_bars_disabled():
                library.disable_progress_bars()
                stack.callback(library.enable_progress_bars)
        yield


def failure(error: Exception, name: str, dataset: str) -> Exception:
    """What to raise for an error of reading a dataset, in one line that begins with `name`: TransferInterrupted if
    another attempt may succeed, PermissionError where it needs a login, ConfigurationError where it does not exist."""
    from huggingface_hub.utils import GatedRepoError, OfflineModeIsEnabled, RepositoryNotFoundError

    chain, cause = list[BaseException](), cast(BaseException | None, error)
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    if any(isinstance(one, GatedRepoError) or "is a gated dataset" in str(one) for one in chain):
        return PermissionError(
            f"{name}: access needs its owner's consent: ask at https://huggingface.co/datasets/{dataset}, then log in "
            "with: hf auth login"
        )
    if any(isinstance(one, RepositoryNotFoundError) for one in chain):
        return ConfigurationError(
            f"{name}: the hub has no dataset {dataset}, or it is private: then log in with: hf auth login"
        )
    if any(isinstance(one, OfflineModeIsEnabled) for one in chain):
        return OSError(f"{name}: not read yet, and HF_HUB_OFFLINE is set: unset it, or name a file")
    if any(map(_may_pass, chain)):
        return TransferInterrupted(describe_failure(next(filter(_may_pass, chain))))
    if isinstance(error, OSError) and error.errno and error.filename:
        return error  # of a file on this machine
    message = short_message(error)
    if "zstd not supported" in message:
        return ImportError(
            f"{name}: its files are compressed with zstd; install what reads them: pip install zstandard"
        )
    kind = ConfigurationError if isinstance(error, ConfigurationError) else ValueError
    return kind(f"{name}: {message}")


def _may_pass(error: BaseException) -> bool:
    """Whether an error is that of a connection, or of a server that has a problem of its own."""
    if (response := getattr(error, "response", None)) is not None:
        return response.status_code >= 500 or response.status_code in (408, 429)
    return isinstance(error, (ConnectionError, TimeoutError)) or type(error).__module__.split(".")[0] in _CLIENTS
