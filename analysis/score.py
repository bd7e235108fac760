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
from collections.abc import Sequence
from pathlib import Path

from analysis.choices import BATCH_SIZE, EDITS
from analysis.edit_flags import add_edit_flags, check_edit_flags, check_one_checkpoint
from analysis.locations import Location, add_every_flag, checkpoint_locations
from olmo.distributed import adopt_launcher, exit_process
from olmo.exceptions import ConfigurationError, Parser, exit_status


def main(argv: Sequence[str]) -> None:
    adopt_launcher()
    args = _parse(argv)
    locations = checkpoint_locations(None, "1B", args.checkpoints, args.every)
    _check_output(args, locations)
    from analysis.score_loop import score_all  # torch, which no check so far needs

    score_all(args, locations)


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
