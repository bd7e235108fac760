"""One number of a measurement, with the bar that it is held against."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROWS = "rows.jsonl"  # the file of one measurement


@dataclass(frozen=True)
class Row:
    """A measured number. `at_least` or `at_most` is its bar; none: the number is for comparison alone.

    `samples`: the measurements of which `value` is the median, or whatever the name states.
    """

    name: str
    value: float
    unit: str = ""
    at_least: float | None = None
    at_most: float | None = None
    note: str = ""
    samples: tuple[float, ...] = ()

    @property
    def margin(self) -> float | None:
        """The value over its bar, or the bar over the value where less is better: 1 and more is met. None: no bar."""
        if self.at_least is not None:
            return self.value / self.at_least
        if self.at_most is not None:
            return self.at_most / self.value if self.value else float("inf") if self.at_most >= 0 else 0.0
        return None

    @property
    def met(self) -> bool:
        return self.finite and (self.margin is None or self.margin >= 1)

    @property
    def finite(self) -> bool:
        """Otherwise the measurement has failed."""
        return all(map(math.isfinite, (self.value, *self.samples)))


class Skipped(Exception):
    """A measurement that this machine cannot make; the message gives the reason."""


def append(path: Path, **entry: Any) -> None:
    """Add a line of JSON, complete at once, so that what is measured survives the end of the process."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


def entries(path: Path) -> Iterator[dict[str, Any]]:
    """The lines that `append` has written; one that a killed process left unfinished is not returned."""
    for line in path.read_text("utf-8").splitlines(keepends=True) if path.exists() else ():
        if line.endswith("\n"):
            yield json.loads(line)


def to_json(row: Row) -> dict[str, Any]:
    """`to_entry` with null for numbers that are not finite, which JSON does not have; the note states it."""
    value, *samples = (number if math.isfinite(number) else None for number in (row.value, *row.samples))
    note = row.note if row.finite else "; ".join(filter(None, (f"failed: not finite ({row.value})", row.note)))
    return {**to_entry(row), "value": value, "samples": samples, "note": note}


def to_entry(row: Row) -> dict[str, Any]:
    return {**asdict(row), "samples": list(row.samples)}


def from_entry(entry: dict[str, Any]) -> Row:
    return Row(**{**entry, "samples": tuple(entry["samples"])})
