"""All numbers of a study, computed from plan.json and the files of its runs. `gather` returns study.json."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from analysis.outcomes import acquired, forgotten, knowledge, loss_rises
from analysis.runs import TASKS, Run
from analysis.study import entropies
from analysis.study.directions import directions
from analysis.study.effects import effects
from analysis.study.groups import Group, numbers_of_entries, read_groups
from analysis.study.joined import join
from analysis.study.plan_file import Plan

FORGETTING = "general"  # label of the held-out loss whose rise is forgetting, where P is not measured


def gather(plan: Plan) -> dict[str, Any]:
    """Everything of the report as numbers, ready for JSON. What is missing because a stage has not finished is left
    out, and named under `missing`.

    Raises ValueError where a file is damaged, two runs are one, or a direction names what the study does not have.
    """
    groups, missing, warnings = read_groups(plan)
    measured, not_measured = entropies.read_entropies(plan)
    content = plan.content
    kept = ("title", "description", "about", "repeats", "seeds", "interventions", "settings", "stages", "environment")
    rows = [entropies.row(one, plan.starts) for one in measured]
    conditions = [_condition(group, plan) for group in groups]
    return {
        **{key: content[key] for key in kept},
        "notes": content.get("notes", []),
        "starts": [_start(start, rows) for start in content["starts"]],
        "entries": numbers_of_entries(groups),
        "entropies": rows,
        "conditions": conditions,
        "directions": directions(plan, groups, measured),
        "joined": join(conditions, measured, content["interventions"], content["about"], {}),
        "effects": effects(plan, groups, measured),
        "missing": [*not_measured, *missing],
        "warnings": warnings,
    }


def _start(start: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    tokens = (row["tokens"] for row in rows if row["start"] == start["name"] and row["tokens"] is not None)
    return {**{key: start[key] for key in ("name", "step", "model")}, "tokens": next(tokens, None)}


def _condition(group: Group, plan: Plan) -> dict[str, Any]:
    runs, shared = list(group.runs.values()), list(group.shared.values())
    start = plan.starts[group.start]
    return {
        "name": group.name,
        "start": group.start,
        "step": start["step"],
        "model": start["model"],
        "intervention": group.intervention,
        "setting": group.setting,
        "seeds": [list(seed) for seed in group.runs],
        "outcomes": outcomes(runs),
        "common_start": outcomes(shared),
        "by_setting": {s: _knowledge(shared, s, None) for s in shared[0].before.settings},
        "by_kind": {k: _knowledge(shared, None, k) for k in shared[0].before.kinds},
        "accuracy": _accuracy(shared),
        "per_seed": _per_seed(shared),
        "curve": _curve(runs),
        "injections": runs[0].injections,
    }


def _knowledge(runs: Sequence[Run], setting: str | None = None, kind: str | None = None) -> dict[str, Any]:
    return {
        "K_before": knowledge(runs, "before", setting, kind).as_json(),
        "K_after": knowledge(runs, "after", setting, kind).as_json(),
        "A": acquired(runs, setting, kind).as_json(),
    }


def outcomes(runs: Sequence[Run]) -> dict[str, Any]:
    """What the runs of a condition acquired and forgot, means over its seeds."""
    lost = forgotten(runs) or {}
    return {
        **_knowledge(runs),
        **{name: lost.get(name) for name in ("P_before", "P_after", "P_chance", "F")},
        "loss_rise": loss_rises(runs)["loss_rise"],
    }


def _per_seed(runs: Sequence[Run]) -> dict[str, list[float | None]]:
    """K after, A, F and the rises of losses of each run alone."""
    each = [outcomes([run]) for run in runs]
    labels = [label for label in each[0]["loss_rise"] if all(label in found["loss_rise"] for found in each)]
    values = {name: [_value(found[name]) for found in each] for name in ("K_before", "K_after", "A", "P_after", "F")}
    rises = {f"loss_rise.{label}": [found["loss_rise"][label]["value"] for found in each] for label in labels}
    return {name: found for name, found in (values | rises).items() if None not in found}


def _value(estimate: Mapping[str, Any] | None) -> float | None:
    return None if estimate is None else estimate["value"]


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
