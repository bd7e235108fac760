"""Where a measurement runs, and how it is timed."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch

from olmo.distributed import pick_device
from olmo.exceptions import ConfigurationError
from olmo.train.throughput import peak_memory
from scripts.benchmarks.processes import forget_peak
from scripts.gpu.rows import Row


@dataclass(frozen=True)
class Place:
    """What a measurement is given: a folder of its own, deleted afterwards, and what was measured before it.

    small: tiny sizes, which show on a CPU that the measurement works; its bars do not apply. peak: operations per
    second of a bfloat16 product of matrices (`peak.py`), the denominator of every MFU; None before it is measured.
    earlier: values of this run, by "BOX: NUMBER".
    """

    folder: Path
    small: bool = False
    peak: float | None = None
    earlier: Mapping[str, float] = field(default_factory=dict)

    @cached_property
    def device(self) -> torch.device:
        """The GPU; the CPU in a small run without one. Raises ConfigurationError where there is none."""
        if not self.small:
            check_device()
        return pick_device("cuda" if torch.cuda.is_available() else "cpu")

    def bar(self, value: float) -> float | None:
        """A bar of the full size, for `at_least` or `at_most`."""
        return None if self.small else value

    def wait(self) -> None:
        """Let the device finish all that it was asked for."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, work: Callable[[], Any], repeats: int, warmups: int = 1) -> list[float]:
        """Seconds of each repetition of `work`, by CUDA events on a GPU, after unmeasured ones."""
        for _ in range(warmups):
            work()
        self.wait()
        if self.device.type != "cuda":
            return [_elapsed(work) for _ in range(repeats)]
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
        marks[0].record()
        for mark in marks[1:]:
            work()
            mark.record()
        self.wait()
        return [before.elapsed_time(after) / 1000 for before, after in pairwise(marks)]

    def peak_gib(self, work: Callable[[], Any]) -> float:
        """GiB that tensors on the GPU, on a CPU the process, hold at most while `work` runs."""
        self.wait()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            forget_peak()
        work()
        self.wait()
        return peak_memory(self.device) / 2**30

    def mfu(self, operations: float, seconds: Sequence[float], name: str, at_least: float | None, note: str) -> Row:
        """The row of the share of `peak`, in percent, that so many operations in these seconds are."""
        if self.peak is None:
            raise ValueError(f"{name}: the rate of a product of matrices is not measured; run the box peak too")
        shares = tuple(100 * operations / each / self.peak for each in seconds)
        return Row(name, median(shares), "%", at_least=None if self.small else at_least, note=note, samples=shares)


def check_device() -> None:
    """Raise ConfigurationError where there is no GPU. This process is no user of the GPU then, which may allow one."""
    if not torch.cuda.is_available():
        raise ConfigurationError("torch sees no CUDA device here; --small runs on a CPU")


def cannot_compile() -> str:
    """Why torch.compile has no C compiler for a GPU, which Triton finds in this way; "" where it has one."""
    named = os.environ.get("CC")
    if any(map(shutil.which, (named,) if named else ("gcc", "clang"))):
        return ""
    return f"CC={named}: no such program" if named else "no gcc or clang here, which torch.compile needs: set CC"


def _elapsed(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
