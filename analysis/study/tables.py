"""The paper's tables 1 and 2 of any study, with the published numbers beside where it repeats a published study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from analysis.study import published
from analysis.study.figures.choice import Study, forgetting, in_order, outcome, unchanged
from olmo.exceptions import did_you_mean

TABLES = {  # name -> title, measures of the paper: (key, head, factor of its unit)
    "table_1": ("A and F by setting and start (table 1)", (("A", "A, %", 1), ("F", "F, %", 1))),
    "table_2": (
        "K and P after training by setting and start (table 2)",
        (("K_after", "K", 1), ("P_after", "P, %", 100)),
    ),
}
# Beside these, the same on the paper's scale, which is what the published number is of.
_PUBLISHED = {"A": ("A_published", "A as published, %"), "K_after": ("K_published_after", "K as published")}


def check_names(names: Sequence[str]) -> None:
    """Raise ValueError, with the nearest, for a name that is no table."""
    for name in names:
        if name not in TABLES:
            raise ValueError(f"unknown table '{name}'{did_you_mean(name, TABLES)}; known: {', '.join(TABLES)}")


def tables(study: Study, names: Sequence[str]) -> list[dict[str, Any]]:
    """Tables by name, as study.json has them: `head`, `rows` of cells (text, number, estimate, or None) and `note`. A
    row is a setting and a start, without an intervention. Columns that no condition has are left out.

    Raises ValueError for an unknown table, or where the study repeats an unknown one.
    """
    check_names(names)
    return [_table(study, name, published.study(study["repeats"])) for name in names]


def _table(study: Study, name: str, numbers: Mapping[str, Any]) -> dict[str, Any]:
    title, measures = TABLES[name]
    settings = list(study["settings"])
    conditions = sorted(in_order(study, unchanged(study)), key=lambda c: settings.index(c["setting"]))
    several = len({c["model"] for c in conditions}) > 1
    columns: list[tuple[str, list[Any]]] = [("setting", [c["setting"] for c in conditions])]
    columns += [("model", [c["model"] for c in conditions])] if several else []
    columns.append(("start", [c["start"] for c in conditions]))
    for key, head, factor in measures:
        scaled, scaled_head = _PUBLISHED.get(key, (key, head))
        columns.append((head, [_times(outcome(key)(c), factor) for c in conditions]))
        if scaled != key:
            columns.append((scaled_head, [outcome(scaled)(c) for c in conditions]))
        # The paper's A is of the diluted loss too, and has one name in both.
        of_paper = key if key == "A" else scaled
        columns.append((f"{head} of the paper", [_number(numbers, c, of_paper) for c in conditions]))
    lost, measure = forgetting(study)
    if name == "table_1" and not lost.startswith("F"):
        columns.append((lost, [measure(c) for c in conditions]))
    shown = [column for column in columns if any(cell is not None for cell in column[1])]
    notes = []
    if numbers:
        notes.append(f"Of the paper: {numbers['source']}.")
        if any(head.endswith("as published") or "as published," in head for head, _ in shown):
            notes.append("Compare them with the columns 'as published': K and A there are of the paper's diluted loss.")
        changes = [f"{change:+g} points on {setting}" for setting, change in numbers.get("changes_of_A", {}).items()]
        if name == "table_1" and changes:
            notes.append(f"A of the paper changes by {', '.join(changes)} from the first start to the last.")
    return {
        "name": name,
        "title": title,
        "head": [head for head, _ in shown],
        "rows": [list(row) for row in zip(*(cells for _, cells in shown))],
        "note": " ".join(notes),
    }


def _number(numbers: Mapping[str, Any], condition: Mapping[str, Any], measure: str) -> float | None:
    return published.number(numbers, condition["setting"], condition["step"], measure)


def _times(estimate: dict[str, Any] | None, factor: float) -> dict[str, Any] | None:
    if estimate is None or factor == 1:
        return estimate
    return {end: None if value is None else factor * value for end, value in estimate.items()}
