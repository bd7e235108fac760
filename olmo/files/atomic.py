"""Files that appear under their name complete or not at all: written beside it, then renamed."""

from __future__ import annotations

import errno
import os
import platform
import re
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Errors of writing to an open file, whose name the system does not add.
_OF_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
_HOST = f"{zlib.crc32(platform.node().encode()):08x}"  # short: a file name has room for 255 characters


@contextmanager
def atomic_path(path: Path, durable: bool = False) -> Iterator[Path]:
    """A temporary name beside `path`, of the same suffix, for a file to write within the `with` block.

    When the block ends well the file is renamed to `path`, replacing an older one; otherwise it is deleted. `durable`:
    its content is on the disk before it is renamed. An OSError of writing the temporary file names `path` instead.
    """
    writer = f"{_HOST}-{os.getpid()}-{threading.get_ident()}"
    partial = path.with_name(f".{path.stem}.{writer}.partial{path.suffix}")
    try:
        yield partial
        if durable:
            fsync(partial)
        partial.replace(path)
    except OSError as error:
        # numpy's tofile states only how many items it has written.
        is_unnamed = error.filename is None and (
            error.errno in _OF_WRITING or re.fullmatch(r"\d+ requested and \d+ written", str(error)) is not None
        )
        if str(partial) not in str(error) and not is_unnamed:
            raise
        cause = str(error).partition(f"{partial}: cannot be written: ")[2] or error.strerror or str(error)
        raise OSError(f"{path}: cannot be written: {cause.lower()}") from error
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file through `atomic_path`."""
    with atomic_path(path) as partial:
        partial.write_text(text, encoding="utf-8")


def delete_partial_files(path: Path) -> None:
    """Delete what killed processes left of `atomic_path(path)`; for who holds a lock on it."""
    for partial in path.parent.glob(f".{path.stem}.*.partial{path.suffix}"):
        partial.unlink(missing_ok=True)


def delete_files_of_dead_processes(folder: Path) -> None:
    """Delete what processes of this machine that have ended, killed ones, left of `atomic_path` in a folder."""
    for partial in folder.glob(".*.partial*"):
        writer = re.search(rf"\.{_HOST}-(\d+)-\d+\.partial", partial.name)
        try:
            if writer is not None:
                os.kill(int(writer[1]), 0)
        except ProcessLookupError:
            partial.unlink(missing_ok=True)
        except OSError:  # alive, of another user
            pass


def fsync(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        os.close(descriptor)
