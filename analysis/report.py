"""The report of a study: one self-contained page and one JSON file, made anew from what its stages wrote.

    python -m analysis.report runs/demo

Every number is read or computed from the runs' own files; the verdicts follow from intervals by one rule
(`directions.verdict`).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from analysis.study.plan_file import Plan, read_plan
from olmo.exceptions import Parser, exit_status, needs


def check_names(plan: Plan) -> None:
    """Raise ValueError, with the nearest known name, where a study names what no report has."""
    from analysis.study import published, tables
    from analysis.study.directions import ends_of
    from analysis.study.figures import registry

    registry.check_names(plan.content["figures"])
    tables.check_names(plan.content["tables"])
    published.study(plan.content["repeats"])
    plan.acquisition()
    for direction in plan.content["directions"]:
        ends_of(plan, direction)


def main(argv: Sequence[str]) -> None:
    parser = Parser(prog="python -m analysis.report", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="the study's output folder")
    parser.add_argument("--check", action="store_true", help="only check the names that the plan has")
    args = parser.parse_args(argv)
    needs("matplotlib", "plot", "the report of a study")
    plan = read_plan(args.folder)
    if args.check:
        check_names(plan)
        return
    from analysis.study.page import lines, make  # torch and matplotlib, which no argument needs

    study = make(args.folder)
    print(*lines(study), f"wrote {args.folder}/report.html and study.json", sep="\n")


if __name__ == "__main__":
    sys.exit(exit_status(main))
