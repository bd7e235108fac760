"""The report of a study: one self-contained page and one JSON file, made anew from what its stages wrote.

    python -m analysis.report runs/demo

Every number is read or computed from the runs' own files; the verdicts follow from intervals by one rule
(`directions.verdict`).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from analysis.page import draw, render
from analysis.study.demo import gather
from analysis.study.page import lines, make
from analysis.summary_table import with_interval
from olmo.exceptions import Parser, exit_status
from olmo.files.atomic import write_text


def main(argv: Sequence[str]) -> None:
    parser = Parser(prog="python -m analysis.report", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="the study's output folder")
    args = parser.parse_args(argv)
    if not (args.folder / "demo.json").is_file():
        study = make(args.folder)
        print(*lines(study), f"wrote {args.folder}/report.html and study.json", sep="\n")
        return
    report = gather(args.folder)
    drawn = draw(report, args.folder / "figures")
    write_text(args.folder / "report.json", json.dumps(report, indent=1) + "\n")
    write_text(args.folder / "report.html", render(report, drawn))
    for found in report["directions"]:
        print(f"{found['verdict']}: {found['claim']}; {found['measured']} {with_interval(found, 3)}")
    print(f"wrote {args.folder}/report.html and report.json")


if __name__ == "__main__":
    sys.exit(exit_status(main))
