"""A series of things, each prepared in the background while the one before is used, in step on all ranks.

Preparing is for what waits on networks and disks. At any time at most one thing is in use and one being prepared.
"""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Generic, TypeVar

import numpy as np

from olmo.distributed import READER, Ranks
from olmo.exceptions import FAILURES, ConfigurationError

Item = TypeVar("Item")
Ready = TypeVar("Ready")
POLL = 0.2  # seconds between two questions whether all ranks are ready


class Background(Generic[Ready]):
    """A call in a thread that does not keep an interrupted process alive, as those of an executor do."""

    def __init__(self, call: Callable[[], Ready]):
        self._future: Future[Ready] = Future()
        self._call = call
        threading.Thread(target=self._run, name=READER, daemon=True).start()

    def _run(self) -> None:
        try:
            self._future.set_result(self._call())
        except BaseException as error:
            self._future.set_exception(error)

    def wait(self, ranks: Ranks) -> None:
        """Until it has ended on every rank. No rank waits in a collective, whose time is limited, for a download."""
        if ranks.world_size == 1:
            self._future.exception()
        while ranks.sum(np.array([float(self._future.done())]))[0] < ranks.world_size:
            time.sleep(POLL)

    def result(self) -> Ready:
        """What the call returned; raises what it raised."""
        return self._future.result()


def is_first_of_machine() -> bool:
    """Whether this process is alone, or the one of its machine that downloads for all there."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


class Unreadable(ValueError):
    """What all ranks raise where one of them failed; `tell` on those that know best."""

    def __init__(self, message: str, tell: bool):
        super().__init__(message)
        self.tell = tell


def together(ranks: Ranks, call: Callable[[], Ready]) -> Ready:
    """call() on all ranks, which has no collectives of its own. Where one of several fails, all raise Unreadable."""
    if ranks.world_size == 1:
        return call()
    error: BaseException | None = None
    try:
        result = call()
    except ConfigurationError:
        raise  # ends this process, and torchrun the others
    except FAILURES as raised:
        error = raised
    failed, on_first = ranks.sum(np.array([error is not None, error is not None and ranks.is_first]).astype(float))
    if error is not None:
        raise Unreadable(str(error) or type(error).__name__, ranks.is_first or not on_first) from error
    if failed:
        raise Unreadable(f"{failed:.0f} of {ranks.world_size} processes could not read it", ranks.is_first)
    return result


def prefetch(
    items: Sequence[Item],
    prepare: Callable[[Item], Ready],
    use: Callable[[Item, Ready], None],
    let_go: Callable[[Item], None],
    ranks: Ranks,
) -> None:
    """use(item, prepare(item)), then let_go(item), for each item in order; `prepare` of the next in the background.

    What cannot be prepared or used is told on stderr in one line, and the others are not lost; ValueError at the end.
    A single item raises its own error, and a ConfigurationError, which is no item's, ends everything at once. So does,
    on several ranks, any failure but of `together`: the other ranks may be waiting in a collective of `use`.
    """
    failed = 0

    def start(position: int) -> Background[Ready]:
        return Background(lambda: prepare(items[position]))

    ahead = start(0)
    for position, item in enumerate(items):
        ahead.wait(ranks)
        current, more = ahead, position + 1 < len(items)
        if more:
            ahead = start(position + 1)
        try:
            use(item, together(ranks, current.result))
        except FAILURES as error:
            alike = ranks.world_size == 1 or isinstance(error, Unreadable)
            if len(items) == 1 or isinstance(error, ConfigurationError) or not alike:
                let_go(item)
                raise
            failed += 1
            if not isinstance(error, Unreadable) or error.tell:
                message = " ".join(str(error).split()) or type(error).__name__
                print(f"{item}: {message}" if str(item) not in message else message, file=sys.stderr, flush=True)
        let_go(item)
        del current
        if more:  # modules may hold themselves in circles, and a third model has no room
            gc.collect()
    if failed:
        raise ValueError(f"{failed} of {len(items)} could not be measured; the same command goes on from here")
