"""What changes from step to step: learning rate, limits of gradient clipping, temperatures; and how long a run is.

Rates and limits are those of OLMo 0.6.0. They count steps or tokens, by `scheduler.units`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..config.schema import SchedulerConfig, SchedulerType, TrainConfig
from ..exceptions import ConfigurationError
from ..memory.temperature import Temperatures
from .state import TrainState


@dataclass(frozen=True)
class StepSettings:
    """What the schedule prescribes for one optimizer step."""

    learning_rate: float
    max_grad_norm: float | None
    max_grad_norm_ratio: float | None
    temperatures: Temperatures


class Schedule:
    """The schedule of a run that is in `state` when this process starts.

    `tokens_per_batch` are those of all ranks; `max_steps` are the steps of the whole run; at `last_step` this process
    stops; `total` is the whole run in `scheduler.units`. Raises ConfigurationError for a run of no steps.
    """

    def __init__(
        self, config: TrainConfig, state: TrainState, batches_per_epoch: int, temperatures: Temperatures | None = None
    ):
        self.config, self.temperatures = config, temperatures or Temperatures()
        self.tokens_per_batch = config.global_train_batch_size * config.model.max_sequence_length
        self.steps_before, self._first_tokens, self._restarted_at = state.step, state.tokens, state.restarted_at
        duration = str(config.max_duration)  # in steps, epochs ("1ep") or tokens ("2e9T")
        in_tokens = int(float(duration[:-1])) if duration.endswith("T") else None
        if in_tokens is not None:
            self.max_steps = state.step + math.ceil(max(in_tokens - state.tokens, 0) / self.tokens_per_batch)
        elif duration.endswith("ep"):
            self.max_steps = math.floor(float(duration[:-2]) * batches_per_epoch)
        else:
            self.max_steps = int(float(duration))
        if self.max_steps < 1:
            raise ConfigurationError(f"max_duration: {config.max_duration} is less than one step")
        if not self._by_tokens:
            self.total = self.max_steps
        else:
            self.total = self.elapsed(self.max_steps) if in_tokens is None else in_tokens
        self.last_step = self.max_steps if config.stop_at is None else min(self.max_steps, config.stop_at)
        if config.stop_after is not None:
            self.last_step = min(self.last_step, state.step + config.stop_after)

    @property
    def _by_tokens(self) -> bool:
        return self.config.scheduler.units == "tokens"

    def elapsed(self, step: int) -> int:
        """Steps or tokens done after a step (1-based), by `scheduler.units`."""
        return self._first_tokens + (step - self.steps_before) * self.tokens_per_batch if self._by_tokens else step

    def at(self, step: int) -> StepSettings:
        """The settings of a step (1-based)."""
        config, before = self.config, self.elapsed(step - 1)
        norm, ratio = config.max_grad_norm, config.max_grad_norm_ratio
        # OLMo sets the limits at the end of the step before, so an optimizer's first step has the plain ones.
        if before not in (0, self._restarted_at):
            norm, ratio = clip_limit(config, norm, before), clip_limit(config, ratio, before)
        rate = learning_rate(config, self.elapsed(step), self.total, self._restarted_at)
        return StepSettings(rate, norm, ratio, self.temperatures.at(step / self.max_steps))


def learning_rate(config: TrainConfig, current: int, total: int, restarted_at: int | None = None) -> float:
    """The learning rate of the optimizer step that ends step `current` (1-based) of `total`.

    `current`, `total` and `restarted_at` are counted in `scheduler.units`: steps or tokens. `restarted_at` is where a
    run continued with a new optimizer state: from there the rate rises from 0, over `t_warmup`, to the value that
    the schedule has then (OLMo's bolt-on warm-up).
    """
    scheduler = config.scheduler
    if restarted_at is not None:
        warm = restarted_at + int(scheduler.t_warmup)
        if current < warm:
            share = max(current - restarted_at, 0) / (warm - restarted_at)
            return learning_rate(config, warm, total) * share
    if scheduler.name == "max_scheduler":
        inner: tuple[SchedulerType, ...] = ("cosine_with_warmup", "inverse_sqrt_with_warmup")
        return max(_schedule(scheduler, name, config, current, total) for name in inner)
    return _schedule(scheduler, scheduler.name, config, current, total)


def _schedule(scheduler: SchedulerConfig, name: SchedulerType, config: TrainConfig, current: int, total: int) -> float:
    peak, warmup = config.optimizer.learning_rate, int(scheduler.t_warmup)
    if name == "constant":
        return peak
    if current < warmup:
        lowest = scheduler.warmup_min_lr
        if lowest is None:
            lowest = config.optimizer.warmup_min_lr
        if lowest is None:
            lowest = peak * 0.1
        return lowest + (peak - lowest) * current / warmup
    if name == "constant_with_warmup":
        return peak
    if name == "inverse_sqrt_with_warmup":
        return peak * math.sqrt(warmup / max(warmup, current, 1))
    last = total if scheduler.t_max is None else int(scheduler.t_max)
    final = peak * scheduler.alpha_f
    if current >= last:
        return final
    done = (current - warmup) / (last - warmup)
    if name == "linear_with_warmup":
        return peak - (peak - final) * done
    cosine = (peak - final) * (1 + math.cos(math.pi * done)) / 2
    return final + (cosine * (1 - done) if name == "cosine_linear_envelope" else cosine)


def clip_limit(config: TrainConfig, limit: float | None, current: int) -> float | None:
    """A limit (`max_grad_norm` or `max_grad_norm_ratio`), times `grad_clip_warmup_factor` while clipping warms up.

    `current` counts steps or tokens, by `scheduler.units`; the warm-up ends after `grad_clip_warmup_steps` of them.
    """
    scheduler = config.scheduler
    steps, factor = scheduler.grad_clip_warmup_steps, scheduler.grad_clip_warmup_factor
    if limit is None or steps is None or factor is None or current > int(steps):
        return limit
    return factor * limit
