"""Rows of numbers as CSV, one form for every file: tables, and the numbers of a figure."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

ENDS = (("value", ""), ("low", " low"), ("high", " high"))


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line a row under the names of all columns, in the order in which rows first have them; a column that a row
    lacks, None and NaN are empty. Numbers are written in full, so that reading them gives the same ones."""
    names = dict.fromkeys(name for row in rows for name in row)
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(names), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: None if is_nan(value) else value for name, value in row.items()})
    return buffer.getvalue()


def is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def columns_of(name: str, estimate: Mapping[str, Any] | None) -> dict[str, Any]:
    """An estimate {value, low, high} as three columns: `name`, `name low`, `name high`; empty ones for None."""
    return {name + suffix: None if estimate is None else estimate[end] for end, suffix in ENDS}
