"""Text as data: its documents packed to full instances, as in training, or an instance each.

The documents are those that `scripts.prepare_pubmed` packs for training: each object of JSON with `text` (a list, or
one a line), or a plain text as it is; after each of them the EOS token. Compressed files (gzip) are read too.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from olmo import checkpoint
from olmo.exceptions import ConfigurationError
from olmo.tokenizer import document_end, encode, encode_documents

_BATCH = 2**20  # characters encoded together
_SAMPLE = 2**16  # characters of a plain text that are encoded first, to learn how many make a token
_UNSURE = 64  # last tokens of a text that is cut, which may be others than in the complete text


class Texts(NamedTuple):
    """Documents that are no file: from a program, or a stream."""

    name: str  # of their source, in errors and results
    documents: Iterable[str]


def packed(
    source: Path | Texts, tokenizer: Tokenizer, eos: int, count: int, length: int, at_most: bool = False
) -> list[NDArray[np.int64]]:
    """`count` instances of `length` tokens, filled with the documents of a source, EOS after each; `at_most`: fewer
    where the source ends.

    Raises ValueError where the source has fewer tokens, or too few for a single instance.
    """
    tokens = np.empty(count * length, dtype=np.int64)
    batches: Iterator[list[list[int]]]
    if isinstance(source, Path) and not _is_json(source):
        batches = iter([[_beginning(source, tokenizer, eos, len(tokens))]])
    else:
        batches = (encode_documents(tokenizer, batch, eos) for batch in _batches(_documents(source)))
    written = fill(tokens, (np.array(ids, dtype=np.int64) for batch in batches for ids in batch))
    found = written // length
    if found < (1 if at_most else count):
        fitting = f"--data_size {found}, " if found else ""
        raise ValueError(
            f"{_name(source)}: {written} tokens, {found} instances of {length}"
            + ("" if at_most else f"; --data_size asks for {count}")
            + f": use {fitting}a smaller --sequence_length or more text"
        )
    return list(tokens[: found * length].reshape(found, length))


def _beginning(path: Path, tokenizer: Tokenizer, eos: int, needed: int) -> list[int]:
    """At least `needed` tokens of a plain text, or all of them and EOS; only as much is encoded as that takes."""
    text, most = "", _SAMPLE
    with _opened(path) as file:
        while True:
            text += file.read(most - len(text))
            if not text.strip() and len(text) < most:
                return []
            [ids] = encode_documents(tokenizer, [text], eos)
            if len(text) < most:
                return ids
            if len(ids) > needed + _UNSURE:
                return ids[:-_UNSURE]
            most = max(2 * most, int(1.1 * len(text) / len(ids) * (needed + _UNSURE)))


def fill(tokens: NDArray[Any], documents: Iterable[NDArray[Any]]) -> int:
    """Fill `tokens` (size,) with documents (n,) in sequence until it is full; returns the number of ids written."""
    place = 0
    for document in documents:
        piece = document[: len(tokens) - place]
        tokens[place : place + len(piece)] = piece
        place += len(piece)
        if place == len(tokens):
            break
    return place


def one_each(
    source: Path | Texts, tokenizer: Tokenizer, count: int, length: int, at_most: bool = False
) -> list[NDArray[np.int64]]:
    """The first `count` texts that have tokens, each cut to `length`; in a plain text they are its paragraphs.

    Raises ValueError where the source has fewer, unless `at_most`, or none.
    """
    rows: list[NDArray[np.int64]] = []
    texts = _paragraphs(source) if isinstance(source, Path) and not _is_json(source) else _documents(source)
    for batch in _batches(texts):
        rows += [np.array(ids[:length], dtype=np.int64) for ids in encode(tokenizer, batch) if ids]
        if len(rows) >= count:
            return rows[:count]
    if rows and at_most:
        return rows
    found = len(rows)
    separated = "texts are separated by blank lines, or JSON objects; " if isinstance(source, Path) else ""
    raise ValueError(
        f"{_name(source)}: {found} {'text' if found == 1 else 'texts'}"
        + ("; " if at_most else f", --data_size asks for {count}; ")
        + f"{separated}use {f'--data_size {found} or ' if found else ''}more text"
    )


def _name(source: Path | Texts) -> str:
    return str(source) if isinstance(source, Path) else source.name


def eos_of(folder: Path, tokenizer: Tokenizer) -> int:
    """The id that ends a document for the model of a checkpoint folder. Raises ConfigurationError where it has none."""
    transformers = checkpoint.transformers_config(folder) is not None
    eos = document_end(folder) if transformers else checkpoint.read_config(folder).eos_token_id
    if eos is None or tokenizer.id_to_token(eos) is None:
        what = (
            "no token that ends a document" if eos is None else f"token {eos} ends a document, the tokenizer has none"
        )
        raise ConfigurationError(
            f"{folder}: {what}; --pack none measures each text by itself, or name its own tokenizer with --tokenizer"
        )
    return eos


def _is_json(path: Path) -> bool:
    return _suffix(path) in (".json", ".jsonl")


def _suffix(path: Path) -> str:
    return path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix


@contextmanager
def _opened(path: Path) -> Iterator[IO[str]]:
    """A text file, compressed or not; ValueError where it is neither."""
    with path.open("rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
    try:
        with (gzip.open if zipped else open)(path, "rt", encoding="utf-8") as file:
            yield file
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: not UTF-8 text; --data is a token file named .npy, a datasets folder, JSON with 'text', "
            "or plain text"
        ) from error
    except (EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: truncated or damaged: {error}") from error


def check_text(path: Path) -> None:
    """Raise ValueError for a file that does not begin as text."""
    with _opened(path) as file:
        file.read(1000)


def _documents(source: Path | Texts) -> Iterator[str]:
    """Texts, of a JSON file those of its objects (`text` or `train_context`); those of white space alone are left
    out."""
    if isinstance(source, Texts):
        yield from (text for text in source.documents if text.strip())
        return
    path = source
    with _opened(path) as file:
        if _suffix(path) == ".jsonl":
            texts = _texts_of_lines(file, path)
        else:
            content = file.read()
            try:
                texts = _texts_of(json.loads(content), f"{path}: ")
            except json.JSONDecodeError as error:
                if not error.msg.startswith("Extra data"):
                    raise ValueError(f"{path}: not JSON: {error}") from error
                texts = _texts_of_lines(content.splitlines(), path)  # an object a line, as Dolma and C4 name it
        yield from (text for text in texts if text.strip())


def _paragraphs(path: Path) -> Iterator[str]:
    with _opened(path) as file:
        yield from (text.strip() for text in file.read().split("\n\n") if text.strip())


def _texts_of_lines(lines: Iterable[str], path: Path) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        where = f"{path}: line {number}: "
        try:
            parsed = json.loads(line) if line.strip() else []
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}not JSON: {error}") from error
        yield from _texts_of(parsed, where)


def _texts_of(parsed: Any, where: str) -> Iterator[str]:
    for item in parsed if isinstance(parsed, list) else [parsed]:
        named = [item[key] for key in ("text", "train_context") if isinstance(item, dict) and key in item]
        if not named or not isinstance(named[0], str):
            raise ValueError(f"{where}expected objects with 'text'")
        yield named[0]


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Texts in lists of about _BATCH characters."""
    batch, size = list[str](), 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    yield batch
