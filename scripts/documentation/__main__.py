"""Print docs/commands.md, made from the commands' own parsers.

    python -m scripts.documentation > docs/commands.md

A test keeps the page current.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from olmo.exceptions import Parser, exit_status

from .commands import markdown


def main(argv: Sequence[str]) -> None:
    Parser(prog="python -m scripts.documentation", description=__doc__).parse_args(argv)
    print(markdown(), end="")


if __name__ == "__main__":
    sys.exit(exit_status(main))
