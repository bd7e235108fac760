"""Files that appear complete or not at all, and errors that name them."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from olmo.files.atomic import atomic_path, delete_files_of_dead_processes, write_text


def with_numpy(path: Path) -> None:
    with atomic_path(path) as partial:
        np.zeros(10**5).tofile(partial)


@pytest.mark.parametrize("write", [lambda path: write_text(path, "x" * 10**6), with_numpy])
def test_a_disk_that_is_full_while_writing_names_the_file(write: Callable[[Path], None], tmp_path: Path) -> None:
    """The system names no file in an error of writing to an open one."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**4, limits[1]))
    try:
        with (
            pytest.raises(OSError, match=r"^[^:]+/new\.txt: cannot be written: [^:]+$"),
            atomic_path(tmp_path / "other"),
        ):
            write(tmp_path / "new.txt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [OSError(errno.EIO, "of another file", "other"), ConnectionError("reset")])
def test_an_error_that_is_not_of_the_file_stays_as_it_is(error: OSError, tmp_path: Path) -> None:
    with pytest.raises(OSError) as raised, atomic_path(tmp_path / "new.txt"):
        raise error
    assert raised.value is error


def test_files_of_dead_processes_are_deleted_and_others_stay(tmp_path: Path) -> None:
    names = []
    for process in (os.getpid(), 2**22 + 1):  # above the largest id of a process
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "getpid", lambda process=process: process)
            with atomic_path(tmp_path / "new.txt") as partial:
                names.append(partial.name)
                partial.touch()
    ours, dead = names
    other_host = dead.replace(dead.split(".")[2][:8], "00000000")
    for name in (ours, dead, other_host, ".step9.partial", "new.txt"):
        (tmp_path / name).write_text("half")
    delete_files_of_dead_processes(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {ours, other_host, ".step9.partial", "new.txt"}
