"""Which conditions of a study a figure shows, and their numbers; what is missing where there are none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from analysis.study.figures.points import Row, point
from analysis.study.interventions import UNCHANGED, edit, kind

Study = Mapping[str, Any]
Condition = Mapping[str, Any]

FORGETTING = "general"  # label of the held-out loss whose rise is forgetting, where P is not measured


class Lacking(Exception):
    """A figure that cannot be drawn: what it needs and the study does not have."""


def kind_of(study: Study, condition: Condition) -> str:
    return kind(study["interventions"][condition["intervention"]])


def edit_of(study: Study, condition: Condition) -> tuple[float, float] | None:
    """(ratio, factor) of a resuscitation."""
    return edit(study["interventions"][condition["intervention"]])


def unchanged(study: Study) -> list[Condition]:
    """Conditions without an intervention."""
    return [c for c in study["conditions"] if kind_of(study, c) == UNCHANGED]


def order_of_starts(study: Study) -> list[str]:
    """Labels of the starts from left to right."""
    labels = start_labels(study)
    starts = in_order(study, [{"start": start["name"]} for start in study["starts"]])
    return list(dict.fromkeys(labels[start["start"]] for start in starts))


def in_order(study: Study, conditions: Iterable[Condition]) -> list[Condition]:
    """By step, where the steps of all starts of a model are known, and otherwise as the study has its starts."""
    starts = study["starts"]
    known = all(start["step"] is not None for start in starts)
    place = {start["name"]: start["step"] if known else number for number, start in enumerate(starts)}
    return sorted(conditions, key=lambda condition: place[condition["start"]])


def start_labels(study: Study) -> dict[str, str]:
    """What each start is called along an axis: its name; with several models its step, where both have that."""
    starts = study["starts"]
    several = len({start["model"] for start in starts}) > 1
    known = all(start["step"] is not None for start in starts)
    distinct = len({(start["model"], start["step"]) for start in starts}) == len(starts)
    by_step = several and known and distinct
    return {start["name"]: short(start["step"]) if by_step else start["name"] for start in starts}


def short(step: int) -> str:
    return f"{step / 1000:.0f}k" if step >= 10_000 else str(step)


def last_starts(study: Study) -> dict[str, str]:
    """Of each model the last start that is trained: the one of the largest step, or as the study has them."""
    return {c["model"]: c["start"] for c in in_order(study, study["conditions"])}


def line_of(study: Study, condition: Condition, *more: str) -> str:
    """The name of a condition's line: its model and setting where the study has several, and what is added."""
    several = [condition[key] for key in ("model", "setting") if len({c[key] for c in study["conditions"]}) > 1]
    return ", ".join([*several, *more])


# --- measures ---

Measure = Callable[[Condition], Any]  # an estimate or None


def outcome(name: str) -> Measure:
    return lambda condition: condition["common_start"].get(name)


def forgetting(study: Study) -> tuple[str, Measure]:
    """F, or where no condition has it the rise of a held-out loss, with its title."""
    if any(c["common_start"]["F"] is not None for c in study["conditions"]):
        return "F, %", outcome("F")
    label = loss_label(study["conditions"])
    return f"rise of held-out {label} loss, %", lambda c: c["common_start"]["loss_rise"].get(label)


def loss_label(conditions: Sequence[Condition]) -> str:
    labels = list(dict.fromkeys(label for c in conditions for label in c["common_start"]["loss_rise"]))
    return FORGETTING if FORGETTING in labels or not labels else labels[0]


def acquisition(study: Study) -> dict[str, Measure]:
    """Panels of what was acquired and forgotten."""
    title, measure = forgetting(study)
    return {"A, %": outcome("A"), title: measure}


def knowledge(which: str) -> dict[str, Measure]:
    """Panels of K, K as published, and P, `before` or `after`."""
    return {
        "K": outcome(f"K_{which}"),
        "K as published": outcome(f"K_published_{which}"),
        "P": outcome(f"P_{which}"),
    }


def rows_of(
    measures: Mapping[str, Measure],
    conditions: Sequence[Condition],
    line: Callable[[Condition], str],
    x: Callable[[Condition], str | None],
    part: str = "",
) -> list[Row]:
    """A row for each panel and condition that has the measure."""
    return [
        point(panel, line(c), x(c), estimate, part, condition=c["name"])
        for panel, measure in measures.items()
        for c in conditions
        if (estimate := measure(c)) is not None and estimate["value"] is not None
    ]


def need(found: Any, what: str) -> None:
    """Raise Lacking unless there is something."""
    if not found:
        raise Lacking(what)
