"""Locks among processes, by lock files; the system releases the lock of a process that is killed."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .atomic import delete_partial_files

_WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # of file systems that have none


class Locked(OSError):
    """Another process holds the lock."""


class Lock:
    """Holds an exclusive lock on the file `path`, which exists for nothing else, until `release` or the end of `with`.

    wait: until another process has released it; otherwise Locked is raised. A file system without locks locks nothing.
    If the lock file cannot be made, OSError is raised, unless `wait`: who waits only spares work that was done already.
    """

    def __init__(self, path: Path, wait: bool = False):
        self.path = path
        # filelock's substitute for missing locks would outlive a killed process.
        self._lock = FileLock(path, -1 if wait else 0, thread_local=False, fallback_to_soft=False)
        try:
            self._lock.acquire()
        except Timeout:
            raise Locked(f"{path}: another process holds this lock") from None
        except (OSError, NotImplementedError) as error:
            if not wait and getattr(error, "errno", errno.ENOSYS) not in _WITHOUT_LOCKS:
                raise

    def release(self) -> None:
        """Release the lock and delete its file; a process that waits for it makes a new one."""
        if self._lock.is_locked:
            with suppress(OSError):  # Windows deletes no open file
                self.path.unlink()
        self._lock.release()

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *error: Any) -> None:
        self.release()


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Hold the lock of an output file, and delete what killed processes left of `atomic_path(path)`.

    Raises Locked if another process is writing it.
    """
    try:
        lock = Lock(path.with_name(f".{path.name}.lock"))
    except Locked:
        raise Locked(f"{path}: another process is writing it") from None
    with lock:
        delete_partial_files(path)
        yield
