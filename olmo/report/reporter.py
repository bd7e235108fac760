"""What a run reports: to its folder, its log, a bar on the terminal, Weights & Biases and TensorBoard."""

from __future__ import annotations

import logging
import textwrap
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config.load import load
from ..config.schema import TrainConfig
from ..config.setting import changed_keys, plain, spelled
from ..console import Progress, log, on_terminal
from ..exceptions import ConfigurationError, Interrupted
from . import trackers
from .environment import record_start
from .run_folder import RunFolder, naming

if TYPE_CHECKING:
    from ..eval.evaluators import Evaluation
    from ..knowledge.plan import Text

_LONGEST_VALUE = 80  # characters of a setting in a log line or an error
_SECONDS_TO_EVENTS = 10  # until TensorBoard can read a metric


class StepBar(Progress):
    """The bar of a run's steps. Without a terminal nothing is printed: the log lines have the same numbers."""

    def __init__(self, done: int, last: int, show: bool):
        super().__init__("step", last, "", show=show and on_terminal(), done=done)

    def __str__(self) -> str:
        return f"step {self.done}/{self.total}{self.note}, {self.left} left"


class Reporter:
    """Writes a run's folder on rank 0 (`active`); on other ranks, and in a dry run, every call does nothing.

    A run that resumes from a step first drops what was written about later steps. A new run deletes what an older one
    wrote and saved (`save_overwrite`), after all else that can fail at a start has succeeded. Until `begin`, or the
    first metrics, the folder does not count as one that holds a run, so a start that fails can be repeated.
    `has_steps_left`: whether a run that resumes has something to train; `drops`: as in `seed_effects`.
    """

    def __init__(
        self,
        config: TrainConfig,
        active: bool,
        resume_step: int | None,
        has_steps_left: bool = True,
        drops: bool | None = None,
    ):
        self.config, self.active = config, active and not config.dry_run
        self.folder = Path(config.save_folder)
        self.wandb: Any = None  # the run, as wandb.init returns it
        self._board: Any = None
        self._bar: StepBar | None = None
        if active:
            log.setLevel(logging.INFO)
        if not self.active:
            return
        changed = "" if resume_step is None else _changed_settings(config, has_steps_left)
        self._files = RunFolder(self.folder)
        event_writer = trackers.summary_writer() if config.tensorboard else None
        if config.wandb is not None:
            self.wandb = trackers.start_wandb(config, self.folder / "wandb-id.txt", resume_step is not None)
        if resume_step is None:
            self._files.clear()
        else:
            self._files.drop_beyond(resume_step)
        if event_writer is not None:
            purge_step = None if resume_step is None else resume_step + 1
            self._board = event_writer(
                str(self._files.tensorboard), purge_step=purge_step, flush_secs=_SECONDS_TO_EVENTS
            )
        config.save(self.folder / "config.yaml")
        record_start(self.folder / "environment.json", config, resume_step, drops)
        self._logfile = _LogFile(self.folder / "train.log")
        self._logfile.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        log.addHandler(self._logfile)
        if changed:
            log.warning(
                "save_folder: %s was last started with other settings, and continues from step %d with the new "
                "values: %s; choose another save_folder to start a new run",
                self.folder,
                resume_step,
                changed,
            )

    def on_disk(self) -> None:
        """Wait until everything reported is on the disk: a checkpoint is written after what it needs to resume."""
        if self.active:
            if self._board is not None:
                with naming(self._files.tensorboard):
                    self._board.flush()
            self._files.sync()

    def begin(self) -> None:
        """From now on the folder holds a run."""
        if self.active:
            self._files.begin()

    def bar(self, done: int, last: int) -> StepBar:
        """The bar of the run's steps, which `close` removes."""
        self._bar = StepBar(done, last, show=self.active)
        return self._bar

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Record metrics of a step."""
        if self.active:
            self._files.add_metrics(step, values)
            self.track(step, values)

    def track(self, step: int, values: Mapping[str, float]) -> None:
        """Record metrics of a step with Weights & Biases and TensorBoard alone."""
        if not self.active:
            return
        if self._board is not None:
            with naming(self._files.tensorboard):
                for name, value in values.items():
                    self._board.add_scalar(name, value, step)
        if self.wandb is not None and step % (self.config.wandb.log_interval if self.config.wandb else 1) == 0:
            self.wandb.log(dict(values), step=step)

    def injection(self, step: int, injection_round: int, entered: Sequence[tuple[int, Text]]) -> None:
        """Record what entered the global batch of a step: pairs of row and text, in the order of the rows.

        To be called after the step and before its checkpoint: a checkpoint has the lines of all steps up to its own,
        and a restart from it drops the others.
        """
        if self.active:
            texts = [{"entry": text.entry, "row": row, "tokens": len(text.input_ids)} for row, text in entered]
            tokens = sum(len(text.input_ids) for _, text in entered)
            self._files.add_injection({"step": step, "round": injection_round, "tokens": tokens, "texts": texts})

    def evaluation(self, step: int, result: Evaluation, prefix: str = "", brief: bool = False) -> None:
        """Record an evaluation. `prefix` ('original') names weights other than those being trained; of a `brief` one
        only K is logged to the console."""
        if not self.active:
            return
        named = {f"{prefix}/{k}" if prefix else k: v for k, v in result.metrics.items()}
        stem = prefix or f"step{step}"
        if result.probes is not None:
            self._files.write_table(f"probes/{stem}.parquet", {"step": step, **result.probes.columns()})
        if result.losses:
            labels = [label for label, losses in result.losses.items() for _ in losses]
            numbers = [i for losses in result.losses.values() for i in range(len(losses))]
            values = [float(v) for losses in result.losses.values() for v in losses]
            columns = {"step": step, "label": labels, "instance": numbers, "loss": values}
            self._files.write_table(f"losses/{stem}.parquet", columns)
        self.metrics(step, named)
        if not brief:
            log.info("step %d: evaluation%s", step, f" of the {prefix} weights" if prefix else "")
        if brief and "eval/K" in named:
            log.info("step %d: eval/K = %.4f", step, named["eval/K"])
        for line in () if brief else _summary(named):
            log.info("%s", line)

    def ended(self, error: Exception) -> None:
        """Write to train.log why a run ended before its last step; the command prints it on the console."""
        if self.active:
            name = "interrupted" if isinstance(error, Interrupted) else "error"
            with suppress(OSError):  # the disk may be full
                self._logfile.handle(log.makeRecord("olmo", logging.ERROR, "", 0, f"{name}: {error}", (), None))

    def close(self) -> None:
        """Remove the bar, and close every file and tracker, also those after one that cannot be closed."""
        if self._bar is not None:
            self._bar.close()
        if not self.active:
            return
        with ExitStack() as last_first:
            if self.wandb is not None:
                last_first.callback(self.wandb.finish)
            last_first.callback(self._close_log)
            last_first.callback(self._files.close)
            if self._board is not None:
                with naming(self._files.tensorboard):
                    self._board.close()

    def _close_log(self) -> None:
        log.removeHandler(self._logfile)
        with suppress(OSError):  # the disk may be full
            self._logfile.close()


def _changed_settings(config: TrainConfig, has_steps_left: bool) -> str:
    """The settings that define the run and differ from those of its last start, with both values; "" if none do.

    Raises ConfigurationError for them unless `allow_changed_settings`, or only a run is prolonged.
    """
    try:
        before = load(Path(config.save_folder) / "config.yaml")
    except ConfigurationError as error:  # the file is missing, or of another version
        log.warning("save_folder: the settings cannot be compared with those of its last start: %s", error)
        return ""
    keys = changed_keys(before, config)
    shown = ", ".join(f"{key} {_value_of(before, key)} -> {_value_of(config, key)}" for key in keys)
    prolonged = has_steps_left and keys == ["max_duration"]
    if keys and not prolonged and not config.allow_changed_settings:
        kind = "run" if has_steps_left else "finished run"
        raise ConfigurationError(
            f"save_folder: {config.save_folder} holds a {kind} of other settings: {shown}; choose another "
            "save_folder, or add --allow_changed_settings to continue that run with the new values"
        )
    return shown


def _value_of(config: TrainConfig, key: str) -> str:
    text = spelled(plain(reduce(getattr, key.split("."), config)))
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."


class _LogFile(logging.FileHandler):
    """A log file that may be cut short by a full disk: the write of metrics or of a checkpoint raises instead."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass


def _summary(metrics: Mapping[str, float]) -> list[str]:
    """An evaluation in a few lines for people: K (without probes of it, log-probabilities), losses on token files,
    accuracies, entropies. metrics.jsonl has all."""
    groups: dict[str, list[str]] = {"K": [], "log-probability": [], "loss": [], "accuracy": [], "knowledge entropy": []}
    has_k = any(name.endswith("eval/K") for name in metrics)
    for name, value in metrics.items():
        label, _, last = name.partition("eval/")[2].rpartition("/")
        group, shown = "", label
        if not label and last.partition("_")[0] == "K":
            group, shown = "K", last.removeprefix("K").removeprefix("_") or "all"
        elif label == "downstream" and not last.endswith("_chance"):
            group, shown = "accuracy", last
        elif last == "knowledge_entropy":
            group = "knowledge entropy"
        elif last == "log_probability" and not has_k:
            group = "log-probability"
        # That of probes, diluted by prompt and padding, is recorded only for comparison with published figures.
        elif last == "CrossEntropyLoss" and f"{name.rpartition('/')[0]}/log_probability" not in metrics:
            group = "loss"
        if group:
            groups[group].append(f"{shown} {value:.4f}")
    lines = (f"{group}: {', '.join(items)}" for group, items in groups.items() if items)
    return [row for line in lines for row in textwrap.wrap(line, 100, initial_indent="  ", subsequent_indent="    ")]
