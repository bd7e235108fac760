"""How a run ends before its last step: signals, the time limit, a tag on Weights & Biases, early stopping.

SIGTERM, SIGINT (control-C) and SIGUSR1 (with which SLURM warns of the end of a job) let the run finish its step, save
and end with exit status 75. The same signal again, at least a second later, or another one ends the process at once,
with 128 + its number. (Within a second it may be the same one: torchrun hands on what a job manager sends to all.)

`time_limit` (seconds since the first step) and `early_stopping_factor` are looked at every `canceled_check_interval`
steps, as in OLMo 0.6.0 (`Trainer.check_if_cancelled` and `Trainer.fit` in its olmo/train.py); so are the tags of the
run on Weights & Biases, of which `cancel`, `canceled` and `cancelled` end it. After the time limit or a tag the run
saves, and does `extra_steps_after_cancel` steps more without evaluating or saving. A step stops the run when, after
the warm-up, its loss is more than `early_stopping_factor` times the lowest of all steps so far.
Where this differs: the lowest loss outlives a restart (OLMo forgets it), and a run that is stopped early fails
(status 1; in OLMo 0), so that whatever follows does not take it for a finished one. The question after tags is asked
in the background, where OLMo's training waits for the answer; the run ends with the step in which a tag is known. It
is asked with whatever login the run has, in OLMo only with the environment variable WANDB_API_KEY.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import textwrap
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from ..config.schema import TrainConfig
from ..console import above_bars
from ..distributed import READER, Ranks
from ..exceptions import Interrupted

log = logging.getLogger("olmo")

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_SAME_SIGNAL = 1.0  # seconds
_TIME_LIMIT, _TAG = 1000, 1001  # beside the numbers of signals
_TAGS = {"cancel", "canceled", "cancelled"}
_PATIENCE = 20  # seconds for each request to Weights & Biases
_PAUSE = 10.0  # seconds from one question to the next, as the server counts requests


class Signals:
    """Within this context the first signal is only noted, in `received`; the second ends the process."""

    def __init__(self) -> None:
        self.received: int | None = None
        self.ignored = False  # from the end of the context on
        self._at = 0.0
        self._before: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():  # no other may ask for signals
            self._before = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if self.ignored else handler)

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


class Tags:
    """Whether somebody has tagged a run on Weights & Biases to be cancelled.

    A server that is slow, wrong or away costs the run nothing but one warning.
    """

    def __init__(self, run: Any = None):
        self.cancel = False
        self._run = run  # of wandb, or None
        self._asking: threading.Thread | None = None
        self._next = 0.0
        self._has_warned = False

    def ask(self) -> None:
        """Begin to ask the server, unless the last question is still open, or was asked just now."""
        if self._run is None or self._run.offline or self._run.disabled:
            return
        if time.monotonic() >= self._next and (self._asking is None or not self._asking.is_alive()):
            self._next = time.monotonic() + _PAUSE
            self._asking = threading.Thread(target=self._ask, name=READER, daemon=True)
            self._asking.start()

    def _ask(self) -> None:
        import wandb

        try:
            # Not the tags that the run itself knows: those it began with.
            tags = wandb.Api(timeout=_PATIENCE).run(self._run.path).tags
        except Exception as error:  # whatever it is, the run matters more
            if not self._has_warned:
                reason = textwrap.shorten(str(error), 200) or type(error).__name__
                log.warning("wandb: cannot ask whether the run was tagged to be cancelled (%s); it goes on", reason)
            self._has_warned = True
        else:
            self.cancel = not _TAGS.isdisjoint(tag.lower() for tag in tags or ())


class Watch:
    """Decides after every step whether the run continues; all ranks decide alike."""

    def __init__(
        self,
        config: TrainConfig,
        ranks: Ranks,
        signals: Signals,
        tags: Tags | None = None,
        lowest_loss: float = math.inf,
    ):
        self.config, self.ranks, self.signals, self.tags = config, ranks, signals, tags or Tags()
        self._started = time.monotonic()
        self._loss = self._lowest = torch.tensor(lowest_loss)

    @property
    def lowest_loss(self) -> float:
        """The lowest mean loss of all steps, if early_stopping_factor is set; waits for the device."""
        return self._lowest.item()

    def track(self, loss: Tensor) -> None:
        """Record this rank's loss of a step, (), for early stopping; does not wait for the device. A collective."""
        if self.config.early_stopping_factor is not None:
            self._loss = self.ranks.sum_tensor(loss.clone()) / self.ranks.world_size
            self._lowest = torch.minimum(self._lowest.to(loss.device), self._loss)

    def check(self, step: int, done: int) -> Cancellation | None:
        """Why the run ends with this step, or None. A collective.

        done: steps or tokens, as the scheduler counts its warm-up.
        """
        return self.asked(step) or self.diverged(step, done)

    def asked(self, step: int) -> Cancellation | None:
        """A signal to any rank, or the time limit or a tag, which the first rank checks. A collective."""
        limit, mine = self.config.time_limit, self.signals.received or 0
        if self.ranks.is_first and step % self.config.canceled_check_interval == 0:
            self.tags.ask()
            mine = max(mine, _TIME_LIMIT if limit is not None and time.monotonic() - self._started >= limit else 0)
        number = self.ranks.largest(max(mine, _TAG if self.tags.cancel else 0))
        if number == _TIME_LIMIT:
            return Cancellation(f"time_limit of {limit:g} seconds at step {step}", self.config.extra_steps_after_cancel)
        if number == _TAG:
            reason = f"a tag on Weights & Biases at step {step} (remove it to resume)"
            return Cancellation(reason, self.config.extra_steps_after_cancel)
        return Cancellation(f"{signal.Signals(number).name} at step {step}") if number else None

    def signalled(self) -> bool:
        """Whether any rank has received a signal. A collective."""
        return self.ranks.largest(self.signals.received or 0) > 0

    def diverged(self, step: int, done: int) -> Cancellation | None:
        """Early stopping, by the loss tracked last and the lowest of all steps up to it."""
        factor = self.config.early_stopping_factor
        looks = step % self.config.canceled_check_interval == 0 and done > self.config.scheduler.t_warmup
        if factor is None or not looks or self._loss.item() <= factor * self._lowest.item():
            return None
        return Cancellation(
            f"loss {self._loss.item():.4f} at step {step} is more than early_stopping_factor {factor:g} times the "
            f"lowest, {self._lowest.item():.4f}",
            failed=True,
        )
