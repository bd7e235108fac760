"""Work in a process of its own, whose time and memory are then its own too."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from olmo.speed import peak_bytes


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
