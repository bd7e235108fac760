"""One table, paired differences and figures of several checkpoints' knowledge entropy, from results alone.

    python -m analysis.entropy_series results --output figures
    python -m analysis.entropy_series results/dolma results/c4 --x share --output figures

RESULTS are folders with a `knowledge_entropy.json`, folders that contain such folders, or such files, from one machine
or several, as `python -m analysis.entropy` wrote them. Checkpoints are not needed. Results of several data sets,
coefficients or precisions are lines of one figure, models of other sizes have panels of their own.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from analysis.choices import RESULT, SERIES
from analysis.figures import SCALES, can_draw
from analysis.locations import check_writable
from olmo.exceptions import ConfigurationError, Parser, exit_status


def result_files(place: Path) -> list[Path]:
    """The results at a path. Raises FileNotFoundError if there are none."""
    if place.is_file():
        return [place]
    found = [place / RESULT] if (place / RESULT).is_file() else sorted(place.glob(f"*/{RESULT}"))
    if not found:
        raise FileNotFoundError(f"{place}: no {RESULT} there")
    return found


def main(argv: Sequence[str]) -> None:
    parser = Parser(prog="python -m analysis.entropy_series", description=__doc__)
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULTS", help="folders or knowledge_entropy.json")
    parser.add_argument("--output", type=Path, required=True, help=f"folder for {SERIES} and the figures")
    parser.add_argument(
        "--x",
        choices=SCALES,
        default="step",
        help="the x axis of the figures: the step (default), its share of the run's last one here, or the tokens",
    )
    args = parser.parse_args(argv)
    files = list(dict.fromkeys(file for place in args.results for file in result_files(place)))
    check_writable(args.output)
    from analysis.kinds import positions  # torch, which no check so far needs
    from analysis.series import draw, read_result, table, write, written

    read = [(read_result(file), file) for file in files]
    for (result, file), position in zip(read, positions([result for result, _ in read])):
        if args.x == "tokens" and result["checkpoint"].get("tokens") is None:
            raise ConfigurationError(
                f"--x tokens: {file} does not have them; its checkpoint's name ends in no -tokensNB, or those "
                "before its stage are unknown"
            )
        if args.x == "share" and position < 0:
            raise ConfigurationError(f"--x share: {file} has no step, or not those before its stage; use another --x")
    series = write(read, args.output)
    print(table(series), flush=True)
    drawn = can_draw()
    if drawn:
        draw(series, args.output, args.x)
    print(written(args.output, drawn))


if __name__ == "__main__":
    sys.exit(exit_status(main))
