"""Work in a thread while training continues: writing a checkpoint."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch

from ..distributed.ranks import Ranks


class BackgroundTask:
    """Runs one function at a time in a thread, so that training continues."""

    def __init__(self, ranks: Ranks, device: torch.device | None = None):
        self.ranks, self.device = ranks, device
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Run `work` in the thread, after waiting for the function before."""
        self.wait()

        def run() -> None:
            try:
                if self.device is not None and self.device.type == "cuda":
                    torch.cuda.set_device(self.device)  # a new thread uses device 0, and would allocate memory there
                work()
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=run, name="background task", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait for the thread; raises what it raised."""
        if self._thread is not None:
            self._thread.join()
            self._thread, error, self._error = None, self._error, None
            if error is not None:
                raise error

    def check(self) -> None:
        """Raise what the function raised, if it has ended on all processes; does not wait for it. A collective: all
        processes have started and waited for the same functions."""
        if self._thread is not None and self.ranks.largest(self._thread.is_alive()) == 0:
            self.wait()
