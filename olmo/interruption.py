"""How a run ends before its last step: signals, the time limit, early stopping.

SIGTERM, SIGINT (control-C) and SIGUSR1 (with which SLURM warns of the end of a job) let the run finish its step, save
and end with exit status 75. The same signal again, at least a second later, or another one ends the process at once,
with 128 + its number. (Within a second it may be the same one: torchrun hands on what a job manager sends to all.)

`time_limit` (seconds since the first step) and `early_stopping_factor` are looked at every `canceled_check_interval`
steps, as in OLMo 0.6.0 (`Trainer.check_if_cancelled` and `Trainer.fit` in its olmo/train.py). After the time limit
the run saves, and does `extra_steps_after_cancel` steps more without evaluating or saving. A step stops the run when,
after the warm-up, its loss is more than `early_stopping_factor` times the lowest of all steps so far.
Where this differs: the lowest loss outlives a restart (OLMo forgets it), and a run that is stopped early fails
(status 1; in OLMo 0), so that whatever follows does not take it for a finished one.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from torch import Tensor

from .config import TrainConfig
from .console import above_bars
from .distributed import Ranks
from .exceptions import Interrupted

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_SAME_SIGNAL = 1.0  # seconds
_TIME_LIMIT = 1000  # beside the numbers of signals


class Signals:
    """Within this context the first signal is only noted, in `received`; the second ends the process."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._at = 0.0
        self._before: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():  # no other may ask for signals
            self._before = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.received is None:
            self.received, self._at = number, time.monotonic()
            _tell(f"{name}: finishing the step, saving, then ending; once more ends at once")
        elif number != self.received or time.monotonic() - self._at >= _SAME_SIGNAL:
            _tell(f"{name}: ending at once")
            os._exit(128 + number)


def _tell(message: str) -> None:
    """One line on stderr, written past Python's buffers, which the signal may have come in the middle of."""
    os.write(2, above_bars(message).encode())


@dataclass(frozen=True)
class Cancellation:
    """Why a run is to end before its last step, and how many steps more it does after saving."""

    reason: str
    extra_steps: int = 0
    failed: bool = False

    def end(self, saved: Path) -> Exception:
        """What ends the run after it saved this checkpoint."""
        if self.failed:
            return ValueError(f"{self.reason}; saved {saved}")
        return Interrupted(f"{self.reason}; saved {saved}, from where --try_load_latest_save goes on")


class Watch:
    """Asks after every step whether the run is to go on; all ranks get the same answer."""

    def __init__(self, config: TrainConfig, ranks: Ranks, signals: Signals):
        self.config, self.ranks, self.signals = config, ranks, signals
        self.started = time.monotonic()

    def asked(self, step: int) -> Cancellation | None:
        """A signal that has reached any rank, or the time limit by the clock of the first. A collective."""
        limit, mine = self.config.time_limit, self.signals.received or 0
        if limit is not None and self.ranks.is_first and step % self.config.canceled_check_interval == 0:
            mine = max(mine, _TIME_LIMIT if time.monotonic() - self.started >= limit else 0)
        number = self.ranks.largest(mine)
        if number == _TIME_LIMIT:
            return Cancellation(f"time_limit of {limit:g} seconds at step {step}", self.config.extra_steps_after_cancel)
        return Cancellation(f"{signal.Signals(number).name} at step {step}") if number else None

    def signalled(self) -> bool:
        """Whether a signal has reached any rank. A collective."""
        return self.ranks.largest(self.signals.received or 0) > 0

    def diverged(self, step: int, done: int, loss: Tensor, lowest: Tensor) -> Cancellation | None:
        """Early stopping, by the mean losses of all ranks: of this step, and the lowest of all steps up to it.

        done: steps or tokens, as the scheduler counts its warm-up.
        """
        factor = self.config.early_stopping_factor
        looks = step % self.config.canceled_check_interval == 0 and done > self.config.scheduler.t_warmup
        if factor is None or not looks or loss.item() <= factor * lowest.item():
            return None
        return Cancellation(
            f"loss {loss.item():.4f} at step {step} is more than early_stopping_factor {factor:g} times the lowest, "
            f"{lowest.item():.4f}",
            failed=True,
        )
