"""The loop of analysis.score over its checkpoints: one is scored while the next is downloaded and read."""

from __future__ import annotations

import argparse
import csv
import io
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from analysis.choices import BATCH_SIZE, EDITS
from analysis.downloads import Downloads
from analysis.locations import Location, check_writable, folder_names
from analysis.prefetch import Failures, prefetch, together
from analysis.score_settings import Settings, loss_evaluators, of_configuration, probe_evaluators, task_evaluators
from analysis.scores import Cell, Job, rows
from olmo.config import EvaluatorConfig, TrainConfig
from olmo.config.check import run_problems
from olmo.console import fixed
from olmo.distributed import disable_malloc_trim, pick_device, process_group
from olmo.exceptions import ConfigurationError, listed
from olmo.files.atomic import write_text

TABLE = "scores.csv"


def score_all(args: argparse.Namespace, locations: Sequence[Location]) -> None:
    """Score the checkpoints as the flags of analysis.score have it. Raises as that command does."""
    settings = _settings(args)
    if args.output is not None:
        check_writable(args.output)
    disable_malloc_trim()
    device = pick_device(args.device)
    names = folder_names(locations) if args.output is not None and len(locations) > 1 else [""] * len(locations)
    jobs = [_job(args, location, settings, name) for location, name in zip(locations, names)]
    results = []
    with process_group(device) as ranks:
        failures = Failures(len(jobs), ranks)
        try:
            for job, preparation in prefetch(jobs, Job.prepare, ranks):
                with failures.of(job), job.downloads.deleted_after_use():
                    results.append(job.score(together(ranks, preparation), device, ranks))
            failures.check()
        finally:
            if ranks.is_first and results:
                found = rows(results)
                print(_as_text(found), flush=True)
                if args.output is not None and len(jobs) > 1:
                    write_text(args.output / TABLE, _as_csv(found))


def _settings(args: argparse.Namespace) -> Settings:
    """What is scored, and how. Raises ConfigurationError for what cannot be."""
    if args.config is not None:
        base, left_out = of_configuration(args.config)
        for label in left_out:
            print(f"{args.config}: evaluators.{label} is left out: analysis.entropy measures it", file=sys.stderr)
    else:
        evaluators: list[EvaluatorConfig] = []
        size = args.batch_size or BATCH_SIZE
        if args.knowledge is not None:
            evaluators += probe_evaluators(args.knowledge)
        evaluators += loss_evaluators(args.held_out or [])
        if args.tasks is not None:
            batches = -1 if args.limit is None else math.ceil(args.limit / size)
            evaluators += task_evaluators(args.tasks.split(","), batches)
        base = TrainConfig(evaluators=evaluators, device_eval_batch_size=size, precision=args.precision)
    if problems := list(run_problems(base)):
        raise ConfigurationError(listed(problems))
    length, tokenizer = args.sequence_length, args.tokenizer
    if args.config is not None:
        length = base.model.max_sequence_length
        if tokenizer is None and base.tokenizer != TrainConfig().tokenizer:  # else the checkpoint's
            tokenizer = base.tokenizer.identifier
    flags = {name: getattr(args, name) for name in (*EDITS, "resuscitation_force", "overwrite")}
    return Settings(base, length, tokenizer, **flags)


def _job(args: argparse.Namespace, location: Location, settings: Settings, name: str) -> Job:
    output = Path(location) / "scores" if args.output is None else args.output / name
    temporary = args.keep == "none" and isinstance(location, str)
    return Job(location, output, settings, Downloads(output / ".download" if temporary else None))


# --- the table ---------------------------------------------------------------------------------------------------


def _as_text(found: list[list[Cell]]) -> str:
    def cell(value: Cell) -> str:
        return "" if value is None else fixed(value, 4) if isinstance(value, float) else str(value)

    lines = [[cell(value) for value in line] for line in found]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join(
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths))).rstrip()
        for line in lines
    )


def _as_csv(found: list[list[Cell]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(found)
    return text.getvalue()
