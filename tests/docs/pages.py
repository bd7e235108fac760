"""The pages of the documentation, and the commands in them.

Commands are in fenced blocks marked `bash`. A trailing backslash continues a line, `for NAME in ...; do` and `done`
make a loop, and a comment may mark a command that cannot be run everywhere (MARKERS).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MARKERS = (
    "needs the network",
    "needs the real model",
    "needs a cluster",
    "takes longer than the demo",
    "takes two minutes",
)


@dataclass(frozen=True)
class Command:
    page: str
    line: int
    text: str  # in one line, without its comment
    marker: str | None = None


def pages() -> list[Path]:
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> Iterator[tuple[int, str]]:
    """The fenced blocks of a language: number of the first line, and the text."""
    text = page.read_text("utf-8")
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        if match[1] == language:
            yield text.count("\n", 0, match.start()) + 2, match[2]


def outside_blocks(page: Path) -> str:
    """The page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)


def commands(page: Path) -> Iterator[Command]:
    """The commands of a page. Of a loop, those of its last pass.

    Those of docs/commands.md are examples and synopses of docstrings, with names in capitals in place of files;
    tests/scripts/documentation checks their flags.
    """
    if page.name == "commands.md":
        return
    for first, block in blocks(page, "bash"):
        values: dict[str, str] = {}
        number, joined, start = first, "", first
        for line in block.splitlines():
            if not joined:
                start = number
            number += 1
            joined += line
            if line.endswith("\\"):
                joined = joined[:-1]
                continue
            text, _, comment = joined.partition(" # ")
            text, joined = " ".join(text.split()), ""
            if loop := re.fullmatch(r"for (\w+) in (.+); do", text):
                values[loop[1]] = loop[2].split()[-1]
            elif text == "done":
                values.clear()
            elif text and not text.startswith("#"):
                for name, value in values.items():
                    text = text.replace(f"${name}", value)
                marker = next((marker for marker in MARKERS if marker in comment), None)
                yield Command(page.name, start, text, marker)
