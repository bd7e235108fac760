"""HTTP and S3: the clients, which answers count as failures, and how a failed request is retried.

    with HttpClient().request("https://host/a.npy", "bytes=0-99") as response:
        check_status("https://host/a.npy", response)
    retry(lambda: transfer(url), url)          # again while it raises TransferInterrupted

HTTP uses requests, which handles proxies and certificates, with one pool of connections for all threads; S3 uses boto3,
which handles credentials, regions and endpoints. Neither client retries by itself, so that both follow the same rules.

`s3://` and `r2://` find credentials as boto3 does (profile: S3_PROFILE or R2_PROFILE) and send unsigned requests, which
public buckets accept, when there are none. R2_ENDPOINT_URL is the endpoint of `r2://`.
"""

from __future__ import annotations

import errno
import os
import queue
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, TypeVar
from urllib.parse import urljoin, urlsplit

import requests
import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from .exceptions import ConfigurationError

WORKERS = 32  # simultaneous requests; their number, not their size, hides the latency of a server
ATTEMPTS = 5
WAIT = 0.5  # seconds before the second attempt, about twice as long before each further one
TIMEOUT = (10, 60)  # seconds to connect, and between two pieces of a response
HEADERS = 60.0  # seconds for all headers of a response
WINDOW, LEAST = 60.0, 2**16  # seconds, and the bytes that must arrive in them; slower is a failure
REDIRECTS = 5

Result = TypeVar("Result")


class TransferInterrupted(OSError):
    """A request that failed in a way that may pass: another attempt may succeed.

    pause: seconds that the server asks to wait before it. progress: the attempt received something new.
    """

    def __init__(self, message: str, *, pause: float | None = None, progress: bool = False):
        super().__init__(message)
        self.pause, self.progress = pause, progress


def describe_failure(error: BaseException) -> str:
    """Why a request failed, in one line: the server's status, or the system's error, which libraries wrap in layers."""
    if isinstance(error, requests.exceptions.TooManyRedirects):
        return f"redirects more than {REDIRECTS} times"
    if isinstance(error, requests.exceptions.InvalidSchema):
        return str(error)
    if (response := getattr(error, "response", None)) is not None:
        phrase = getattr(response, "reason_phrase", None) or getattr(response, "reason", None)  # httpx's, requests'
        return f"{response.status_code} {phrase or ''}".rstrip()
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, (requests.exceptions.ChunkedEncodingError, urllib3.exceptions.ProtocolError)):
        return "the connection broke off"
    return str(error) if isinstance(error, TransferInterrupted) else type(error).__name__


def retry(
    attempt: Callable[[], Result],
    name: str,
    *,
    attempts: int | None = None,
    wait: float | None = None,
    stopped: threading.Event | None = None,
    on_failure: Callable[[TransferInterrupted, float], None] = lambda error, pause: None,
    advice: str = "",
) -> Result:
    """The result of `attempt`, repeated while it raises TransferInterrupted; then an OSError that names `name`.

    attempts: in a row without progress (default ATTEMPTS). wait: seconds before the second, about doubled before each
    further one (default WAIT). stopped: when set, no attempt follows. on_failure: called with the first of several
    failures in a row and the pause that follows it. advice: appended to the error.
    """
    attempts, wait = attempts or ATTEMPTS, WAIT if wait is None else wait
    stopped, failures = stopped or threading.Event(), 0
    while True:
        try:
            return attempt()
        except TransferInterrupted as error:
            failures = 1 if error.progress else failures + 1
            pause = error.pause
            if pause is None:  # random, so that many threads do not return together to a server that is overloaded
                pause = wait * 2 ** (failures - 1) * (0.5 + random.random())
            if failures == 1 and not stopped.is_set():
                on_failure(error, pause)
            if failures == attempts or stopped.wait(pause):
                raise OSError(f"{name}: {error} ({failures} attempts){advice}") from error


def bounded(
    url: str, request: Callable[[], requests.Response], most: int, seconds: float
) -> tuple[requests.Response, bytes]:
    """A response, requested with `stream=True`, and its body.

    Raises TransferInterrupted if it is not complete within `seconds`, however many bytes arrive, OSError with `url` if
    it has more than `most` bytes, and what `request` raises.
    """
    outcome: queue.SimpleQueue[tuple[requests.Response, bytes] | BaseException] = queue.SimpleQueue()
    late = TransferInterrupted(f"no complete answer within {seconds:g} seconds")
    end = time.monotonic() + seconds

    def work() -> None:
        try:
            with request() as response:
                body = bytearray()
                for piece in response.iter_content(2**12):
                    body += piece
                    if time.monotonic() > end:
                        raise late
                    if len(body) > most:
                        raise OSError(f"{url}: an answer of more than {most:,} bytes")
                outcome.put((response, bytes(body)))
        except BaseException as error:
            outcome.put(error)

    # In a thread of its own: timeouts of requests begin anew with every byte.
    threading.Thread(target=work, daemon=True).start()
    try:
        found = outcome.get(timeout=seconds)
    except queue.Empty:
        raise late from None
    if isinstance(found, BaseException):
        raise found
    return found


# --- clients -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Response:
    """A server's response; its body has not been read yet."""

    status: int
    headers: Mapping[str, str]  # names in lower case
    body: Iterator[bytes]


class _Deadline(HTTPConnection):
    """A connection that is shut down if the headers of a response take longer than HEADERS: the timeout of a socket
    begins again with every byte."""

    def getresponse(self) -> Any:
        late = threading.Event()

        def end() -> None:
            late.set()
            if self.sock is not None:
                with suppress(OSError):
                    socket.socket.shutdown(self.sock, socket.SHUT_RDWR)

        timer = threading.Timer(HEADERS, end)
        timer.daemon = True
        timer.start()
        try:
            return super().getresponse()
        finally:
            timer.cancel()
            if late.is_set():  # the end of the connection may have passed for that of the headers
                raise TimeoutError(errno.ETIMEDOUT, f"no complete headers within {HEADERS:g} seconds")


class _SecureDeadline(_Deadline, HTTPSConnection):
    pass


class _Pool(HTTPConnectionPool):
    ConnectionCls = _Deadline


class _SecurePool(HTTPSConnectionPool):
    ConnectionCls = _SecureDeadline


class _Adapter(requests.adapters.HTTPAdapter):
    def init_poolmanager(self, *args: Any, **options: Any) -> None:
        super().init_poolmanager(*args, **options)
        self.poolmanager.pool_classes_by_scheme = {"http": _Pool, "https": _SecurePool}


class _Session(requests.Session):
    def get_redirect_target(self, resp: requests.Response) -> str | None:
        """Where a response redirects to; not from https to http, nor to anything else, such as file://."""
        target = super().get_redirect_target(resp)
        if target is not None:
            scheme = urlsplit(urljoin(resp.url, target)).scheme.lower()
            if scheme not in ("http", "https") or (scheme == "http" and resp.url.lower().startswith("https:")):
                raise requests.exceptions.InvalidSchema(f"redirects to {scheme}://, which is not followed")
        return target


def http_session() -> requests.Session:
    """A session for files: requests nothing compressed, which has neither a file's size nor its byte ranges. A redirect
    to another host is followed without the headers and passwords of this one."""
    session = _Session()
    session.headers["Accept-Encoding"] = "identity"
    session.max_redirects = REDIRECTS
    for scheme in ("http://", "https://"):
        session.mount(scheme, _Adapter(pool_maxsize=WORKERS))
    return session


def pieces(response: requests.Response, size: int = 2**20) -> Iterator[bytes]:
    """The body of a streamed response as it arrives, at most `size` bytes a piece.

    Raises TransferInterrupted if fewer than LEAST bytes arrive within WINDOW seconds, or the connection breaks off.
    """
    began, came = time.monotonic(), 0
    try:
        while piece := response.raw.read1(size, decode_content=True):
            came += len(piece)
            yield piece
            if (now := time.monotonic()) - began > WINDOW:
                if came < LEAST:
                    raise TransferInterrupted(f"fewer than {LEAST:,} bytes came in {WINDOW:g} seconds")
                began, came = now, 0
    except urllib3.exceptions.HTTPError as error:
        raise TransferInterrupted(describe_failure(error)) from error


def request_failure(url: str, error: requests.RequestException) -> OSError:
    """What to raise for a request without a response: TransferInterrupted, if it may pass."""
    permanent = isinstance(error, (requests.exceptions.TooManyRedirects, requests.exceptions.InvalidSchema))
    return OSError(f"{url}: {describe_failure(error)}") if permanent else TransferInterrupted(describe_failure(error))


class HttpClient:
    """Requests a file or, with `byte_range` (a Range header's value), a part of it; without one, no body (HEAD).

    Raises TransferInterrupted where no complete response arrived; every status counts as a response.
    """

    def __init__(self) -> None:
        self.session = http_session()

    @contextmanager
    def request(self, url: str, byte_range: str | None) -> Iterator[Response]:
        headers = {} if byte_range is None else {"Range": byte_range}
        method = "HEAD" if byte_range is None else "GET"
        try:
            # Streamed, so that a server which sends more than was requested is cut off.
            with self.session.request(
                method, url, headers=headers, stream=True, timeout=TIMEOUT, allow_redirects=True
            ) as response:
                lower = {name.lower(): value for name, value in response.headers.items()}
                yield Response(response.status_code, lower, pieces(response))
        except requests.exceptions.InvalidURL as error:
            raise ConfigurationError(f"{url}: {error}") from error
        except requests.RequestException as error:
            raise request_failure(url, error) from error


def s3_client(scheme: str, attempts: int = 1, writes: bool = False) -> Any:
    """boto3's client for `s3://` or `r2://`, safe to use from several threads.

    attempts: of each request, by boto3 itself. Raises ConfigurationError for an invalid profile or endpoint, and
    where `writes` needs credentials and there are none.
    """
    import boto3  # takes a third of a second
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
            # R2 has no regions; for S3 this is the region that can locate the buckets of all others.
            region_name=session.region_name or "us-east-1",
            config=Config(
                retries={"mode": "standard", "total_max_attempts": attempts},
                max_pool_connections=WORKERS,
                connect_timeout=connect,
                read_timeout=read,
                **({} if signed else {"signature_version": botocore.UNSIGNED}),
            ),
        )
    except (botocore.exceptions.BotoCoreError, ValueError) as error:  # an invalid profile or endpoint
        if isinstance(error, ConfigurationError):
            raise
        raise ConfigurationError(f"{scheme}://: {error}") from error


class S3Client:
    """As `HttpClient`, for `s3://` or `r2://`."""

    def __init__(self, scheme: str) -> None:
        self.client = s3_client(scheme)

    @contextmanager
    def request(self, url: str, byte_range: str | None) -> Iterator[Response]:
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
                if byte_range is None:
                    answer = self.client.head_object(Bucket=bucket, Key=key)
                else:
                    answer = self.client.get_object(Bucket=bucket, Key=key, Range=byte_range)
            except ClientError as error:
                answer = error.response
            about = answer["ResponseMetadata"]
            headers = {name.lower(): value for name, value in about.get("HTTPHeaders", {}).items()}
            with closing(answer["Body"]) if "Body" in answer else nullcontext() as body:
                yield Response(about["HTTPStatusCode"], headers, body.iter_chunks(2**20) if body else iter(()))
        except (ConnectionError, HTTPClientError, IncompleteReadError) as error:
            raise TransferInterrupted(describe_failure(error)) from error
        except BotoCoreError as error:
            raise OSError(f"{url}: {error}") from error


def check_status(url: str, response: Response) -> None:
    """Raise TransferInterrupted for a status that may pass, another OSError for any other that brings no file."""
    status = response.status
    phrase = HTTPStatus(status).phrase if status in HTTPStatus._value2member_map_ else ""
    line = f"{status} {phrase}".rstrip()
    if status in (408, 425, 429) or status >= 500:
        raise TransferInterrupted(line)
    if status in (404, 410):
        raise FileNotFoundError(f"{url}: {line}: no such file")
    if status in (401, 403):  # object stores also answer so for a file that does not exist
        raise PermissionError(f"{url}: {line}: no such file, or no permission to read it")
    if status not in (200, 206, 416):
        raise OSError(f"{url}: {line}")
    if (encoding := response.headers.get("content-encoding", "identity")) != "identity":
        raise ValueError(f"{url}: the server compresses it ({encoding}), so its bytes cannot be addressed")
