"""All numbers of a study, computed from plan.json and the files of its runs. `gather` returns study.json."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from analysis import decay, dynamics
from analysis.conditions import paired, spread
from analysis.estimates import Estimate, finite
from analysis.outcomes import common_labels, forgetting, forgotten, k_and_a, loss_rise
from analysis.pairing import unpaired
from analysis.runs import TASKS, Run
from analysis.study import entropies, published
from analysis.study.directions import directions
from analysis.study.effects import effects
from analysis.study.groups import Group, numbers_of_entries, read_groups
from analysis.study.joined import join
from analysis.study.plan_file import Plan
from analysis.study.scored import read_scores
from analysis.study.tables import tables

FORGETTING = "general"  # label of the held-out loss whose rise is forgetting, where P is not measured


def gather(plan: Plan) -> dict[str, Any]:
    """Everything of the report as numbers, ready for JSON. What is missing because a stage has not finished is left
    out, and named under `missing`.

    Raises ValueError where a file is damaged, two runs are one, or a direction names what the study does not have.
    """
    groups, missing, warnings = read_groups(plan)
    measured, not_measured = entropies.read_entropies(plan)
    scores, not_scored = read_scores(plan)
    content = plan.content
    kept = ("title", "description", "about", "repeats", "seeds", "interventions", "settings", "stages", "environment")
    rows = [entropies.row(one, plan.starts) for one in measured]
    of_paper = published.study(content["repeats"]).get("settings", {})
    conditions = [_condition(group, plan) for group in groups]
    found = {
        **{key: content[key] for key in kept},
        "notes": content.get("notes", []),
        "starts": [_start(start, rows) for start in plan.starts.values()],
        "entries": numbers_of_entries(groups),
        "entropies": rows,
        "scores": scores,
        "conditions": conditions,
        "directions": directions(plan, groups, measured),
        "joined": join(conditions, measured, content["interventions"], content["about"], of_paper),
        "effects": effects(plan, groups, measured),
        "missing": [*not_measured, *not_scored, *missing],
        "warnings": [*warnings, *_no_pairs(groups, content["directions"])],
    }
    return {**found, "tables": tables(found, content["tables"])}


def _no_pairs(groups: Sequence[Group], directions: Sequence[Mapping[str, Any]]) -> list[str]:
    """What runs do not share that are compared as pairs: those of a setting with its first condition, and those of
    directions."""
    by_name = {group.name: group for group in groups}
    first = {group.setting: group for group in reversed(groups)}
    compared = [(first[group.setting], group) for group in groups]
    compared += [(by_name[d["from"]], by_name[d["to"]]) for d in directions if {d["from"], d["to"]} <= by_name.keys()]
    once = {frozenset((one.name, other.name)): (one, other) for one, other in reversed(compared)}
    lines = [line for one, other in reversed(once.values()) for line in unpaired(*paired(one.runs, other.runs))]
    return list(dict.fromkeys(lines))


def _start(start: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    tokens = (row["tokens"] for row in rows if row["start"] == start["name"] and row["tokens"] is not None)
    return {**{key: start[key] for key in ("name", "step", "model")}, "tokens": next(tokens, None)}


def _condition(group: Group, plan: Plan) -> dict[str, Any]:
    runs, shared, start = group.runs, group.shared, plan.starts[group.start]
    estimates, chance = outcomes(shared), {"P_chance": (forgotten(shared) or {}).get("P_chance")}
    return {
        "name": group.name,
        "start": group.start,
        "step": start["step"],
        "model": start["model"],
        "intervention": group.intervention,
        "setting": group.setting,
        "seeds": [list(seed) for seed in runs.seeds],
        "outcomes": {**_json(outcomes(runs)), **chance},
        "common_start": {**_json(estimates), **chance},
        "by_setting": {s: _json(k_and_a(shared, s)) for s in shared[0].before.settings},
        "by_kind": {k: _json(k_and_a(shared, None, k)) for k in shared[0].before.kinds},
        "accuracy": _accuracy(shared),
        "per_seed": {name: list(map(finite, e.per_run)) for name, e in _flat(estimates).items()},
        "spread": {name: spread(e.per_run, shared) for name, e in _flat(estimates).items()},
        "curve": _curve(runs),
        "injections": runs[0].injections,
        "begins": runs[0].begins,
        "tokens_per_step": runs[0].tokens_per_step,
        "dynamics": _dynamics(runs, plan),
    }


def _dynamics(runs: Sequence[Run], plan: Plan) -> dict[str, Any] | None:
    """Effectivity and retainability; None where no probes were scored around injections."""
    options = dynamics.options(runs[0].folder, plan.acquisition())
    found = [dynamics.measure(run.probes, run.encounters or {}, options) for run in runs]
    alike = all(one.coverage["measured"] and one.probes.same(found[0].probes) for one in found)
    return decay.summarise_seeds(found) if alike else None


Outcomes = dict[str, Any]  # estimates or None by name; those of the rises of losses by label under `loss_rise`


def outcomes(runs: Sequence[Run]) -> Outcomes:
    """What the runs of a condition acquired and forgot."""
    lost = forgetting(runs) or dict.fromkeys(("P_before", "P_after", "F"))
    return {**k_and_a(runs), **lost, "loss_rise": {label: loss_rise(runs, label) for label in common_labels(runs)}}


def _flat(found: Outcomes) -> dict[str, Estimate]:
    """The estimates that are known, those of losses as `loss_rise.LABEL`."""
    single = {name: e for name, e in found.items() if isinstance(e, Estimate)}
    return {**single, **{f"loss_rise.{label}": e for label, e in found["loss_rise"].items()}}


def _json(found: Outcomes) -> dict[str, Any]:
    return {name: _json(e) if isinstance(e, dict) else None if e is None else e.as_json() for name, e in found.items()}


def _accuracy(runs: Sequence[Run]) -> dict[str, dict[str, float | None]]:
    """Of each task that all runs have: mean accuracy before and after, and that of guessing."""
    tasks = [t for t in TASKS if all(t in found for r in runs for found in (r.accuracy_before, r.accuracy_after))]
    return {
        task: {
            "before": _mean(run.accuracy_before[task] for run in runs),
            "after": _mean(run.accuracy_after[task] for run in runs),
            "chance": runs[0].chance.get(task),
        }
        for task in tasks
    }


def _curve(runs: Sequence[Run]) -> list[dict[str, float]]:
    """K and its parts over steps, means over the runs, at the steps at which all were evaluated."""
    of_runs = [dict(run.curve) for run in runs]
    shared = [step for step in of_runs[0] if all(step in curve for curve in of_runs)]
    return [
        {
            "step": step,
            **{
                name: _mean(curve[step][name] for curve in of_runs)
                for name in of_runs[0][step]
                if all(name in curve[step] for curve in of_runs)
            },
        }
        for step in shared
    ]


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))
