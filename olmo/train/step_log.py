"""What a run logs of its steps: metrics, injections, the instances it has read, and lines on the console."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from ..config.schema import TrainConfig
from ..console import clock, log
from ..data.loader import Batch
from ..distributed.ranks import Ranks
from ..knowledge.plan import Plan, Text
from ..model.causal_lm import CausalLM, Model
from ..report.reporter import Reporter, StepBar
from ..report.run_folder import append_indices
from .schedule import Schedule
from .step import StepResult
from .throughput import StepTimer, peak_memory, peak_operations, training_operations


class StepLog:
    """Logs steps through `reporter`, and advances its bar. All ranks call it alike; reading a result is a collective.

    `timer` is to be entered for every step, logging included.
    """

    def __init__(
        self, config: TrainConfig, model: Model, plan: Plan | None, schedule: Schedule, ranks: Ranks, reporter: Reporter
    ):
        self.config, self.plan, self.ranks, self.reporter = config, plan, ranks, reporter
        self.timer = StepTimer(config)
        self._device = next(model.parameters()).device
        self._has_auxiliary = isinstance(model, CausalLM) and model.has_auxiliary
        self._bar: StepBar = reporter.bar(schedule.steps_before, schedule.last_step)
        self._tokens_per_batch = schedule.tokens_per_batch
        self._operations = training_operations(model, config.model.max_sequence_length)
        self._peak_operations = peak_operations(config, self._device)

    def write(
        self, result: StepResult, batch: Batch, entered: Sequence[tuple[int, Text]], tokens: int, last_step: int
    ) -> None:
        """Log a step that is due: every `console_log_interval`, the last one, and those of an injection round.

        Metrics of single weights, which a result has at steps of their own, are for the trackers alone.

        entered: the (global row, text) pairs injected on this rank; tokens: seen by all ranks. Raises ValueError if
        the loss is not finite.
        """
        step = result.step
        self.reporter.begin()
        self._bar.advance()
        if self.config.save_data_indices:
            append_indices(Path(self.config.save_folder), self.ranks.rank, step, batch.instances.tolist())
        if result.weights:
            names, values = zip(*result.weights.items())
            self.reporter.track(step, dict(zip(names, torch.stack(values).tolist())))
        injection_round = None if self.plan is None else self.plan.round_of(step)
        on_console = step % self.config.console_log_interval == 0 or step == last_step
        if injection_round is None and not on_console:
            return
        loss, z_loss, auxiliary, norm = result.read(self.ranks)
        metrics = {
            "train/CrossEntropyLoss": loss,
            "train/Perplexity": math.exp(min(loss, 700.0)),
            "optim/total_grad_norm": norm,
            "optim/clipping_rate": result.clipping_rate.item(),
            "optim/learning_rate": result.learning_rates[0],
            **{f"optim/learning_rate_group{number}": rate for number, rate in enumerate(result.learning_rates)},
            "throughput/total_tokens": float(tokens),
            "throughput/device/peak_memory_bytes": float(peak_memory(self._device)),
        }
        if batch.padded_share:
            metrics["data/padded_share"] = batch.padded_share
        if self._device.type == "cuda" and (step < 3 or step % 10 == 0):  # as often as in OLMo: ranks wait for another
            metrics["System/Peak GPU Memory (MB)"] = self.ranks.largest(peak_memory(self._device)) / 1_000_000
        if self.config.softmax_auxiliary_loss:
            metrics["train/ZLoss"] = z_loss
        if self._has_auxiliary:
            metrics["train/LoadBalancingLoss"] = auxiliary
        speed = left = ""
        if (seconds := self.timer.seconds) is not None:
            tokens_per_second = self._tokens_per_batch / self.ranks.world_size / seconds
            metrics["throughput/device/tokens_per_second"] = tokens_per_second
            metrics["throughput/device/operations_per_second"] = self._operations * tokens_per_second
            if self._peak_operations is not None:
                metrics["throughput/device/mfu"] = self._operations * tokens_per_second / self._peak_operations
            metrics["throughput/device/batches_per_second"] = 1 / seconds
            speed = f", {self._tokens_per_batch / seconds:,.0f} tokens/s"
            left = f", {clock(seconds * (last_step - step))} left"
        if injection_round is not None:
            metrics.update(self._log_injection(step, injection_round, entered))
        self.reporter.metrics(step, metrics)
        self._bar.note = f": loss {loss:.4f}{speed}"
        if self.ranks.is_first and on_console:
            log.info("step %d/%d: loss %.4f%s%s", step, last_step, loss, speed, left)

    def _log_injection(self, step: int, injection_round: int, entered: Sequence[tuple[int, Text]]) -> dict[str, float]:
        """Record an injection round, after counting that the ranks injected all of its texts; its metrics."""
        assert self.plan is not None
        counts = torch.tensor([len(entered), sum(len(t.input_ids) for _, t in entered)], device=self._device)
        texts, tokens = self.ranks.sum_tensor(counts).tolist()
        of_all_ranks = self.plan.texts_of_batch(injection_round, self.config.global_train_batch_size)
        assert texts == len(of_all_ranks)
        self.reporter.injection(step, injection_round, of_all_ranks)
        if self.ranks.is_first:
            log.info("step %d: injection round %d, %d texts", step, injection_round, texts)
        numbers = {"round": injection_round, "texts": texts, "tokens": tokens}
        return {f"injection/{name}": float(number) for name, number in numbers.items()}
