"""Byte ranges of files on http(s) and S3: many requests at a time, each response verified and cached.

    files = RemoteFiles(["https://host/a.npy", "s3://bucket/b.npy"])
    files.sizes                                  # of all files, from one pass of HEAD requests
    files.read([0, 1], [4096, 0], 4096)          # bytes 4096 to 8191 of the first, then 0 to 4095 of the second

`olmo/net.py` has the clients and the retry; here is what a response must state to be accepted.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .. import net
from ..console import Progress, log
from ..exceptions import ConfigurationError, needs
from ..files.atomic import atomic_path
from ..files.lock import Lock
from ..net import HttpClient, Response, S3Client, TransferInterrupted, check_status, retry

LARGEST = 2**23  # bytes a request; longer ranges are divided, so that a broken request costs little
CACHE_SIZE = 2**32  # bytes of ranges kept; the least recently used ones are deleted first
DIGEST = hashlib.sha256

Item = TypeVar("Item")
Result = TypeVar("Result")


class Changed(ValueError):
    """A file on the server is no longer the one whose size was requested."""


# --- what a response must state ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class File:
    """A remote file as the size pass found it."""

    url: str
    size: int
    tag: str  # strong entity tag, or else the date of the last change; empty without either


def _tag(headers: Mapping[str, str]) -> str:
    tag = headers.get("etag", "")
    return headers.get("last-modified", "") if not tag or tag.startswith("W/") else tag


def file_of(url: str, response: Response) -> File:
    """The file that a response to HEAD describes. Raises OSError, or ValueError where its size is not stated."""
    check_status(url, response)
    if response.headers.get("content-type", "").startswith("text/html"):  # sites that have closed show a page
        raise FileNotFoundError(f"{url}: no such file, a web page is in its place")
    length = response.headers.get("content-length", "")
    if response.status != 200 or not length.isdigit():
        raise ValueError(f"{url}: the server does not state its size")
    return File(url, int(length), _tag(response.headers))


def bytes_of(file: File, start: int, stop: int, response: Response) -> bytes:
    """Bytes [start, stop) of a file from the response to that request.

    Raises Changed where the file is no longer the one that `file` describes, ValueError where the server ignores
    ranges, TransferInterrupted if something else arrived, OSError for a status that brings no file.
    """
    check_status(file.url, response)
    if response.status == 200:
        raise ValueError(
            f"{file.url}: the server ignores byte ranges and would send all {file.size} bytes; download the file and "
            "name the copy"
        )
    stated = response.headers.get("content-range", "")
    if total := re.fullmatch(r"bytes (?:\d+-\d+|\*)/(\d+)", stated):
        if int(total[1]) != file.size:
            raise Changed(
                f"{file.url}: the file has {total[1]} bytes now, it had {file.size} when its size was requested"
            )
        if file.tag and (tag := _tag(response.headers)) and tag != file.tag:
            raise Changed(f"{file.url}: the file has changed on the server ({tag}, it was {file.tag})")
    if response.status != 206 or stated != f"bytes {start}-{stop - 1}/{file.size}":
        raise TransferInterrupted(
            f"asked for bytes {start}-{stop - 1} of {file.size}, the server sends {stated or 'no range'}"
        )
    received = bytearray()
    for piece in response.body:
        received += piece
        if len(received) > stop - start:
            break
    if len(received) != stop - start:
        more = "or more " if len(received) > stop - start else ""
        raise TransferInterrupted(f"{len(received)} {more}of {stop - start} bytes came")
    return bytes(received)


# --- files kept on this machine ----------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Where sizes and ranges are kept: `knowledge-entropy` in $XDG_CACHE_HOME, ~/.cache by default."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "knowledge-entropy"


def _load(path: Path) -> bytes | None:
    """What `_store` wrote, None where there is nothing or something damaged."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    size = DIGEST().digest_size
    if DIGEST(content[size:]).digest() != content[:size]:
        log.warning("%s: damaged; it is fetched again", path)
        return None
    return content[size:]


def _store(path: Path, content: bytes) -> None:
    """Write content behind its hash, atomically. A failure is logged only: it costs time, not correctness."""
    try:
        with atomic_path(path) as partial:
            partial.write_bytes(DIGEST(content).digest() + content)
    except OSError as error:
        log.warning("not cached: %s", error)


def _evict(folder: Path) -> None:
    """Delete the least recently used ranges until the rest fits CACHE_SIZE."""
    try:
        found = sorted(((p.stat().st_mtime, p.stat().st_size, p) for p in folder.glob("*.ranges")), reverse=True)
    except OSError:  # another process deletes them too
        return
    total = 0
    for _, size, path in found:
        total += size
        if total > CACHE_SIZE:
            path.unlink(missing_ok=True)


def _lock(path: Path) -> Lock:
    """One of the processes of this machine that need a file makes it; the others wait for the lock and find it."""
    return Lock(path.with_name(f"{path.name}.lock"), wait=True)


# --- many requests at a time -------------------------------------------------------------------------------------


def _at_once(
    work: Callable[[Item], Result], items: Sequence[Item], urls: Sequence[str], what: str, unit: str
) -> list[Result]:
    """Results of work on all items, WORKERS at a time; the first error ends it."""
    stopped = threading.Event()
    first = os.environ.get("RANK", "0") == "0"  # one of several processes shows the progress
    with ThreadPoolExecutor(net.WORKERS, "remote") as pool, Progress(what, len(items), unit, show=first) as progress:
        try:
            futures = [pool.submit(retry, partial(work, item), url, stopped=stopped) for item, url in zip(items, urls)]
            for future in as_completed(futures):
                future.result()
                progress.advance()
        except BaseException:
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [future.result() for future in futures]


def _runs(files: NDArray[np.int64], starts: NDArray[np.int64], width: int) -> tuple[NDArray[np.int64], ...]:
    """The fewest contiguous runs that hold all records of `width` bytes: file, first byte and end (r,) of each run,
    and the run (n,) of each record."""
    order = np.lexsort((starts, files))
    sorted_files, sorted_starts = files[order], starts[order]
    begins = np.r_[True, (np.diff(sorted_files) != 0) | (np.diff(sorted_starts) > width)]
    belongs = np.empty_like(files)
    belongs[order] = np.cumsum(begins) - 1
    return sorted_files[begins], sorted_starts[begins], sorted_starts[np.r_[begins[1:], True]] + width, belongs


class RemoteFiles:
    """Remote files of known sizes, read by byte ranges.

    Sizes are requested once, all at the same time, and cached in `cache` (default: `cache_folder()`). They are
    valid until a read finds that a file has changed: that is an error, and the next start requests them again.
    """

    def __init__(self, urls: Sequence[str], cache: Path | None = None, fresh: bool = False):
        for url in urls:
            if not re.match(r"https?://[^/]+/.|(s3|r2)://[^/]+/.", url):
                raise ConfigurationError(f"{url}: neither http(s)://HOST/PATH nor s3:// or r2://BUCKET/KEY")
            if not url.startswith("http"):
                needs("boto3", "s3", url)
        self.cache = cache_folder() if cache is None else cache
        self._clients: dict[str, HttpClient | S3Client] = {}
        self._making = threading.Lock()
        self._described = self.cache / f"{DIGEST(json.dumps(list(urls)).encode()).hexdigest()[:32]}.sizes"
        with _lock(self._described):
            known = None if fresh else _load(self._described)
            # URLs are not written to the cache, only hashed in its name: they may contain a signature.
            kept = [] if known is None else [File(url, *about) for url, about in zip(urls, json.loads(known))]
            self.files = kept or self._describe(urls)
        self.sizes = [file.size for file in self.files]

    def _describe(self, urls: Sequence[str]) -> list[File]:
        def describe(url: str) -> File:
            with self._client(url).request(url, None) as response:
                return file_of(url, response)

        distinct = list(dict.fromkeys(urls))
        found = dict(zip(distinct, _at_once(describe, distinct, distinct, "sizes of remote files", "files")))
        files = [found[url] for url in urls]
        _store(self._described, json.dumps([(file.size, file.tag) for file in files]).encode())
        return files

    def _client(self, url: str) -> HttpClient | S3Client:
        scheme = url.partition("://")[0].replace("https", "http")
        with self._making:
            if scheme not in self._clients:
                self._clients[scheme] = HttpClient() if scheme == "http" else S3Client(scheme)
            return self._clients[scheme]

    def read(self, files: ArrayLike, starts: ArrayLike, width: int, keep: bool = True) -> bytes:
        """Records of `width` bytes, end to end: record k begins at byte starts[k] of file number files[k].

        Adjacent records are one request. `keep` caches them. Raises ValueError for
        a record beyond its file, OSError after several interrupted attempts, and what else `bytes_of` raises.
        """
        numbers, begins = np.asarray(files, dtype=np.int64), np.asarray(starts, dtype=np.int64)
        outside = (begins < 0) | (begins + width > np.asarray(self.sizes)[numbers])
        if outside.any():
            record = int(outside.argmax())
            file = self.files[numbers[record]]
            raise ValueError(f"{file.url}: bytes from {begins[record]} on are beyond its {file.size}")
        if not len(numbers):
            return b""
        if not keep or len(numbers) * width > CACHE_SIZE // 8:
            return self._fetch(numbers, begins, width)
        # Named by all that the bytes depend on: which bytes of which version of which files.
        used = [(number, *astuple(self.files[number])) for number in np.unique(numbers).tolist()]
        digest = DIGEST(json.dumps([used, width]).encode())
        digest.update(numbers.astype("<i8").tobytes() + begins.astype("<i8").tobytes())
        path = self.cache / f"{digest.hexdigest()[:32]}.ranges"
        with _lock(path):
            content = _load(path)
            if content is None:
                content = self._fetch(numbers, begins, width)
                _store(path, content)
                _evict(self.cache)
            else:
                with suppress(OSError):  # another process may just have evicted it
                    os.utime(path)
        return content

    def _fetch(self, files: NDArray[np.int64], starts: NDArray[np.int64], width: int) -> bytes:
        *columns, belongs = _runs(files, starts, width)
        runs = list(zip(*(column.tolist() for column in columns)))
        pieces = [
            (self.files[file], start, min(start + LARGEST, end))
            for file, begin, end in runs
            for start in range(begin, end, LARGEST)
        ]

        def fetch(piece: tuple[File, int, int]) -> bytes:
            file, start, stop = piece
            with self._client(file.url).request(file.url, f"bytes={start}-{stop - 1}") as response:
                return bytes_of(file, start, stop, response)

        try:
            parts = iter(_at_once(fetch, pieces, [file.url for file, _, _ in pieces], "reading", "ranges"))
        except Changed:
            self._described.unlink(missing_ok=True)
            raise
        content = [b"".join(next(parts) for _ in range(begin, end, LARGEST)) for _, begin, end in runs]
        places = starts - columns[1][belongs]
        return b"".join(content[run][place : place + width] for run, place in zip(belongs.tolist(), places.tolist()))
