"""Callbacks for the Trainer of transformers, and thus of TRL: knowledge entropy and probes while a model trains.

They measure between optimizer steps, in evaluation mode, and restore what that changes: training is bit for bit as
without them. Under DDP and DeepSpeed's ZeRO 1 and 2 the processes share out the work, and each has the same result.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback

from analysis.given import GivenTokenizer
from analysis.job import Settings
from analysis.module import measure_module
from analysis.result import Result
from knowledge_entropy.injecting import Entries
from knowledge_entropy.measuring import naming_arguments, settings_of
from knowledge_entropy.scoring import BATCH_SIZE, Scores, probes_of, score_probes_of
from olmo.distributed import Ranks, current_ranks
from olmo.knowledge.entries import Probe
from olmo.memory.unwrap import is_sharded, unwrapped


class _Periodic(TrainerCallback):
    """Measures before the first step, every few steps or at the end of every epoch, and after the last step."""

    name = ""  # of the number that is always logged

    def __init__(self, every: int | str):
        if every != "epoch" and (not isinstance(every, int) or every < 1):
            raise ValueError(f"every: {every!r}; expected a number of optimizer steps, or 'epoch'")
        self.every = every
        self._last: int | None = None  # step at which was measured

    def numbers(self, model: nn.Module, processing_class: Any, step: int) -> dict[str, float]:
        """What is logged after `step` optimizer steps; a collective."""
        raise NotImplementedError

    def on_train_begin(self, args: Any, state: Any, control: Any, **of_trainer: Any) -> None:
        logged = [line["step"] for line in state.log_history if self.name in line]
        self._last = logged[-1] if logged else None  # of the run that resumes

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **of_trainer: Any) -> None:
        if self._last is None:  # not in on_train_begin, before which some trackers are not ready
            self._measure(state, control, **of_trainer)

    def on_step_end(self, args: Any, state: Any, control: Any, **of_trainer: Any) -> None:
        if isinstance(self.every, int) and state.global_step % self.every == 0:
            self._measure(state, control, **of_trainer)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **of_trainer: Any) -> None:
        ends = control.should_training_stop or state.global_step >= state.max_steps
        if self.every == "epoch" or ends:  # not in on_train_end, after which trackers are closed
            self._measure(state, control, **of_trainer)

    def _measure(self, state: Any, control: Any, model: Any, processing_class: Any = None, **of_trainer: Any) -> None:
        if state.global_step == self._last:
            return
        self._last, began = state.global_step, time.perf_counter()
        found = self.numbers(model, processing_class, state.global_step)
        found[f"{self.name}_seconds"] = time.perf_counter() - began
        # Of the base class: what subclasses add to a line of the log is not for this one. It also ends the wish of
        # other callbacks for a line of the Trainer's own numbers.
        wished = control.should_log
        Trainer.log(_calling_trainer(), found)
        control.should_log = wished


def _calling_trainer() -> Trainer:
    """The Trainer that calls this callback. Callbacks are given everything else of it, but not what logs."""
    frame = sys._getframe()
    while frame is not None:
        if isinstance(caller := frame.f_locals.get("self"), Trainer):
            return caller
        frame = frame.f_back  # type: ignore[assignment]
    raise ValueError("this callback belongs to a Trainer of transformers: Trainer(..., callbacks=[callback])")


class KnowledgeEntropyCallback(_Periodic):
    """Logs the knowledge entropy of the model that a Trainer trains, to its trackers and its log history:
    `knowledge_entropy`, `knowledge_entropy_standard_error`, `knowledge_entropy/layer_{l}`, `knowledge_entropy_seconds`.

    Under FSDP every process measures all instances, by passes through the model as the Trainer has wrapped it, mixed
    precision included. ZeRO 3 raises a ValueError.

    Args:
        data: as of `measure`, and so are the other arguments that are not described here.
        every: optimizer steps, or "epoch"; also measured are the start and the end of training.
        tokenizer: of text; by default the Trainer's (processing_class).
        output: a folder for the two files of every measurement, in `step{N}`: `analysis.entropy_series` draws them.

    Attributes:
        results: the results by step.

    Raises:
        ValueError: where an argument is wrong, or the data cannot be read.
    """

    name = "knowledge_entropy"

    def __init__(
        self,
        data: Any,
        every: int | str,
        *,
        data_size: int | None = None,
        sequence_length: int | None = None,
        pack: str = "eos",
        batch_size: int = 4,
        coefficient: str = "abs",
        measures: Sequence[str] = ("knowledge",),
        tolerance: float | None = None,
        tokenizer: Any = None,
        output: str | Path | None = None,
    ):
        super().__init__(every)
        self.results: dict[int, Result] = {}
        self.output = None if output is None else Path(output)
        with naming_arguments():
            self._settings: Settings = settings_of(
                data,
                tokenizer=tokenizer,
                data_size=data_size,
                sequence_length=sequence_length,
                pack=pack,
                batch_size=batch_size,
                coefficient=coefficient,
                measures=measures,
                tolerance=tolerance,
            )
        self._with_own_tokenizer = tokenizer is not None

    def numbers(self, model: nn.Module, processing_class: Any, step: int) -> dict[str, float]:
        with naming_arguments():
            if not self._with_own_tokenizer and self._settings.instances.is_text and processing_class is not None:
                # The data is not read again: it may be an iterator.
                instances = replace(self._settings.instances, tokenizer=GivenTokenizer.of(processing_class))
                self._settings, self._with_own_tokenizer = replace(self._settings, instances=instances), True
            # A pass of FSDP's is one of all processes, and with shares some would have one more than others.
            ranks = current_ranks()
            shared = Ranks() if is_sharded(unwrapped(model)) else ranks
            result = measure_module(model, self._settings, shared, step)
        self.results[step] = result
        if self.output is not None and ranks.is_first:
            result.save(self.output / f"step{step}")
        found = {self.name: result.entropy}
        if result.standard_error is not None:
            found[f"{self.name}_standard_error"] = result.standard_error
        for layer, entropy in zip(result.coefficients, result.layers.tolist()):
            found[f"{self.name}/layer_{layer}"] = entropy
        for other in set(self._settings.measures) - {"knowledge"}:
            found[f"{other}_entropy"] = result.content[f"{other}_entropy"]
        return found


class ProbesCallback(_Periodic):
    """Logs how well the model that a Trainer trains knows fictional knowledge, to its trackers and its log history: the
    numbers of `score`, such as `K`, `K_paraphrase`, `K_once_memorization` and `K_published`, and `K_seconds`.

    The model computes in the type of its weights, without the Trainer's mixed precision. FSDP and ZeRO 3 raise a
    ValueError.

    Args:
        entries: as of `score`, and so are the other arguments that are not described here.
        every: optimizer steps, or "epoch"; also scored are the start and the end of training.
        tokenizer: by default the Trainer's (processing_class).

    Attributes:
        scores: the scores by step, with a row for each probe.

    Raises:
        ValueError: where `every` is something else.
    """

    name = "K"

    def __init__(
        self,
        entries: Entries | Mapping[str, Entries],
        every: int | str,
        *,
        setting: str = "paraphrase",
        batch_size: int = BATCH_SIZE,
        sequence_length: int | None = None,
        tokenizer: Any = None,
    ):
        super().__init__(every)
        self.scores: dict[int, Scores] = {}
        self._entries, self._setting, self._tokenizer = entries, setting, tokenizer
        self._size = (batch_size, sequence_length)
        self._probes: list[Probe] | None = None

    def numbers(self, model: nn.Module, processing_class: Any, step: int) -> dict[str, float]:
        if self._probes is None:
            tokenizer = processing_class if self._tokenizer is None else self._tokenizer
            self._probes = probes_of(model, self._entries, tokenizer, self._setting, self._size[1])
        self.scores[step] = score_probes_of(model, self._probes, *self._size, current_ranks())
        return dict(self.scores[step].numbers)
