"""Batches of 128 x 1024 tokens from memory-mapped files in a shuffled order, as a training loop receives them.

The loader with one and two threads reading ahead, against numpy alone copying the same rows. The files are in the page
cache.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from olmo.data.loader import Loader
from olmo.data.order import build_order
from olmo.data.sources import TokenFiles
from scripts.benchmarks.rounds import alternate, spread

ROWS, LENGTH, FILES = 128, 1024, 4


def bench_loader(folder: Path, rounds: int, batches: int = 1000) -> None:
    """Tokens per second, and their ratios to numpy's."""
    each = ROWS * batches // FILES  # instances per file
    paths = [folder / f"part-{number}.npy" for number in range(FILES)]
    generator = np.random.default_rng(0)
    for path in paths:
        generator.integers(0, 50280, each * LENGTH, dtype="<u2").tofile(path)
    order = build_order(each * FILES, 0, 0)

    def rate(started: float) -> float:
        return batches * ROWS * LENGTH / (time.perf_counter() - started)

    def numpy_alone() -> float:
        maps = [np.memmap(path, "<u2", "r", shape=(each, LENGTH)) for path in paths]
        started = time.perf_counter()
        for number in range(batches):
            batch = np.empty((ROWS, LENGTH), dtype=np.int64)
            for row, instance in enumerate(order[number * ROWS : (number + 1) * ROWS].tolist()):
                batch[row] = maps[instance // each][instance % each]
        return rate(started)

    def ours(workers: int) -> float:
        loader = Loader(TokenFiles(paths, LENGTH), ROWS, 0, vocabulary=50280, workers=workers, ahead=2 * workers)
        loader.batch(0, 0)  # shuffles, once per epoch
        started = time.perf_counter()
        for batch in loader.batches(count=batches):
            assert batch.input_ids.shape == (ROWS, LENGTH)
        return rate(started)

    works: dict[str, Callable[[], float]] = {
        "numpy": numpy_alone,
        "1 thread": partial(ours, 1),
        "2 threads": partial(ours, 2),
    }
    alternate(1, works)  # warm up
    rates = alternate(rounds, works)
    for name in ("1 thread", "2 threads"):
        ratios = np.divide(rates[name], rates["numpy"])
        print(
            f"loader, {name} / numpy alone: {spread(ratios)} over {rounds} rounds; "
            f"ours {statistics.median(rates[name]):,.0f} tokens/s",
            flush=True,
        )
