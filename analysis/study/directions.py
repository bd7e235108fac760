"""Whether a study saw what the paper found: differences between two conditions with intervals and verdicts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from analysis.directions import verdict
from analysis.estimates import Estimate
from analysis.outcomes import common_labels, compare, compare_forgotten, compare_loss_rise
from analysis.runs import Run
from analysis.study import entropies
from analysis.study.entropies import Entropies
from analysis.study.groups import Group
from analysis.study.plan_file import Plan
from olmo.exceptions import did_you_mean
from olmo.knowledge.entries import KINDS, SETTINGS

NOT_MEASURED = "not measured"  # instead of a verdict
_OUTCOMES = ("K_after", "A", "F")
_IN_PARTS = ("K_after", "A")  # also of a setting or a kind of probes: A.once, K_after.semantic
_LOSS = "loss_rise."

# What is measured -> its unit, as a reader sees it.
_UNITS = dict.fromkeys(("A", "F", "loss_rise"), "points") | dict.fromkeys(entropies.MEASURES, "nats")


def measures() -> list[str]:
    parts = [f"{name}.{part}" for name in _IN_PARTS for part in (*SETTINGS, *KINDS)]
    return [*entropies.MEASURES, *_OUTCOMES, *parts, f"{_LOSS}LABEL"]


def check_measure(name: str) -> None:
    """Raise ValueError, with the nearest, for a name that is no measure of a direction."""
    if name not in measures() and not (name.startswith(_LOSS) and name != _LOSS):
        meant = did_you_mean(name, measures())
        raise ValueError(f"unknown measure '{name}'{meant}; known: {', '.join(measures())}")


def directions(plan: Plan, groups: Sequence[Group], measured: Sequence[Entropies]) -> list[dict[str, Any]]:
    """Every direction of a plan, ready for JSON. Differences are `to` minus `from`, over the seeds that both have;
    A, F and the rises of losses are measured from the start that both share.

    Raises ValueError for an unknown measure or condition, with the nearest.
    """
    return [{**direction, **_found(plan, direction, groups, measured)} for direction in plan.content["directions"]]


def _found(
    plan: Plan, direction: Mapping[str, Any], groups: Sequence[Group], measured: Sequence[Entropies]
) -> dict[str, Any]:
    measure = direction["measure"]
    check_measure(measure)
    find = _of_entropy if measure in entropies.MEASURES else _of_outcome
    estimate, per_seed, repetitions = find(plan, direction, groups, measured)
    unit = _UNITS.get(measure.partition(".")[0], "")
    if estimate is None:
        estimate, shown = Estimate(math.nan, math.nan, math.nan), NOT_MEASURED
    else:
        shown = verdict(estimate, 1 if direction["expected"] == "above" else -1)
    return {"unit": unit, **estimate.as_json(), "verdict": shown, "seeds": repetitions, "per_seed": per_seed}


_Found = tuple[Estimate | None, list[float], int]  # the difference, that of each repetition, number of repetitions


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


def _of_entropy(
    plan: Plan, direction: Mapping[str, Any], groups: Sequence[Group], measured: Sequence[Entropies]
) -> _Found:
    """On the first text and coefficient on which both were measured."""
    ends = [_end(plan, direction, end) for end in ("from", "to")]
    places = [[e for e in measured if (e.start, e.intervention) == (end["start"], end["intervention"])] for end in ends]
    for one in places[0]:
        for other in places[1]:
            if (one.data, one.coefficient) == (other.data, other.coefficient):
                found = entropies.difference_of(one.results, other.results, direction["measure"])
                if found is not None:
                    return *found, len(found[1])
    return None, [], 0


def _of_outcome(
    plan: Plan, direction: Mapping[str, Any], groups: Sequence[Group], measured: Sequence[Entropies]
) -> _Found:
    names = [_end(plan, direction, end)["name"] for end in ("from", "to")]
    ends = [next((group for group in groups if group.name == name), None) for name in names]
    one, other = ends
    seeds = one.pairs(other) if one and other else []
    if not one or not other or not seeds:
        return None, [], 0
    measure = direction["measure"]
    found = outcome_difference(measure, [one.shared[s] for s in seeds], [other.shared[s] for s in seeds])
    each = [outcome_difference(measure, [one.shared[s]], [other.shared[s]]) for s in seeds]
    repetitions = {s[0] for s in seeds} if plan.content["about"] == "model" else set(seeds)
    return found, [of_seed.value for of_seed in each if of_seed is not None], len(repetitions)


def outcome_difference(measure: str, one: Sequence[Run], other: Sequence[Run]) -> Estimate | None:
    """Of paired runs, `other` minus `one`; None where they lack the measure."""
    name, _, part = measure.partition(".")
    if measure.startswith(_LOSS):
        return compare_loss_rise(one, other, part) if part in common_labels([*one, *other]) else None
    if name == "F":
        return compare_forgotten(one, other)
    if part and not all(part in (*run.before.settings, *run.before.kinds) for run in (*one, *other)):
        return None
    return compare(one, other, part if part in SETTINGS else None, part if part in KINDS else None)[name]
