"""A loop over items, each prepared in the background while the one before is used, in step on all ranks.

Preparing is for what waits on networks and disks. At any time at most one item is in use and one is being prepared.
`main` of analysis.entropy shows the loop.
"""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from typing import TypeVar

import numpy as np

from olmo.console import printable
from olmo.distributed import ABANDONABLE, Ranks
from olmo.exceptions import FAILURES, ConfigurationError

Item = TypeVar("Item")
Ready = TypeVar("Ready")
POLL = 0.2  # seconds between checks whether all ranks are ready


def is_first_of_machine() -> bool:
    """Whether this process is alone, or the one that downloads for all processes of its machine."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


class FailedForAll(ValueError):
    """Something that all items have in common cannot be used, such as the data: the loop ends."""


class FailedTogether(ValueError):
    """Raised on all ranks where `together` failed on one; `reports` on the ranks that should print the reason."""

    def __init__(self, message: str, reports: bool):
        super().__init__(message)
        self.reports = reports


def together(ranks: Ranks, call: Callable[[], Ready]) -> Ready:
    """call() on all ranks, without collectives of its own. If it fails on one of several, all raise FailedTogether."""
    if ranks.world_size == 1:
        return call()
    error: BaseException | None = None
    try:
        result = call()
    except (ConfigurationError, FailedForAll):
        raise  # ends this process, and torchrun the others
    except FAILURES as raised:
        error = raised
    failed, on_first = ranks.sum(np.array([error is not None, error is not None and ranks.is_first]).astype(float))
    if error is not None:
        raise FailedTogether(str(error) or type(error).__name__, ranks.is_first or not on_first) from error
    if failed:
        raise FailedTogether(f"{failed:.0f} of {ranks.world_size} processes could not read it", ranks.is_first)
    return result


def prefetch(
    items: Sequence[Item], prepare: Callable[[Item], Ready], ranks: Ranks
) -> Iterator[tuple[Item, Callable[[], Ready]]]:
    """Each item in order, once prepare(item) has ended on all ranks, and a call for its result; meanwhile that of the
    next item runs in the background."""
    following = _in_background(prepare, items[0])
    for position, item in enumerate(items, start=1):
        current = following
        _wait(current, ranks)
        if position < len(items):
            following = _in_background(prepare, items[position])
        yield item, current.result
        del current
        if position < len(items):  # reference cycles keep models alive, and there is no room for a third
            gc.collect()


def _in_background(call: Callable[[Item], Ready], item: Item) -> Future[Ready]:
    """call(item) in a daemon thread: unlike an executor's, a download in it does not keep a failed process alive."""
    future: Future[Ready] = Future()

    def run() -> None:
        try:
            future.set_result(call(item))
        except BaseException as error:
            future.set_exception(error)

    # `exit_process` ends the process without waiting for a thread of this name.
    threading.Thread(target=run, name=ABANDONABLE, daemon=True).start()
    return future


def _wait(future: Future[Ready], ranks: Ranks) -> None:
    """Wait until a call has ended on every rank, outside collectives: their time limit is too short for a download."""
    if ranks.world_size == 1:
        wait([future])
    while ranks.sum(np.array([float(future.done())]))[0] < ranks.world_size:
        time.sleep(POLL)


class Failures:
    """The failures in a loop over items: each is printed on stderr in one line, and the loop continues."""

    def __init__(self, items: int, ranks: Ranks):
        self.items, self.ranks, self.failed = items, ranks, 0

    @contextmanager
    def of(self, item: object) -> Iterator[None]:
        """Within `with`, a failure is this item's.

        Raised are the failure of a single item, a ConfigurationError or FailedForAll, and on several ranks
        any failure other than FailedTogether, because the other ranks may be waiting in a collective.
        """
        try:
            yield
        except FAILURES as error:
            on_all_ranks = self.ranks.world_size == 1 or isinstance(error, FailedTogether)
            if self.items == 1 or isinstance(error, (ConfigurationError, FailedForAll)) or not on_all_ranks:
                raise
            self.failed += 1
            if not isinstance(error, FailedTogether) or error.reports:
                message = printable(" ".join(str(error).split())) or type(error).__name__
                print(f"{item}: {message}" if str(item) not in message else message, file=sys.stderr, flush=True)

    def check(self) -> None:
        """Raise ValueError if an item failed."""
        if self.failed:
            raise ValueError(
                f"{self.failed} of {self.items} could not be measured; the same command continues from here"
            )
