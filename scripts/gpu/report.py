"""The table of a run of `make gpu`, worst first, and its file `gpu.json`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from olmo.files.atomic import atomic_path
from olmo.files.paths import as_json
from scripts.gpu.rows import Row, to_json
from scripts.gpu.runner import Outcome

FAILED = ("failed", "overran")
_ORDER = ("failed", "overran", "missed", "skipped", "met", "")


def lines_of(outcomes: Sequence[Outcome]) -> list[tuple[str, ...]]:
    """State, box, number, value, bar and note of every row and of every box that did not end well: failures, missed
    bars by their margin, what was not measured, met bars by their margin, then numbers without a bar."""
    found: list[tuple[int, float, tuple[str, ...]]] = []
    for outcome in outcomes:
        name = outcome.box.name
        if outcome.status != "done":
            found.append((_ORDER.index(outcome.status), 0.0, (outcome.status, name, "", "", "", outcome.reason)))
        for row in outcome.rows:
            state = "failed" if not row.finite else "missed" if not row.met else "" if row.margin is None else "met"
            margin = (row.margin or 0.0) if row.finite else 0.0
            value = f"{figures(row.value)} {row.unit}".rstrip()
            found.append((_ORDER.index(state), margin, (state, name, row.name, value, _bar(row), row.note)))
    return [line for *_, line in sorted(found, key=lambda entry: entry[:2])]


def _bar(row: Row) -> str:
    if row.at_least is not None:
        return f">= {figures(row.at_least)}"
    return "" if row.at_most is None else f"<= {figures(row.at_most)}"


def figures(value: float) -> str:
    """A number with three figures or more, and commas in thousands."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def table(outcomes: Sequence[Outcome]) -> str:
    """`lines_of` as text, columns aligned."""
    rows = [("", "box", "number", "value", "bar", "note"), *lines_of(outcomes)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths)), row[-1]]).rstrip() for row in rows
    )


def problems(outcomes: Sequence[Outcome]) -> list[str]:
    """Boxes that failed or overran and why, and rows that miss their bar or are not finite numbers."""
    ended = [f"{one.box.name} {one.status}: {one.reason}" for one in outcomes if one.status in FAILED]
    missed = [
        f"{one.box.name}: {row.name}: {figures(row.value)} {row.unit}".rstrip() + f", bar {_bar(row) or 'none'}"
        for one in outcomes
        for row in one.rows
        if not row.met
    ]
    return ended + missed


def write(path: Path, outcomes: Sequence[Outcome], small: bool, started: str, seconds: float) -> None:
    """Write `gpu.json`: the machine and its programs, each box with all its rows and their samples."""
    boxes: list[dict[str, Any]] = [
        {
            "name": outcome.box.name,
            "status": outcome.status,
            "reason": outcome.reason,
            "seconds": round(outcome.seconds, 3),
            "allowed": round(outcome.allowed, 3),
            "rows": [to_json(row) for row in outcome.rows],
        }
        for outcome in outcomes
    ]
    about = outcomes[0].about if outcomes else {}
    content = {**about, "small": small, "started": started, "seconds": round(seconds, 3), "boxes": boxes}
    with atomic_path(path) as partial:
        partial.write_text(as_json(content, path, indent=1), encoding="utf-8")
