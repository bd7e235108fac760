"""What each intervention did, against the start it was made at: the change of entropy at once, and of the outcomes.

The paper changes the entropy by resuscitation. If the entropy is what matters, other means that change it as much have
the same effects; if they have not, it is not the entropy alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from analysis.conditions import paired
from analysis.estimates import Estimate
from analysis.outcomes import common_labels
from analysis.study import entropies
from analysis.study.directions import outcome_difference
from analysis.study.entropies import Entropies
from analysis.study.groups import Group
from analysis.study.interventions import NO_INJECTION, UNCHANGED, kind
from analysis.study.plan_file import Plan


def effects(plan: Plan, groups: Sequence[Group], measured: Sequence[Entropies]) -> list[dict[str, Any]]:
    """A row for each condition with an intervention and an unchanged one of the same start and setting, ready for JSON:
    paired differences of outcomes, and of the entropy where it was measured of both (`H`, or None)."""
    kinds = {name: kind(found) for name, found in plan.content["interventions"].items()}
    plain = {(g.start, g.setting): g for g in groups if kinds[g.intervention] == UNCHANGED}
    rows = []
    for group in groups:
        base = plain.get((group.start, group.setting))
        if base is None or kinds[group.intervention] in (UNCHANGED, NO_INJECTION):
            continue
        one, other = paired(base.shared, group.shared)
        if not one:
            continue
        rises = [f"loss_rise.{label}" for label in common_labels([*one, *other])]
        found = {name: outcome_difference(name, one, other) for name in ("A", "K_after", "F", *rises)}
        rows.append(
            {
                "name": group.name,
                "start": group.start,
                "setting": group.setting,
                "intervention": group.intervention,
                "kind": kinds[group.intervention],
                "seeds": found["K_after"].repetitions if found["K_after"] else None,
                "H": _json(_entropy(base, group, measured)),
                **{name: _json(estimate) for name, estimate in found.items()},
            }
        )
    return rows


def _entropy(base: Group, group: Group, measured: Sequence[Entropies]) -> Estimate | None:
    """The change of H on the first text and coefficient with which both were measured."""
    of: dict[tuple[str, str], dict[str, Entropies]] = {}
    for one in measured:
        if one.start == group.start:
            of.setdefault((one.data, one.coefficient), {})[one.intervention] = one
    for results in of.values():
        if base.intervention in results and group.intervention in results:
            found = entropies.difference_of(results[base.intervention], results[group.intervention])
            if found is not None:
                return found
    return None


def _json(estimate: Estimate | None) -> dict[str, float | None] | None:
    return None if estimate is None else estimate.as_json()
