"""What this program reaches on a GPU: measurements in time boxes, one table, worst first, and `gpu.json`.

    python -m scripts.gpu [--only entropy,tests] [--output runs/gpu] [--limit 480]
    python -m scripts.gpu --small

Every box runs in a process of its own and is killed when its time is over; what it has measured until then counts.
`gpu.json` is written anew after every box and replaces that of an earlier run. With --small, everything is tiny and
runs on a CPU too: it shows that the measurements work, and bars of speed and memory do not apply.

Exit status 1 where a box failed or overran its time, or a number misses its bar. docs/performance.md has the bars.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

from olmo.exceptions import ConfigurationError, Parser, exit_status, listed
from scripts.gpu.boxes import BOXES, FIRST, LIMIT, SMALL_SCALE
from scripts.gpu.carried import use_carried
from scripts.gpu.report import problems, table, write
from scripts.gpu.runner import Outcome, run_boxes


def main(argv: Sequence[str]) -> None:
    args = _parse(argv)
    use_carried()
    if not args.small:
        from scripts.gpu.place import check_device  # imports torch

        check_device()
    args.output.mkdir(parents=True, exist_ok=True)
    names = [FIRST.name, *(name for name in BOXES if name in args.only and name != FIRST.name)]
    started, begun = datetime.now(timezone.utc).isoformat(timespec="seconds"), time.monotonic()

    def ended(outcomes: list[Outcome]) -> None:
        write(args.output / "gpu.json", outcomes, args.small, started, time.monotonic() - begun)
        last = outcomes[-1]
        print(f"{last.box.name}: {last.status}, {len(last.rows)} rows in {last.seconds:.0f} s", file=sys.stderr)

    outcomes = run_boxes([BOXES[name] for name in names], args.output.resolve(), args.small, args.limit, ended)
    if about := outcomes[0].about:
        print(", ".join(f"{key} {value}" for key, value in about.items() if value is not None))
    print(table(outcomes), flush=True)
    if found := problems(outcomes):
        raise RuntimeError(f"{listed(found)}; {args.output / 'gpu.json'} has all samples")


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    boxes = "; ".join(f"{box.name}: {box.what}" for box in BOXES.values())
    small = SMALL_SCALE * LIMIT
    limit = f"of the run (default {LIMIT}, with --small {small})"
    parser = Parser(prog="python -m scripts.gpu", description=__doc__)
    parser.add_argument("--small", action="store_true", help="tiny sizes, on a CPU where there is no GPU")
    parser.add_argument("--only", default=",".join(BOXES), metavar="NAMES", help=f"separated by commas; {boxes}")
    parser.add_argument("--output", type=Path, default=Path("runs/gpu"), help="folder of gpu.json and the logs")
    parser.add_argument("--limit", type=float, metavar="SECONDS", help=limit)
    args = parser.parse_args(argv)
    args.only = [name.strip() for name in args.only.split(",")]
    if unknown := sorted(set(args.only) - set(BOXES)):
        raise ConfigurationError(f"--only {','.join(unknown)}: choose from {', '.join(BOXES)}")
    args.limit = (small if args.small else LIMIT) if args.limit is None else args.limit
    if not args.limit > 0:
        raise ConfigurationError(f"--limit {args.limit:g}: must be above 0")
    return args


if __name__ == "__main__":
    sys.exit(exit_status(main))
