"""Run a study: everything that its tables and figures need, from one file.

    python -m scripts.study configs/studies/demo.yaml
    python -m scripts.study configs/studies/demo.yaml --dry_run
    python -m scripts.study configs/studies/demo.yaml --set seeds=5 --output runs/demo-5
    python -m scripts.study configs/studies/paper_1b.yaml --cluster --set cluster.partition=gpu
    python -m scripts.study --report runs/demo

The file is expanded into stages, commands of this repository. Those that do not depend on each other run side by side.
A stage that has finished is not repeated: the same command continues after an interruption, and after a change in the
file it runs only what depends on it. `--report` makes the report anew from results alone. docs/studies.md describes
the file and the output.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from olmo.exceptions import ConfigurationError, Parser, exit_status
from scripts.studies.plan import KINDS
from scripts.studies.run import run_study


def positive(text: str) -> int:  # argparse names it in its error
    if int(text) < 1:
        raise ValueError
    return int(text)


def main(argv: Sequence[str]) -> None:
    parser = Parser(prog="python -m scripts.study", description=__doc__)
    parser.add_argument(
        "file", nargs="?", type=Path, metavar="FILE", help="a study file, such as configs/studies/demo.yaml"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: runs/ and the name of the file")
    parser.add_argument("--only", metavar="STAGE", help=f"one of {', '.join(KINDS)}, and what it needs")
    parser.add_argument("--dry_run", action="store_true", help="print the plan: every command, time and disk")
    parser.add_argument("--jobs", type=positive, metavar="N", help="stages side by side; default: one a core, or a GPU")
    parser.add_argument(
        "--cluster", action="store_true", help="run stages as jobs of SLURM, as `cluster` of the study describes them"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a key of the study file, such as seeds=5 or overrides.max_duration=20; may be repeated",
    )
    parser.add_argument("--report", type=Path, metavar="DIR", help="make the report of a study's output folder anew")
    args = parser.parse_args(argv)
    if args.report is not None:
        for name in ("file", "output", "only", "dry_run", "jobs", "cluster", "set"):
            if getattr(args, name) not in (None, False, []):
                raise ConfigurationError(f"--report: makes the report from results alone; leave out {name}")
        done = subprocess.run([sys.executable, "-m", "analysis.report", str(args.report)])
        if done.returncode:  # the report has printed its error
            sys.exit(done.returncode if done.returncode > 0 else 128 - done.returncode)
        return
    if args.file is None:
        raise ConfigurationError("name a study file, such as configs/studies/demo.yaml, or --report DIR")
    if args.cluster and args.jobs is not None:
        raise ConfigurationError("--jobs: has no effect with --cluster")
    section, when = ("resources", "with") if args.cluster else ("cluster", "without")
    if unused := [change for change in args.set if change.partition("=")[0].partition(".")[0] == section]:
        raise ConfigurationError(f"--set {unused[0]}: has no effect {when} --cluster")
    run_study(args.file, args.output, args.set, args.only, args.jobs, args.dry_run, args.cluster)


if __name__ == "__main__":
    sys.exit(exit_status(main))
