"""What runs acquired and forgot (paper, B.2, equations 4 and 5), from what they wrote.

    python -m analysis.acquisition RUN [RUN ...] [--baseline RUN] [--seeds RUN RUN ...] [--before SCORES] [--output DIR]
    python -m analysis.acquisition DIR/acquisition.json [--output DIR]      table and figures anew

Prints K, A, P, F, the rise of held-out losses and, from probes scored around injections, effectivity and the decay
constant a, each with a 95 % interval: docs/results.md defines them. Runs are compared with the baseline, which is the
first one unless --baseline names another, on the same draws. Runs whose configurations differ in their seed only, or
that --seeds names, are compared by their means, and the spread between them is stated. A run that started from
resuscitated weights gets A against these and against the original weights; only K(after) compares end states.

Also reads a run in progress: `after` is then its newest evaluation of all probes, and losses and accuracies are the
newest ones up to it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from analysis.choices import fit_range, outlier_factor, window
from analysis.figures import can_draw
from analysis.locations import check_writable
from olmo.exceptions import ConfigurationError, Parser, exit_status
from olmo.files.atomic import write_text
from olmo.files.paths import as_json

RESULT = "acquisition.json"


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog="python -m analysis.acquisition", description=__doc__)
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help=f"save_folder of a run, or one {RESULT}")
    parser.add_argument("--baseline", type=Path, metavar="RUN", help="the run to compare with; default: the first one")
    parser.add_argument(
        "--seeds",
        type=Path,
        nargs="+",
        action="append",
        default=[],
        metavar="RUN",
        help="runs that repeat one experiment with other seeds; may be repeated. Runs whose config.yaml differ in the "
        "seed only are recognized without it",
    )
    parser.add_argument(
        "--before",
        type=Path,
        metavar="SCORES",
        help="for runs that were not evaluated before training: the scores (analysis.score) of the checkpoint that "
        "they started from",
    )
    parser.add_argument("--output", type=Path, help=f"folder for {RESULT}, acquisition.csv and the figures")
    parser.add_argument(
        "--window",
        type=window,
        help="steps from an injection to its maximum; default: the probing.steps of the first run, or else 50",
    )
    parser.add_argument(
        "--outlier_factor",
        type=outlier_factor,
        help="interquartile ranges beyond which effectivities and retainabilities are dropped; default: 1.5; 0 or none "
        "keeps all",
    )
    parser.add_argument(
        "--fit_range",
        type=fit_range,
        metavar="A-B",
        help="steps after the maximum to fit; `A-`: from A",
    )
    return parser.parse_args(argv)


def _measure(args: argparse.Namespace, named: list[Path]) -> dict[str, Any]:
    """Read and measure the runs that were named."""
    from analysis import dynamics, summaries

    if args.baseline is not None:
        # By folder or by name; a run that is named as the baseline only is one of the runs as well.
        args.baseline = next((run for run in named if args.baseline in (run, Path(run.name))), args.baseline)
        named = named if args.baseline in named else [args.baseline, *named]
    options = dynamics.options(named[0], vars(args))
    return summaries.summarise(named, options, args.seeds, args.baseline, args.before)


def main(argv: Sequence[str]) -> None:
    args = _parse(argv)
    if args.output is not None:
        check_writable(args.output)
    of_seeds = [run for group in args.seeds for run in group]
    for run in of_seeds:
        if of_seeds.count(run) > 1:
            raise ConfigurationError(f"--seeds: {run} is named twice")
    named = [*args.runs, *(run for run in of_seeds if run not in args.runs)]
    if not named:
        raise ConfigurationError("name at least one run, or a file of results")
    from analysis import summaries  # torch and pyarrow, which no check so far needs
    from analysis.summary_table import as_csv, differences, notes, table

    if named[0].is_file():
        without_effect = ("baseline", "seeds", "before", "window", "outlier_factor", "fit_range")
        if len(named) > 1:
            raise ConfigurationError(f"{named[0]}: give a file of results alone, or folders of runs")
        for flag in without_effect:
            if getattr(args, flag) not in (None, []):
                raise ConfigurationError(f"--{flag}: has no effect on a file of results; give folders of runs")
        result = summaries.read(named[0])
    else:
        result = _measure(args, named)
    for text in (table(result), *notes(result), *differences(result)):
        print(text)
    if args.output is not None:
        args.output.mkdir(parents=True, exist_ok=True)
        write_text(args.output / RESULT, as_json(result, args.output / RESULT))
        write_text(args.output / "acquisition.csv", as_csv(result))
        if can_draw():
            from analysis.figures.acquisition import save_acquisition

            save_acquisition(result, args.output)


if __name__ == "__main__":
    sys.exit(exit_status(main))
