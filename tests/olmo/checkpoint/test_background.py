"""The thread that saves: one function at a time, and its errors in the thread that waits."""

from __future__ import annotations

import threading
import time

import pytest

from olmo.checkpoint.background import BackgroundTask
from olmo.distributed import Ranks


def test_one_piece_of_work_at_a_time() -> None:
    task, done, go = BackgroundTask(Ranks()), [], threading.Event()
    task.start(lambda: (go.wait(), done.append(1))[0] and None)
    task.check()  # does not wait
    assert not done
    go.set()
    task.start(lambda: done.append(2))
    assert done[0] == 1
    task.wait()
    task.wait()
    assert done == [1, 2]


def test_what_went_wrong_is_raised_once() -> None:
    def fails() -> None:
        raise OSError("no room")

    task = BackgroundTask(Ranks())
    for asked in (task.wait, lambda: task.start(lambda: None)):
        task.start(fails)
        with pytest.raises(OSError, match="no room"):
            asked()
        task.wait()
    task.start(fails)
    for _ in range(1000):
        try:
            task.check()
        except OSError:
            break
        time.sleep(0.001)
    else:
        raise AssertionError("check raised nothing")
