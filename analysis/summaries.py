"""acquisition.json: everything measured about several runs, and what each differs by from a baseline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from analysis import decay, dynamics, estimates, shapes
from analysis.conditions import Condition, conditions, pairs
from analysis.dynamics import Dynamics
from analysis.outcomes import (
    acquired_in_parts,
    as_json,
    common_labels,
    compare,
    compare_forgotten,
    compare_loss_rise,
    forgotten,
    k_and_a,
    loss_rises,
    on_both_scales,
    were_edited,
)
from analysis.pairing import unpaired
from analysis.runs import Run, distinct, from_original, read_run
from analysis.summary_table import estimates_of
from olmo.files.paths import read_json

_OUTCOMES: dict[str, Any] = {
    "run": str,
    "start": (int, None),
    "step": int,
    "K_before": shapes.ESTIMATE,
    "K_after": shapes.ESTIMATE,
    "A": shapes.ESTIMATE,
    "A_against_original": (shapes.ESTIMATE, None),
    **dict.fromkeys(("?K_published_before", "?K_published_after"), (shapes.ESTIMATE, None)),
    **dict.fromkeys(("?A_published", "?A_published_against_original"), (shapes.ESTIMATE, None)),
    "loss_rise": {"*": shapes.ESTIMATE},
    "?loss_rise_against_original": ({"*": shapes.ESTIMATE}, None),
    "downstream": ({"F": shapes.ESTIMATE, "P_before": shapes.ESTIMATE, "P_after": shapes.ESTIMATE}, None),
    "?downstream_against_original": ({"F": shapes.ESTIMATE}, None),
}
_CURVE = {"at": [int], "mean": [float], "low": [(float, None)], "high": [(float, None)], "values": [int]}
_GROUP: dict[str, Any] = {
    "probes": int,
    "nothing_acquired": int,
    "not_known": int,
    "effectivity": (shapes.ESTIMATE, None),
    "?effectivity_by_injection": _CURVE,
    "retainability": _CURVE,
    "decay": ({"a": shapes.ESTIMATE, "line": [[float]], "*": (float, dict, None)}, None),
}
_DYNAMICS: dict[str, Any] = {
    "window": int,
    "fit_range": [(float, None)],
    "coverage": {"*": int} | dict.fromkeys(("pairs", "measured", "no_table_after", "cut_short", "tables"), int),
    "groups": {"all": _GROUP, "*": _GROUP},
}
# What tables and figures need of acquisition.json.
RESULT_SHAPE: dict[str, Any] = {
    "runs": [
        {
            **_OUTCOMES,
            "begins": (int, None),
            "?tokens_per_step": (int, None),
            "first_step": int,
            "loss_steps": {"*": [int]},
            "downstream_steps": ([int], None),
            "curve": [{"step": int, "*": float}],
            "injections": [int],
            "injections_logged": bool,
            "dynamics": (_DYNAMICS, None),
            "?K_published_of": (str, None),
            "?not_finite": {"probes": {"*": int}, "losses": {"*": int}, "accuracies": int},
        }
    ],
    "?conditions": [
        {
            **_OUTCOMES,
            "runs": [str],
            "spread": {"*": float},
            "dynamics": (
                {"groups": {"all": {"effectivity": (shapes.ESTIMATE, None), "decay": ({"a": shapes.ESTIMATE}, None)}}},
                None,
            ),
        }
    ],
    "?identical": {"*": str},
    "comparisons": [
        {
            "from": str,
            "to": str,
            "?runs": [[str]],
            "?unpaired": [str],
            **dict.fromkeys(("A", "K_after", "F", "?A_published", "?K_published_after"), (shapes.ESTIMATE, None)),
            "loss_rise": {"*": shapes.ESTIMATE},
            "?common_start": (
                {"A": shapes.ESTIMATE, "F": (shapes.ESTIMATE, None), "loss_rise": {"*": shapes.ESTIMATE}},
                None,
            ),
            "dynamics": ({"all": {"effectivity": (shapes.ESTIMATE, None), "a": (shapes.ESTIMATE, None)}}, None),
        }
    ],
}

Measured = dict[str, Dynamics | None]  # by the name of the run


def summarise(
    folders: Sequence[Path],
    options: dynamics.Options,
    together: Sequence[Sequence[Path]] = (),
    baseline: Path | None = None,
    before: Path | None = None,
) -> dict[str, Any]:
    """Read and measure runs; ready for JSON. Raises OSError or ValueError where a folder holds no complete run.

    Runs with the same metrics are one run: repetitions are named under `identical` and measured once. `together`:
    folders of runs that are seeds of one condition, besides those whose configurations show it. Conditions are compared
    with that of `baseline`, one of the folders, which is the first run otherwise. `before`: as in `read_run`.
    """
    read = {folder: read_run(folder, before) for folder in folders}
    if len({run.name for run in read.values()}) < len(read):  # for instance runs of several seeds
        read = {folder: replace(run, name=str(folder)) for folder, run in read.items()}
    runs, identical = distinct(list(read.values()))
    identical = {run.name: run.name for folder, run in read.items() if folders.count(folder) > 1} | identical
    measured = {run.name: _measure(run, options) for run in runs}
    kept = [[run for run in map(read.__getitem__, group) if run.name in measured] for group in together]
    found = conditions(runs, [group for group in kept if group])
    name = runs[0].name if baseline is None else read[baseline].name
    name = identical.get(name, name)
    first = next(c for c in found if name in {run.name for run in c.runs})
    rows = [_summary(run, measured[run.name]) for run in runs]
    means = [_of_condition(c, measured) for c in found if len(c.runs) > 1]
    return {
        "runs": rows,
        "conditions": [{**row, "spread": _spread(row, rows)} for row in means],
        "identical": identical,
        "comparisons": [_comparison(first, other, measured) for other in found if other is not first],
        "resamples": estimates.RESAMPLES,
    }


def read(path: Path) -> dict[str, Any]:
    """What `summarise` returned, from its file; raises ValueError for another file."""
    result = read_json(path)
    if not isinstance(result, dict) or not {"runs", "comparisons"} <= result.keys() or not result["runs"]:
        raise ValueError(f"{path}: not written by analysis.acquisition")
    shapes.check(path, result, RESULT_SHAPE)
    return result


def _measure(run: Run, options: dynamics.Options) -> Dynamics | None:
    """None where the run did not log what it injected, or injected nothing that it probes."""
    found = dynamics.measure(run.probes, run.encounters or {}, options)
    return found if found.injected.any() else None


def _summary(run: Run, measured: Dynamics | None) -> dict[str, Any]:
    return {
        "run": run.name,
        "start": run.start,
        "begins": run.begins,
        "tokens_per_step": run.tokens_per_step,
        "first_step": run.first_step,
        "step": run.step,
        **as_json(k_and_a([run])),
        "K_original": None if run.original is None else float(run.original.entries().mean()),
        "K_published_of": _published_of(run),
        **acquired_in_parts([run]),
        "by_setting_and_kind": {f"{s}_{k}": as_json(k_and_a([run], s, k)) for s, k in run.before.sums},
        **loss_rises([run]),
        "loss_steps": {label: [step for step, _ in pair] for label, pair in run.losses.items()},
        "downstream": forgotten([run]),
        "downstream_against_original": forgotten([from_original(run)]) if run.original else None,
        "downstream_steps": None if run.accuracy_steps is None else list(run.accuracy_steps),
        "accuracy_before": run.accuracy_before,
        "accuracy_after": run.accuracy_after,
        "chance": run.chance,
        "curve": [{"step": step, **values} for step, values in run.curve],
        "injections": run.injections,
        "injections_logged": run.encounters is not None,
        "dynamics": None if measured is None else decay.summarise(measured),
        "not_finite": {
            "probes": {str(step): count for step, count in run.probes.not_finite.items()},
            "losses": {label: sum(int(np.isnan(v).sum()) for _, v in pair) for label, pair in run.losses.items()},
            "accuracies": run.accuracies_not_finite,
        },
    }


def _published_of(run: Run) -> str | None:
    """What K_published was computed from."""
    if run.published is None:
        return None
    if not run.published.of_entries:
        return "logged losses"
    return "probes" if run.published.same_batches else "probes in other batches"


def _of_condition(condition: Condition, measured: Measured) -> dict[str, Any]:
    """The row of several seeds, shaped as that of a run."""
    runs, found = condition.runs, [measured[run.name] for run in condition.runs]
    for run in runs:
        if not run.before.same_probes(runs[0].before):
            raise ValueError(f"{runs[0].name} and {run.name} were probed with different entries")
        if (run.original is None) != (runs[0].original is None):
            raise ValueError(
                f"{runs[0].name} and {run.name} are no seeds of one setting: one began with edited weights"
            )
    steps, starts = {run.step for run in runs}, {run.start for run in runs}
    row = {
        "run": f"mean of {condition.name} ({len(runs)} seeds)",
        "runs": [run.name for run in runs],
        "start": starts.pop() if len(starts) == 1 else None,
        "step": min(steps),
        **as_json(k_and_a(runs)),
        **acquired_in_parts(runs),
        **loss_rises(runs),
        "downstream": forgotten(runs),
        "downstream_against_original": forgotten([from_original(r) for r in runs]) if were_edited(runs) else None,
    }
    known = _of_same_probes(found)
    row["dynamics"] = decay.summarise_seeds(known) if known else None
    return row


def _spread(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Standard deviations between seeds of what the table shows of a condition, where every seed has it."""
    found = {}
    for name, estimate in estimates_of(row, list(row["loss_rise"])).items():
        of_seeds = [estimates_of(r, list(row["loss_rise"]))[name] for r in rows if r["run"] in row["runs"]]
        values = [e["value"] for e in of_seeds if e is not None and e["value"] is not None]
        if estimate is not None and len(values) == len(of_seeds):
            found[name] = float(np.std(values, ddof=1))
    return found


def _of_same_probes(measured: Sequence[Dynamics | None]) -> list[Dynamics]:
    """All of them, or none where one is missing or has other probes."""
    known = [d for d in measured if d is not None]
    alike = len(known) == len(measured) and all(d.probes.same(known[0].probes) for d in known)
    return known if alike else []


def _comparison(first: Condition, second: Condition, measured: Measured) -> dict[str, Any]:
    """Paired differences, `second` minus `first`, of everything that both have, over the seeds that both have."""
    paired = pairs(first, second)
    named = {"from": first.name, "to": second.name, "runs": [[a.name, b.name] for a, b in paired]}
    if not paired:
        names = ("A", "K_after", "A_published", "K_published_after", "F", "dynamics")
        return {**named, **dict.fromkeys(names), "by_setting_and_kind": {}, "loss_rise": {}}
    one, other = [a for a, _ in paired], [b for _, b in paired]
    f = compare_forgotten(one, other)
    of_both = _of_same_probes([measured[run.name] for run in (*one, *other)])
    return {
        **named,
        **as_json(on_both_scales(compare, one, other)),
        "by_setting_and_kind": {
            f"{s}_{k}": as_json(on_both_scales(partial(compare, setting=s, kind=k), one, other))
            for s, k in one[0].before.sums
        },
        "F": None if f is None else f.as_json(),
        "loss_rise": {k: compare_loss_rise(one, other, k).as_json() for k in common_labels([*one, *other])},
        "dynamics": decay.compare(of_both[: len(one)], of_both[len(one) :]) if of_both else None,
        "common_start": _from_common_start(one, other),
        "unpaired": unpaired(one, other),
    }


def _from_common_start(one: Sequence[Run], other: Sequence[Run]) -> dict[str, Any] | None:
    """Differences where both are measured from the weights before resuscitation; None where neither was edited."""
    if not any(run.original for run in (*one, *other)):
        return None
    one, other = [from_original(run) for run in one], [from_original(run) for run in other]
    f = compare_forgotten(one, other)
    return {
        **as_json(on_both_scales(lambda *groups: {"A": compare(*groups)["A"]}, one, other)),
        "F": None if f is None else f.as_json(),
        "loss_rise": {k: compare_loss_rise(one, other, k).as_json() for k in common_labels([*one, *other])},
    }
