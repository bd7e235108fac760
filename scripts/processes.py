"""Work in a process of its own, whose time and memory are then its own too."""

from __future__ import annotations

import multiprocessing
import re
import resource
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any


def peak_bytes() -> int:
    """The most memory this process has held."""
    status = Path("/proc/self/status")
    if status.is_file():  # Linux, where getrusage also counts what the parent held
        return int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) * 1024  # type: ignore[index]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def forget_peak() -> int:
    """Let `peak_bytes` tell the most from now on, where the system can (Linux); returns what it tells now."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes()


def apart(work: Callable[..., None], *arguments: Any) -> Any:
    """What `work` puts into the queue that it gets after these arguments, run in a process of its own."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=work, args=(*arguments, queue))
    process.start()
    result = queue.get()
    process.join()
    return result
