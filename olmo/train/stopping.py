"""How a run ends before its last step: signals, the time limit, a tag on Weights & Biases, early stopping.

docs/training.md and docs/checkpoints.md describe the effects and exit statuses. Conditions are checked as in OLMo 0.6.0
(`Trainer.check_if_cancelled` and `Trainer.fit`); early stopping begins after the warm-up. Unlike in OLMo, the time
limit is checked after every step, in the exchange of signals between the ranks, which costs the same with it; the
lowest loss survives a restart; early stopping is a failure (status 1, there 0), so that no script takes the run for a
finished one; and tags are requested in the background, with any login, not only WANDB_API_KEY.
"""

from __future__ import annotations

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
from ..console import above_bars, log
from ..distributed.launcher import ABANDONABLE
from ..distributed.ranks import Ranks
from ..exceptions import Interrupted

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_SAME_SIGNAL = 1.0  # seconds in which torchrun passes on what a job manager sends to all
_TIME_LIMIT, _TAG = 1000, 1001  # larger than the numbers of signals
_TAGS = {"cancel", "canceled", "cancelled"}
_REQUEST_TIMEOUT = 20  # seconds, of each request to Weights & Biases
_PAUSE = 10.0  # seconds between requests, whose rate the server limits
_LONGEST_PAUSE = 60.0  # seconds after which steps are not counted


class Signals:
    """Within this context the first signal is recorded in `received`; the second ends the process."""

    def __init__(self) -> None:
        self.received: int | None = None
        self.ignored = False  # after the context
        self._at = 0.0
        self._before: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers in no other
            self._before = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if self.ignored else handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.received is None:
            self.received, self._at = number, time.monotonic()
            _print(f"{name}: finishing the step and saving; another signal ends at once")
        elif number != self.received or time.monotonic() - self._at >= _SAME_SIGNAL:
            _print(f"{name}: ending at once")
            os._exit(128 + number)


def _print(message: str) -> None:
    """Write a line to stderr past Python's buffers, which the signal may have interrupted."""
    os.write(2, above_bars(message).encode())


@dataclass(frozen=True)
class Cancellation:
    """Why a run ends before its last step, and how many more steps it does after saving."""

    reason: str
    extra_steps: int = 0
    failed: bool = False

    def error(self, saved: Path) -> Exception:
        """The exception that ends the run, after it has saved this checkpoint."""
        if self.failed:
            return ValueError(f"{self.reason}; saved {saved}")
        return Interrupted(f"{self.reason}; saved {saved}; add --try_load_latest_save to resume")


class Tags:
    """Whether somebody has tagged a run on Weights & Biases to be cancelled.

    A server that is slow, wrong or unreachable costs the run nothing but one warning.
    """

    def __init__(self, run: Any = None):
        self.cancel = False
        self._run = run  # of wandb, or None
        self._request: threading.Thread | None = None
        self._next = 0.0
        self._has_warned = False

    def request(self, due: bool = True) -> None:
        """Request the tags in the background, unless the last request is unanswered or very recent; if it is not `due`,
        only when the last one is long past."""
        if self._run is None or self._run.offline or self._run.disabled:
            return
        if time.monotonic() >= self._next + (0 if due else _LONGEST_PAUSE - _PAUSE) and (
            self._request is None or not self._request.is_alive()
        ):
            self._next = time.monotonic() + _PAUSE
            self._request = threading.Thread(target=self._read, name=ABANDONABLE, daemon=True)
            self._request.start()

    def _read(self) -> None:
        import wandb

        try:
            # The run object itself knows only the tags it began with.
            tags = wandb.Api(timeout=_REQUEST_TIMEOUT).run(self._run.path).tags
        except Exception as error:  # the client lets those of its HTTP library through; training must not end
            if not self._has_warned:
                reason = textwrap.shorten(str(error), 200) or type(error).__name__
                log.warning("wandb: cannot read whether the run was tagged to be cancelled (%s)", reason)
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

    def asked(self, step: int) -> Cancellation | None:
        """A signal to any rank, or the time limit or a tag, which the first rank checks. A collective."""
        limit, mine = self.config.time_limit, self.signals.received or 0
        if self.ranks.is_first:
            self.tags.request(due=step % self.config.canceled_check_interval == 0)
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
        """Early stopping, by the loss tracked last and the lowest of all steps up to it.

        done: steps or tokens, as the scheduler counts its warm-up.
        """
        factor = self.config.early_stopping_factor
        looks = step % self.config.canceled_check_interval == 0 and done > self.config.scheduler.t_warmup
        if factor is None or not looks or self._loss.item() <= factor * self._lowest.item():
            return None
        return Cancellation(
            f"loss {self._loss.item():.4f} at step {step} is more than early_stopping_factor {factor:g} times the "
            f"lowest, {self._lowest.item():.4f}",
            failed=True,
        )
