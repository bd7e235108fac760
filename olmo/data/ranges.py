"""Byte ranges of files on http(s) and S3, many at a time, each verified, and kept so that nothing is asked for twice.

    files = RemoteFiles(["https://host/a.npy", "s3://bucket/b.npy"])
    files.sizes                                  # of all files, from one pass of HEAD requests
    files.read([0, 1], [4096, 0], 4096)          # bytes 4096 to 8191 of the first, then 0 to 4095 of the second

The clients are requests, which is here anyway and knows proxies and certificates, with one pool of connections for all
threads, and boto3, which knows S3's credentials, regions and endpoints. Both only carry: what an answer must say to be
believed, and what is tried again, is the same for both and stands here.

`s3://` and `r2://` take credentials as boto3 finds them, a profile from S3_PROFILE or R2_PROFILE, and go unsigned, as
public buckets want it, where there are none. R2_ENDPOINT_URL is the endpoint of `r2://`.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import random
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import astuple, dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import requests
from numpy.typing import ArrayLike, NDArray

from ..console import Progress
from ..exceptions import ConfigurationError

WORKERS = 32  # requests at a time; what counts is the way to the server and back
ATTEMPTS = 5
WAIT = 0.5  # seconds before the second attempt, about twice as long before each further one
TIMEOUT = (10, 60)  # seconds to connect, and between two pieces
LARGEST = 2**23  # bytes a request; what is longer comes in several, so that a broken one costs little
CACHE_SIZE = 2**32  # bytes of ranges kept; the least recently used ones go first
DIGEST = hashlib.sha256

log = logging.getLogger("olmo")
Item = TypeVar("Item")
Result = TypeVar("Result")


class Interrupted(OSError):
    """A transfer that brought less than was asked for, or nothing; a further attempt may succeed."""


class Changed(ValueError):
    """A file is no longer the one whose size was asked for."""


def reason(error: BaseException) -> str:
    """Why a request failed: the server's words, or the system's, which libraries wrap in several layers."""
    if (response := getattr(error, "response", None)) is not None:
        phrase = getattr(response, "reason_phrase", None) or getattr(response, "reason", None)  # httpx's, requests'
        return f"{response.status_code} {phrase or ''}".rstrip()
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, requests.exceptions.ChunkedEncodingError):
        return "the connection broke off"
    return str(error) if isinstance(error, Interrupted) else type(error).__name__


# --- clients -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """What a server said; the body has not been read yet."""

    status: int
    headers: Mapping[str, str]  # names in small letters
    body: Iterator[bytes]


class Client(Protocol):
    """A way to ask for a file or, with `part` (a Range header's value), for a part of it.

    Raises Interrupted where no whole answer came; any status is an answer.
    """

    def ask(self, url: str, part: str | None) -> Any:
        """A context manager that gives an Answer; without `part` the answer has no body (HEAD)."""


class Http:
    def __init__(self) -> None:
        self.session = requests.Session()
        # Compressed, a file has neither its size nor its ranges.
        self.session.headers["Accept-Encoding"] = "identity"
        for scheme in ("http://", "https://"):
            self.session.mount(scheme, requests.adapters.HTTPAdapter(pool_maxsize=WORKERS))

    @contextmanager
    def ask(self, url: str, part: str | None) -> Iterator[Answer]:
        headers = {} if part is None else {"Range": part}
        method = "HEAD" if part is None else "GET"
        try:
            # Streamed, so that a server which sends more than was asked for is not listened to.
            with self.session.request(
                method, url, headers=headers, stream=True, timeout=TIMEOUT, allow_redirects=True
            ) as response:
                named = {name.lower(): value for name, value in response.headers.items()}
                yield Answer(response.status_code, named, response.iter_content(2**20))
        except requests.exceptions.InvalidURL as error:
            raise ConfigurationError(f"{url}: {error}") from error
        except requests.RequestException as error:
            raise Interrupted(reason(error)) from error


def s3_client(scheme: str, attempts: int = 1, writes: bool = False) -> Any:
    """boto3's client for `s3://` or `r2://`, which several threads may use; without credentials it goes unsigned.

    attempts: of each request, by boto3 itself. Raises ConfigurationError for a profile or an endpoint that is none,
    and where there are no credentials but what `writes` needs them.
    """
    import boto3  # a third of a second that only S3 is worth
    import botocore
    from botocore.config import Config

    endpoint = None
    if scheme == "r2" and not (endpoint := os.environ.get("R2_ENDPOINT_URL")):
        raise ConfigurationError("r2:// needs the environment variable R2_ENDPOINT_URL, the address of its S3 API")
    try:
        session = boto3.Session(profile_name=os.environ.get(profile := f"{scheme.upper()}_PROFILE"))
        signed = session.get_credentials() is not None
        if writes and not signed:
            raise ConfigurationError(
                f"{scheme}://: no credentials to write with; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or name "
                f"a profile of ~/.aws/credentials in {profile}"
            )
        connect, read = TIMEOUT
        return session.client(
            "s3",
            endpoint_url=endpoint,
            # R2 has no regions, and to S3 this is the one that knows where all buckets lie.
            region_name=session.region_name or "us-east-1",
            config=Config(
                retries={"mode": "standard", "total_max_attempts": attempts},
                max_pool_connections=WORKERS,
                connect_timeout=connect,
                read_timeout=read,
                **({} if signed else {"signature_version": botocore.UNSIGNED}),
            ),
        )
    except (botocore.exceptions.BotoCoreError, ValueError) as error:  # a profile or an endpoint that is none
        if isinstance(error, ConfigurationError):
            raise
        raise ConfigurationError(f"{scheme}://: {error}") from error


class S3:
    def __init__(self, scheme: str) -> None:
        self.client = s3_client(scheme)  # further attempts are ours

    @contextmanager
    def ask(self, url: str, part: str | None) -> Iterator[Answer]:
        from botocore.exceptions import (
            BotoCoreError,
            ClientError,
            ConnectionError,
            HTTPClientError,
            IncompleteReadError,
        )

        bucket, _, key = url.partition("://")[2].partition("/")
        try:
            try:
                if part is None:
                    said, body = self.client.head_object(Bucket=bucket, Key=key), None
                else:
                    said = self.client.get_object(Bucket=bucket, Key=key, Range=part)
                    body = said["Body"]
            except ClientError as error:
                said, body = error.response, None
            about = said["ResponseMetadata"]
            try:
                headers = {name.lower(): value for name, value in about.get("HTTPHeaders", {}).items()}
                yield Answer(about["HTTPStatusCode"], headers, body.iter_chunks(2**20) if body else iter(()))
            finally:
                if body is not None:
                    body.close()
        except (ConnectionError, HTTPClientError, IncompleteReadError) as error:
            raise Interrupted(reason(error)) from error
        except BotoCoreError as error:
            raise OSError(f"{url}: {error}") from error


# --- what an answer must say -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class File:
    """A remote file as the size pass found it."""

    url: str
    size: int
    tag: str  # entity tag that vouches for every byte, or else the date of the last change; empty without either


def _tag(headers: Mapping[str, str]) -> str:
    tag = headers.get("etag", "")
    return headers.get("last-modified", "") if not tag or tag.startswith("W/") else tag


def _check_status(url: str, answer: Answer) -> None:
    """Raise Interrupted for what may pass, another OSError for any other status that brings no file."""
    status = answer.status
    phrase = HTTPStatus(status).phrase if status in HTTPStatus._value2member_map_ else ""
    said = f"{url}: {status} {phrase}".rstrip()
    if status in (408, 425, 429) or status >= 500:
        raise Interrupted(f"{status} {phrase}".rstrip())
    if status in (404, 410):
        raise FileNotFoundError(f"{said}: no such file")
    if status in (401, 403):  # object stores answer so for what is not there, too
        raise PermissionError(f"{said}: not there, or not for you to read")
    if status not in (200, 206, 416):
        raise OSError(said)
    if answer.headers.get("content-encoding", "identity") != "identity":
        raise ValueError(f"{url}: the server compresses it ({answer.headers['content-encoding']}), its bytes unknown")


def file_of(url: str, answer: Answer) -> File:
    """The file that an answer to HEAD describes. Raises OSError, or ValueError where its size is not stated."""
    _check_status(url, answer)
    if answer.headers.get("content-type", "").startswith("text/html"):  # sites that are gone show a page
        raise FileNotFoundError(f"{url}: no such file, a web page is in its place")
    length = answer.headers.get("content-length", "")
    if answer.status != 200 or not length.isdigit():
        raise ValueError(f"{url}: the server does not state its size")
    return File(url, int(length), _tag(answer.headers))


def bytes_of(file: File, start: int, stop: int, answer: Answer) -> bytes:
    """Bytes [start, stop) of a file from the answer to that request.

    Raises Changed where the file is no longer the one that `file` describes, ValueError where the server ignores
    ranges, Interrupted where less or something else came, OSError for a status that brings no file.
    """
    _check_status(file.url, answer)
    if answer.status == 200:
        raise ValueError(
            f"{file.url}: the server ignores byte ranges and would send all {file.size} bytes; download the file and "
            "name the copy"
        )
    stated = answer.headers.get("content-range", "")
    if total := re.fullmatch(r"bytes (?:\d+-\d+|\*)/(\d+)", stated):
        if int(total[1]) != file.size:
            raise Changed(f"{file.url}: the file has {total[1]} bytes now, it had {file.size} when its size was asked")
        if file.tag and (tag := _tag(answer.headers)) and tag != file.tag:
            raise Changed(f"{file.url}: the file has changed on the server ({tag}, it was {file.tag})")
    if answer.status != 206 or stated != f"bytes {start}-{stop - 1}/{file.size}":
        raise Interrupted(f"asked for bytes {start}-{stop - 1} of {file.size}, the server sends {stated or 'no range'}")
    came = bytearray()
    for piece in answer.body:
        came += piece
        if len(came) > stop - start:
            break
    if len(came) != stop - start:
        more = "or more " if len(came) > stop - start else ""
        raise Interrupted(f"{len(came)} {more}of {stop - start} bytes came")
    return bytes(came)


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
        log.warning("%s: damaged, it is made anew", path)
        return None
    return content[size:]


def _store(path: Path, content: bytes) -> None:
    """Write content behind its hash, whole or not at all. A cache that cannot be written costs time, not the run."""
    partial = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(DIGEST(content).digest())
            file.write(content)
        partial.replace(path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        log.warning("%s: not kept: %s", path, error.strerror or error)


def _evict(folder: Path) -> None:
    """Remove the least recently used ranges until the rest fits CACHE_SIZE."""
    try:
        found = sorted(((p.stat().st_mtime, p.stat().st_size, p) for p in folder.glob("*.ranges")), reverse=True)
    except OSError:  # another process removes them too
        return
    total = 0
    for _, size, path in found:
        total += size
        if total > CACHE_SIZE:
            path.unlink(missing_ok=True)


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Among the processes of this machine that want one file, one makes it; the others wait, and find it.

    The empty lock file stays. In a folder of hashes sixteen do for all files.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.with_name(f"lock-{path.name[0]}").open("wb")
    except OSError:
        yield
        return
    with lock:
        with suppress(OSError):  # of a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


# --- many requests at a time -------------------------------------------------------------------------------------


def _patiently(work: Callable[[Item], Result], item: Item, url: str, stopped: threading.Event) -> Result:
    """The result of work, tried again while it is Interrupted; then OSError."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return work(item)
        except Interrupted as error:
            # Not all at the same moment: the server may have been asked too much.
            pause = WAIT * 2 ** (attempt - 1) * (0.5 + random.random())
            if attempt == ATTEMPTS or stopped.wait(pause):
                raise OSError(f"{url}: {error} ({attempt} attempts)") from error
    raise AssertionError


def _at_once(
    work: Callable[[Item], Result], items: Sequence[Item], urls: Sequence[str], what: str, unit: str
) -> list[Result]:
    """Results of work on all items, WORKERS at a time; the first error ends it."""
    results: dict[int, Result] = {}
    stopped = threading.Event()
    first = os.environ.get("RANK", "0") == "0"  # of several processes one shows how far it is
    with ThreadPoolExecutor(WORKERS, "remote") as pool, Progress(what, len(items), unit, show=first) as progress:
        try:
            futures = {
                pool.submit(_patiently, work, item, url, stopped): number
                for number, (item, url) in enumerate(zip(items, urls))
            }
            for future in as_completed(futures):
                results[futures[future]] = future.result()
                progress.advance()
        except BaseException:
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [results[number] for number in range(len(items))]


@dataclass
class _Run:
    """Bytes of one file that are wanted without a gap."""

    file: int
    start: int
    stop: int


def _runs(files: NDArray[np.int64], starts: NDArray[np.int64], width: int) -> tuple[list[_Run], NDArray[np.int64]]:
    """The fewest runs that hold all records of `width` bytes, and the run (n,) of each record."""
    runs: list[_Run] = []
    belongs = np.empty(len(files), dtype=np.int64)
    for record in np.lexsort((starts, files)).tolist():
        file, start = int(files[record]), int(starts[record])
        if runs and runs[-1].file == file and start <= runs[-1].stop:
            runs[-1].stop = start + width  # starts are sorted, so no earlier record ends later
        else:
            runs.append(_Run(file, start, start + width))
        belongs[record] = len(runs) - 1
    return runs, belongs


class RemoteFiles:
    """Remote files of known sizes, read by byte ranges.

    Sizes are asked for once, all at the same time, and kept in `cache` (default: `cache_folder()`). They stay what they
    are until a read finds that a file has changed: that is an error, and the next start asks anew.
    """

    def __init__(self, urls: Sequence[str], cache: Path | None = None, fresh: bool = False):
        for url in urls:
            if not re.match(r"https?://[^/]+/.|(s3|r2)://[^/]+/.", url):
                raise ConfigurationError(f"{url}: neither http(s)://HOST/PATH nor s3:// or r2://BUCKET/KEY")
        self.cache = cache_folder() if cache is None else cache
        self._clients: dict[str, Client] = {}
        self._making = threading.Lock()
        self._described = self.cache / f"{DIGEST(json.dumps(list(urls)).encode()).hexdigest()[:32]}.sizes"
        with alone(self._described):
            self.files = (None if fresh else self._known(urls)) or self._describe(urls)
        self.sizes = [file.size for file in self.files]

    def _known(self, urls: Sequence[str]) -> list[File] | None:
        content = _load(self._described)
        # The cache's name stands for the URLs, which may hold a signature that is nobody else's business.
        return None if content is None else [File(url, *about) for url, about in zip(urls, json.loads(content))]

    def _describe(self, urls: Sequence[str]) -> list[File]:
        def describe(url: str) -> File:
            with self._client(url).ask(url, None) as answer:
                return file_of(url, answer)

        distinct = list(dict.fromkeys(urls))
        found = dict(zip(distinct, _at_once(describe, distinct, distinct, "sizes of remote files", "files")))
        files = [found[url] for url in urls]
        _store(self._described, json.dumps([(file.size, file.tag) for file in files]).encode())
        return files

    def _client(self, url: str) -> Client:
        scheme = url.partition("://")[0].replace("https", "http")
        with self._making:
            if scheme not in self._clients:
                self._clients[scheme] = Http() if scheme == "http" else S3(scheme)
            return self._clients[scheme]

    def read(self, files: ArrayLike, starts: ArrayLike, width: int, keep: bool = True) -> bytes:
        """Records of `width` bytes, end to end: record k begins at byte starts[k] of file number files[k].

        Records that touch are one request. With `keep`, the same records are not asked for again. Raises ValueError for
        a record beyond its file, and what `bytes_of` raises, OSError instead of Interrupted after several attempts.
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
        with alone(path):
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
        runs, belongs = _runs(files, starts, width)
        pieces = [
            (self.files[run.file], start, min(start + LARGEST, run.stop))
            for run in runs
            for start in range(run.start, run.stop, LARGEST)
        ]

        def fetch(piece: tuple[File, int, int]) -> bytes:
            file, start, stop = piece
            with self._client(file.url).ask(file.url, f"bytes={start}-{stop - 1}") as answer:
                return bytes_of(file, start, stop, answer)

        try:
            came = iter(_at_once(fetch, pieces, [file.url for file, _, _ in pieces], "reading", "ranges"))
        except Changed:
            self._described.unlink(missing_ok=True)
            raise
        content = [b"".join(next(came) for _ in range(run.start, run.stop, LARGEST)) for run in runs]
        places = starts - np.array([run.start for run in runs])[belongs]
        return b"".join(content[run][place : place + width] for run, place in zip(belongs.tolist(), places.tolist()))
