"""Hashes and checksums of files."""

from __future__ import annotations

import hashlib
import zlib
from pathlib import Path

from .paths import check_readable


def file_digest(path: Path, algorithm: str = "sha256") -> str:
    """Hexadecimal hash of a file. `git` is the hash by which git names its content. OSError where it is unreadable."""
    check_readable(path)
    digest = hashlib.new("sha1" if algorithm == "git" else algorithm)
    if algorithm == "git":
        digest.update(b"blob %d\0" % path.stat().st_size)
    with path.open("rb") as file:
        while piece := file.read(2**24):
            digest.update(piece)
    return digest.hexdigest()


def crc32(path: Path) -> str:
    """CRC-32 of a file as eight hexadecimal digits. OSError where it is unreadable."""
    value = 0
    with path.open("rb") as file:
        while piece := file.read(2**22):
            value = zlib.crc32(piece, value)
    return f"{value:08x}"
