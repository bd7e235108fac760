"""Work in a process of its own: its result, and what is told where it ends without one."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest

from scripts.benchmarks.processes import run_in_subprocess


def far(number: int, queue: Any) -> None:
    queue.put((os.getpid(), bytes(number)))


def killed(queue: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_the_result_comes_from_another_process() -> None:
    """Also one that no pipe holds at once."""
    process, content = run_in_subprocess(far, 2**20)
    assert process != os.getpid() and content == bytes(2**20)


def test_a_process_that_dies_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"^killed: its process ended with status -9 and no result$"):
        run_in_subprocess(killed)
