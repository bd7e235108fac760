"""Downloads of single files: continued after an interruption, verified, and never incomplete under their name.

`describe` requests a file's size and version; `fetch` downloads it to a hidden partial file, which the caller renames.
The partial file's name identifies one version of the server's file, so that parts of two versions are never joined.
"""

from __future__ import annotations

import base64
import hashlib
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import BinaryIO

import requests

from olmo.console import Progress
from olmo.files.digests import file_digest
from olmo.files.lock import Lock, Locked
from olmo.net import LEAST, TIMEOUT, TransferInterrupted, describe_failure, pieces, request_failure, retry

PIECE = 2**20
DIGITS = 12  # of a version, in the name of a partial file
MB = 10**6
LOGIN = "on the Hugging Face hub: hf auth login, or set HF_TOKEN"
LARGEST_UNSTATED = 2**33  # bytes of a file whose size the server does not state; an endless one would fill the disk


@dataclass(frozen=True)
class Remote:
    """A file on a server, and what distinguishes this version of it from others."""

    url: str
    name: str
    size: int | None
    digest: tuple[str, str] | None  # algorithm, hexadecimal value
    validator: str | None = None  # entity tag or date that continuing a download depends on
    modified: float | None = None
    cached: Path | None = None  # a file on this machine that should be the same; compared before it is used

    @property
    def partial(self) -> str:
        """The file's name until it is complete, different for each version of the file."""
        version = repr((self.url, self.size, self.digest, self.validator)).encode()
        return f".{self.name}.{hashlib.sha256(version).hexdigest()[:DIGITS]}.partial"

    def is_here(self, path: Path) -> bool:
        if not path.is_file() or path.stat().st_size != self.size:
            return False
        if self.digest:
            return file_digest(path, self.digest[0]) == self.digest[1]
        return self.modified is None or path.stat().st_mtime == self.modified


Look = Callable[[str], Remote | None]  # name -> the server's file of that name


def stated_digest(headers: Mapping[str, str]) -> tuple[str, str] | None:
    """The hash of the complete file by a response's headers, None where they state none to rely on."""
    stated = " ".join(headers.get(name, "") for name in ("Repr-Digest", "Digest", "x-goog-hash"))
    stated += f" md5={headers.get('Content-MD5')} sha-256={headers.get('x-amz-checksum-sha256')}"
    for algorithm, base64_pattern in (("sha-256", "[A-Za-z0-9+/]{43}="), ("md5", "[A-Za-z0-9+/]{22}==")):
        if match := re.search(rf"\b{algorithm}=:?({base64_pattern})", stated, re.IGNORECASE):
            return algorithm.replace("-", ""), base64.b64decode(match[1]).hex()
    # S3's entity tag is the MD5 of what was uploaded in one part and not encrypted with a key; other servers' 32
    # digits may be anything.
    tag = re.fullmatch(r'"([0-9a-f]{32})"', headers.get("ETag", ""))
    plain = headers.get("x-amz-server-side-encryption", "AES256") == "AES256"
    return ("md5", tag[1]) if tag and plain and "x-amz-request-id" in headers else None


def describe(session: requests.Session, folder_url: str, name: str) -> Remote | None:
    """The server's description of a file, None where it has none. Raises OSError where it does not respond."""
    with session.head(folder_url + name, allow_redirects=True, timeout=TIMEOUT) as response:
        headers = response.headers
        # Object stores answer 403 for what is not there, some sites with a page.
        if response.status_code in (403, 404, 410) or headers.get("Content-Type", "").startswith("text/html"):
            return None
        if not response.ok:
            raise TransferInterrupted(f"{response.status_code} {response.reason}")
    length, date, tag = (headers.get(key) for key in ("Content-Length", "Last-Modified", "ETag"))
    return Remote(
        folder_url + name,
        name,
        int(length) if length and length.isdigit() and "Content-Encoding" not in headers else None,
        stated_digest(headers),
        date if tag is None or tag.startswith("W/") else tag,  # a weak tag does not identify every byte
        _seconds(date) if date else None,
    )


def _seconds(date: str) -> float | None:
    """A header's date as seconds since 1970; None if it is none."""
    try:
        return parsedate_to_datetime(date).timestamp()
    except ValueError:
        return None


def fetch(session: requests.Session, look: Look, name: str, folder: Path) -> tuple[Path, Remote]:
    """Download a file to its partial name in `folder`, complete and verified, despite broken connections.

    The file is described again before each attempt. Raises OSError when several attempts in a row receive nothing new
    or the file no longer exists, ValueError where its bytes do not have the stated hash.
    """
    size, most = 0, 0

    def attempt() -> tuple[Path, Remote]:
        nonlocal size, most
        try:
            if (remote := look(name)) is None:
                raise FileNotFoundError(f"{name}: no longer on the server")
            path = folder / remote.partial
            for other in set(folder.glob(f".{name}.{'?' * DIGITS}.partial")) - {path}:
                other.unlink()  # of another version
            try:
                transfer(session, remote, path)
            finally:
                size = path.stat().st_size if path.exists() else 0
        except (requests.RequestException, TransferInterrupted) as error:
            failure = error if isinstance(error, TransferInterrupted) else request_failure(name, error)
            if not isinstance(failure, TransferInterrupted):
                raise failure from error
            progress, most = size - most >= LEAST, max(size, most)
            raise TransferInterrupted(describe_failure(error), progress=progress) from error
        return path, remote

    path, remote = retry(attempt, name, advice="; the same command continues the download")
    with path.open("rb") as file:
        start = file.read(100).lstrip().lower()
    if start.startswith((b"<!doctype html", b"<html")):
        path.unlink()
        raise ValueError(f"{remote.url}: a web page is in its place")
    if remote.digest and file_digest(path, remote.digest[0]) != remote.digest[1]:
        path.unlink()
        raise ValueError(f"{remote.url}: the download does not have the {remote.digest[0]} hash that the server states")
    return path, remote


def transfer(session: requests.Session, remote: Remote, path: Path) -> None:
    """One attempt to download what `path` lacks. Raises TransferInterrupted or a RequestException where it fails."""
    try:
        lock = Lock(path.with_name(f".{remote.name}.lock"))
    except Locked:
        raise OSError(f"{remote.name}: another process is fetching it into {path.parent}") from None
    with lock, path.open("ab") as file:
        here = file.tell()
        if remote.size is None or here > remote.size or not (remote.validator or remote.digest):
            here = restart(file)
        if here != remote.size and remote.cached is not None and remote.digest and remote.is_here(remote.cached):
            restart(file)
            with remote.cached.open("rb") as cached:
                shutil.copyfileobj(cached, file, 2**24)
            here = file.tell()
        if here == remote.size:
            return
        headers = {"Range": f"bytes={here}-"} if here else {}
        if here and remote.validator:
            headers["If-Range"] = remote.validator  # if the file has changed, the server sends all of it
        with session.get(remote.url, headers=headers, stream=True, timeout=TIMEOUT) as response:
            if response.status_code == 401 or response.headers.get("X-Error-Code") == "GatedRepo":
                reason = response.headers.get("X-Error-Message", "access needs a login")
                raise OSError(f"{remote.name}: {response.status_code} {response.reason}: {reason} ({LOGIN})")
            if not response.ok and response.status_code != 416:
                raise TransferInterrupted(f"{response.status_code} {response.reason}")
            if response.status_code == 200:
                here = restart(file)
            elif not response.headers.get("Content-Range", "").startswith(f"bytes {here}-"):
                restart(file)
                raise TransferInterrupted("the server does not have the requested part")
            seen = response.headers.get("ETag" if '"' in (remote.validator or "") else "Last-Modified")
            if here and not seen and not remote.digest:
                restart(file)
                raise TransferInterrupted("the server does not state of which version of the file it sends a part")
            if remote.validator and seen and seen != remote.validator:
                raise TransferInterrupted("the file is changing on the server")
            total = (remote.size or 0) - here
            note = f", from {here // MB} MB on" if here else ""
            with Progress(remote.name + note, total // MB, "MB", show=total > 0) as progress:
                for piece in pieces(response, PIECE):
                    file.write(piece)
                    file.flush()  # for the next attempt, if this process is killed
                    if remote.size is not None and file.tell() > remote.size:
                        restart(file)
                        raise TransferInterrupted(f"more than the {remote.size} bytes that the server states")
                    if file.tell() > LARGEST_UNSTATED and remote.size is None:
                        restart(file)
                        raise ValueError(f"{remote.url}: no size stated, and more than {LARGEST_UNSTATED:,} bytes sent")
                    progress.advance((file.tell() - here) // MB - progress.done)
        if remote.size not in (None, file.tell()):
            raise TransferInterrupted(f"{file.tell()} of {remote.size} bytes received")


def restart(file: BinaryIO) -> int:
    file.seek(0)
    file.truncate()
    return 0
