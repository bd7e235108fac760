"""Draw a uniform sample of the documents of many files: exact, whatever the order of files and processes.

The sample is the documents with the smallest hash(seed, PMID) (of other text: hash(seed, text)), in the order of their
hashes. Memory holds some 60 bytes per record up to a limit on the hash, which falls as documents accumulate, to where
the wanted number of tokens is reached; the tokens themselves are on disk. Copies of an article share one hash, and of
identical texts the one with the smallest hash is kept: so the records up to a limit determine the sample up to it.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import io
import itertools
import multiprocessing
import os
import re
import signal
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from olmo.console import Progress
from olmo.tokenizer import encode_documents, load_tokenizer
from scripts.prepare.documents import DELETED, LONGEST, MB, PIECE, TEXT, Record, hash_of, pubmed_records, text_records

BATCH = 2**20  # characters tokenized together
NO_LIMIT = 2**64 - 1
SLACK = 1.25
LARGEST_RATIO = 100  # of unpacked to packed bytes; PubMed's files have 10
WIDE = ("priority", "identity", "order", "text", "process", "start", "tokens")
EVENT = np.dtype([*((name, "u8") for name in WIDE), ("version", "u4"), ("kind", "u1")])  # a Record, its text on disk
Events = NDArray[np.void]

tokenizer_of = functools.cache(load_tokenizer)  # once a process


@dataclass(frozen=True)
class Settings:
    """How a process reads a file."""

    corpus: str
    seed: int
    tokenizer: str
    eos_token_id: int
    dtype: str


class FileRead(NamedTuple):
    """What was in a file; `about` describes the file in about.json."""

    events: Events
    counts: Counter[str]
    about: dict[str, Any]


class Hashing(io.RawIOBase):
    """A binary file that computes its MD5 as it is read."""

    def __init__(self, file: io.FileIO):
        self.file, self.md5 = file, hashlib.md5(usedforsecurity=False)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self.file.readinto(buffer)
        self.md5.update(memoryview(buffer)[:count])
        return count


class Unzipped(gzip.GzipFile):
    """A gzip file that raises ValueError if it unpacks to far more bytes than any text does."""

    def __init__(self, packed: Any, file: io.FileIO):
        super().__init__(fileobj=packed)
        self._file = file  # from which `packed` is read

    def _checked(self, content: bytes) -> bytes:
        if self.tell() > LONGEST + LARGEST_RATIO * self._file.tell():
            raise ValueError(f"unpacks to more than {LARGEST_RATIO} times its size, as no text does")
        return content

    def read(self, size: int | None = -1) -> bytes:
        return self._checked(super().read(size))

    def readline(self, size: int | None = -1) -> bytes:
        return self._checked(super().readline(size))


def read_file(settings: Settings, folder: Path, number: int, path: Path, limit: int) -> FileRead:
    """Read the file with this number; tokens of documents up to `limit` are appended to this process's spill file.

    Raises ValueError that names a damaged file or one in another format, OSError where it is unreadable.
    """
    counts: Counter[str] = Counter()
    events: list[tuple[int, ...]] = []
    with path.open("rb", buffering=0) as file, (folder / f"{os.getpid()}.tokens").open("ab") as spill:
        hashing = Hashing(file)
        raw = io.BufferedReader(hashing, PIECE)
        zipped = raw.peek(2)[:2] == b"\x1f\x8b"
        stream: IO[bytes] = Unzipped(raw, file) if zipped else raw  # type: ignore[assignment]
        if settings.corpus == "pubmed":
            records = pubmed_records(stream, settings.seed, limit, counts)
        else:
            as_json = settings.corpus == "c4" or re.search(r"\.jsonl?(\.gz)?$", path.name) is not None
            records = text_records(stream, settings.seed, limit, as_json, counts)
        try:
            for batch in batches(records):
                texts = [record.text for record in batch if record.kind == TEXT]
                encoded = iter(encode_documents(tokenizer_of(settings.tokenizer), texts, settings.eos_token_id))
                for priority, identity, version, kind, text in batch:
                    ids = next(encoded) if kind == TEXT else []
                    order, same = number << 32 | len(events), hash_of(text.encode(), 0)
                    place = (os.getpid(), spill.tell(), len(ids))
                    events.append(
                        (priority, order if identity is None else identity, order, same, *place, version, kind)
                    )
                    spill.write(np.array(ids, settings.dtype).tobytes())
        except (EOFError, gzip.BadGzipFile, zlib.error, ValueError, ElementTree.ParseError) as error:
            what = "truncated: the gzip stream breaks off" if isinstance(error, EOFError) else error
            raise ValueError(f"{path}: {what}") from error
        counts["bytes"] = stream.tell() if zipped else file.tell()
        about: dict[str, Any] = {"file": path.name, "bytes": file.tell(), "md5": hashing.md5.hexdigest()}
    stated = path.with_name(f"{path.name}.md5")
    if stated.is_file() and about["md5"] not in stated.read_text().lower():
        raise ValueError(f"{path}: does not have the MD5 that {stated.name} states; remove both and download it again")
    return FileRead(np.array(events, EVENT), counts, about)


def batches(records: Iterable[Record]) -> Iterator[list[Record]]:
    """Records in lists of at least BATCH characters, except the last."""
    batch, size = list[Record](), 0
    for record in records:
        batch.append(record)
        size += len(record.text)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    yield batch


def last_of_each(events: Events, group: Sequence[str], by: str) -> Events:
    """Of the events that agree in the fields of `group`, the one with the largest field `by`."""
    ordered = events[np.lexsort([events[by], *(events[field] for field in group)])]
    changes = [ordered[field][1:] != ordered[field][:-1] for field in group]
    return ordered[np.append(np.logical_or.reduce(changes), True)] if len(ordered) else ordered


def resolve(events: Events) -> tuple[Events, dict[str, int]]:
    """The documents (n,) that remain of events, in the order of their priorities, and counts of all records."""
    latest = last_of_each(events, ("identity", "version"), "order")
    articles = last_of_each(latest[latest["kind"] != DELETED], ("identity",), "version")
    texts = articles[articles["kind"] == TEXT]
    texts = texts[np.lexsort([texts["order"], texts["priority"]])]
    first = np.sort(np.unique(texts["text"], return_index=True)[1])
    counts = {"records": int((events["kind"] != DELETED).sum()), "documents": len(first)}
    counts["replaced_or_deleted"] = counts["records"] - len(articles)
    counts["without_text"], counts["same_text"] = len(articles) - len(texts), len(texts) - len(first)
    return texts[first], counts


def collect(
    paths: Sequence[Path], settings: Settings, folder: Path, processes: int, wanted: float
) -> tuple[Events, int, dict[str, Any]]:
    """Read all files, lowering the limit as far as `wanted` tokens allow; spill files are written to `folder`.

    Returns the events (n,) up to the limit, the limit, and what was read.
    """
    limit, counts, inputs = NO_LIMIT, Counter[str](), dict[int, dict[str, Any]]()
    kept, total, most = [np.empty(0, EVENT)], 0, SLACK * wanted
    size = sum(path.stat().st_size for path in paths)
    numbered, running = iter(enumerate(paths)), dict[Future[FileRead], int]()
    with executor(processes) as pool, Progress("reading", size // MB, "MB") as progress:
        while True:
            for number, path in itertools.islice(numbered, processes + 1 - len(running)):
                running[pool.submit(read_file, settings, folder, number, path, limit)] = number
            if not running:
                break
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                events, more, about = done.result()
                counts, inputs[running.pop(done)] = counts + more, about
                kept.append(events[events["priority"] <= limit])
                total += int(kept[-1]["tokens"].sum())
                progress.advance(sum(about["bytes"] for about in inputs.values()) // MB - progress.done)
            if total > most:  # rare: the limit falls by a fifth each time
                kept = [np.concatenate(kept)]
                documents, _ = resolve(kept[0])
                enough = int(np.searchsorted(np.cumsum(documents["tokens"]), wanted))
                limit = int(documents["priority"][enough]) if enough < len(documents) else limit
                kept = [kept[0][kept[0]["priority"] <= limit]]
                total = int(kept[0]["tokens"].sum())
                most = SLACK * max(wanted, total)
    read = {"files": len(paths), **counts, "inputs": [inputs[number] for number in range(len(paths))]}
    return np.concatenate(kept), limit, read


@contextmanager
def executor(processes: int) -> Iterator[Executor]:
    """Spawned processes, without this one's threads; or one thread of this process where one is enough."""
    context = multiprocessing.get_context("spawn")
    with ThreadPoolExecutor(1) if processes == 1 else ProcessPoolExecutor(processes, context, begin_process) as pool:
        try:
            yield pool
        except BaseException:
            for process in multiprocessing.active_children():  # their results are no longer needed
                process.terminate()
            raise


def begin_process() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a process for each core is enough
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # it ends silently; the first process reports the interruption
