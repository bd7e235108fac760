"""Whether a study saw what the paper found: differences between two conditions with intervals and verdicts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from analysis.conditions import paired, spread
from analysis.estimates import Estimate, finite
from analysis.outcomes import (
    common_labels,
    compare,
    compare_accuracy,
    compare_forgotten,
    compare_loss_rise,
    on_both_scales,
)
from analysis.runs import Run
from analysis.study import entropies
from analysis.study.entropies import Entropies
from analysis.study.groups import Group
from analysis.study.plan_file import Plan
from olmo.exceptions import did_you_mean
from olmo.knowledge.entries import KINDS, SETTINGS

SEEN, OPPOSITE, NOISE = "seen", "not seen (the opposite)", "within noise at this scale"
ONE_RUN, NOT_MEASURED = "one run; not a verdict", "not measured"
_OUTCOMES = ("K_after", "A", "K_published_after", "A_published", "F", "P_after")
_IN_PARTS = (
    "K_after",
    "A",
    "K_published_after",
    "A_published",
)  # also of a setting or a kind of probes: A.once, K_after.semantic
_LOSS = "loss_rise."

# What is measured -> its unit, as a reader sees it.
_UNITS = dict.fromkeys(("A", "A_published", "F", "loss_rise"), "points") | dict.fromkeys(entropies.MEASURES, "nats")


def measures() -> list[str]:
    parts = [f"{name}.{part}" for name in _IN_PARTS for part in (*SETTINGS, *KINDS)]
    return [*entropies.MEASURES, *_OUTCOMES, *parts, f"{_LOSS}LABEL"]


def ends_of(plan: Plan, direction: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The two conditions, or starts and interventions, of a direction. Raises ValueError, with the nearest, for an
    unknown measure, or names that the study does not have."""
    name = direction["measure"]
    if name not in measures() and not (name.startswith(_LOSS) and name != _LOSS):
        meant = did_you_mean(name, measures())
        raise ValueError(f"unknown measure '{name}'{meant}; known: {', '.join(measures())}")
    return [_end(plan, direction, end) for end in ("from", "to")]


def verdict(estimate: Estimate, expected: int) -> str:
    """SEEN where the 95 % interval is entirely on the expected side of 0 (`expected` +1 or -1), OPPOSITE where entirely
    on the other side, NOISE where it includes 0, NOT_MEASURED where it is unknown. ONE_RUN where what the verdict is
    about was not repeated: the interval does not contain what another seed would change."""
    if estimate.repetitions == 1:
        return ONE_RUN
    if math.isnan(estimate.low) or math.isnan(estimate.high):
        return NOT_MEASURED
    if estimate.low > 0 or estimate.high < 0:
        return SEEN if (estimate.low > 0) == (expected > 0) else OPPOSITE
    return NOISE


def directions(plan: Plan, groups: Sequence[Group], measured: Sequence[Entropies]) -> list[dict[str, Any]]:
    """Every direction of a plan, ready for JSON. Differences are `to` minus `from`, over the seeds that both have;
    A, F and the rises of losses are measured from the start that both share.

    Raises ValueError for an unknown measure or condition, with the nearest.
    """
    return [{**direction, **_found(plan, direction, groups, measured)} for direction in plan.content["directions"]]


def _found(
    plan: Plan, direction: Mapping[str, Any], groups: Sequence[Group], measured: Sequence[Entropies]
) -> dict[str, Any]:
    measure, ends = direction["measure"], ends_of(plan, direction)
    if measure in entropies.MEASURES:
        estimate, separate = _of_entropy(measure, ends, measured), None
    else:
        estimate, separate = _of_outcome(measure, ends, groups)
    unit = _UNITS.get(measure.partition(".")[0], "")
    if estimate is None:
        estimate, shown = Estimate(math.nan, math.nan, math.nan, 0), NOT_MEASURED
    else:
        shown = verdict(estimate, 1 if direction["expected"] == "above" else -1)
    return {
        "unit": unit,
        **estimate.as_json(),
        "verdict": shown,
        "seeds": estimate.repetitions,
        "per_seed": list(map(finite, estimate.per_run)),
        "spread": separate,
    }


def _end(plan: Plan, direction: Mapping[str, Any], end: str) -> Mapping[str, Any]:
    """The condition, or start and intervention, that a direction names."""
    name, of_entropy = direction[end], direction["measure"] in entropies.MEASURES
    rows = plan.content["entropies" if of_entropy else "conditions"]
    named = {entropies.name_of(row) if of_entropy else row["name"]: row for row in rows}
    if name not in named:
        what = "entropy" if of_entropy else "condition"
        meant = did_you_mean(name, named)
        raise ValueError(f"direction '{direction['claim']}': {end}: the study has no {what} '{name}'{meant}")
    return named[name]


def _of_entropy(measure: str, ends: Sequence[Mapping[str, Any]], measured: Sequence[Entropies]) -> Estimate | None:
    """On the first text and coefficient on which both were measured."""
    places = [[e for e in measured if (e.start, e.intervention) == (end["start"], end["intervention"])] for end in ends]
    for one in places[0]:
        for other in places[1]:
            if (one.data, one.coefficient) == (other.data, other.coefficient):
                found = entropies.difference_of(one, other, measure)
                if found is not None:
                    return found
    return None


def _of_outcome(
    measure: str, ends: Sequence[Mapping[str, Any]], groups: Sequence[Group]
) -> tuple[Estimate | None, dict[str, float | None] | None]:
    """(the difference, its standard deviations between seeds); None for what is not known."""
    by_name = {group.name: group for group in groups}
    sides = [by_name[end["name"]].shared for end in ends if end["name"] in by_name]
    one, other = paired(*sides) if len(sides) == 2 else ((), ())
    found = outcome_difference(measure, one, other) if len(one) else None
    return found, None if found is None else spread(found.per_run, one)


def outcome_difference(measure: str, one: Sequence[Run], other: Sequence[Run]) -> Estimate | None:
    """Of paired runs, `other` minus `one`; None where they lack the measure."""
    name, _, part = measure.partition(".")
    if measure.startswith(_LOSS):
        return compare_loss_rise(one, other, part) if part in common_labels([*one, *other]) else None
    if name in ("F", "P_after"):
        return (compare_forgotten if name == "F" else compare_accuracy)(one, other)
    if part and not all(part in (*run.before.settings, *run.before.kinds) for run in (*one, *other)):
        return None
    setting, kind = (part if part in known else None for known in (SETTINGS, KINDS))
    if "published" in name:
        return on_both_scales(lambda a, b: compare(a, b, setting, kind), one, other)[name]
    return compare(one, other, setting, kind)[name]
