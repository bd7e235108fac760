"""Work in a process of its own, whose time and memory are then its own too."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from olmo.train.throughput import peak_bytes


def forget_peak() -> int:
    """Let `peak_bytes` count from now on, where the system can (Linux); returns its present value."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes()


def _work(work: Callable[..., None], arguments: tuple[Any, ...], outlet: Connection) -> None:
    work(*arguments, SimpleNamespace(put=outlet.send))


def run_in_subprocess(work: Callable[..., None], *arguments: Any) -> Any:
    """What `work` puts into the queue that it receives after these arguments, run in a process of its own.

    Raises RuntimeError where that process ends without a result; its traceback is on stderr.
    """
    context = multiprocessing.get_context("spawn")
    inlet, outlet = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(work, arguments, outlet))
    process.start()
    outlet.close()  # so that the end of the process is the end of the pipe
    try:
        result = inlet.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"{work.__name__}: its process ended with status {process.exitcode} and no result") from None
    process.join()
    return result
