"""The numbers of the demo's study, read or computed from the files of its runs. `gather` returns report.json."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from analysis import shapes
from analysis.directions import directions
from analysis.outcomes import acquired, acquired_in_parts, forgotten, loss_rises, strata
from analysis.results import RESULT
from analysis.runs import TASKS, Run, distinct, from_original, read_run
from olmo.files.paths import read_json
from olmo.knowledge.entries import SETTINGS

# What the report needs of demo.json, and of each knowledge_entropy.json.
MANIFEST: dict[str, Any] = {
    "setting": str,
    "published": bool,
    "seeds": int,
    "pretraining": [str],
    "conditions": {"*": {"name": str, "start": int, "runs": [str]}},
    "stages": [{"name": str, "command": [str], "seconds": float, "peak_memory_mib": float}],
    "environment": {
        "platform": str,
        "processor_count": (int, None),
        "python": str,
        "versions": {"*": (str, None)},
        "git": (str, dict, None),
    },
}
ENTROPY: dict[str, Any] = {
    "knowledge_entropy": float,
    "standard_error": (float, None),
    "layers": [float],
    "layer_standard_errors": [(float, None)],
    "?layer_numbers": [int],
    "maximum": float,
    "number_of_instances": int,
    "leave_one_group_out": [[float]],
    "checkpoint": {"step": int},
    "data": {"sha256": str},
}
CONDITIONS = ("early", "middle", "last", "last_q1", "last_q2", "last_control")


def gather(folder: Path) -> dict[str, Any]:
    """All numbers of the report, ready for JSON; `folder` is the output of scripts.demo.

    Raises FileNotFoundError without demo.json, ValueError where the demo has not finished or two runs are one.
    """
    path = folder / "demo.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; make it with: make demo")
    manifest = read_json(path)
    shapes.check(path, manifest, {"?conditions": {"*": dict}})
    if not set(CONDITIONS) <= manifest.get("conditions", {}).keys() or "environment" not in manifest:
        raise ValueError(f"{path}: the demo has not finished; run it again, it continues where it stopped")
    shapes.check(path, manifest, MANIFEST)
    if not manifest["stages"] or not all(len(c["runs"]) for c in manifest["conditions"].values()):
        raise ValueError(f"{path}: lists no stages, or a condition without runs; run the demo again")
    entropies = [read_entropies(folder / pretraining) for pretraining in manifest["pretraining"]]
    for pretraining, results in zip(manifest["pretraining"], entropies):
        if missing := {c["start"] for c in manifest["conditions"].values()} - {
            r["checkpoint"]["step"] for r in results
        }:
            raise ValueError(f"{folder / pretraining}: no {RESULT} of step {min(missing)}")
    by_step = [{result["checkpoint"]["step"]: result for result in results} for results in entropies]
    conditions = manifest["conditions"]
    runs = {key: [read_run(folder / run) for run in condition["runs"]] for key, condition in conditions.items()}
    # Named by their places: seeds of one condition have folders of one name.
    every = [replace(run, name=str(run.folder)) for group in runs.values() for run in group]
    for run, first in distinct(every)[1].items():
        raise ValueError(f"{run} has exactly the metrics of {first}: they are one run and must not count as two")
    starts = {key: condition["start"] for key, condition in conditions.items()}
    return {
        "setting": manifest["setting"],
        "published_knowledge": manifest["published"],
        "seeds": manifest["seeds"],
        "entries": dict(zip(SETTINGS, strata(runs["last"][0]))),
        "directions": directions(runs, starts, by_step),
        "entropy": entropies,
        "conditions": {
            key: {
                "name": conditions[key]["name"],
                "start": starts[key],
                "entropy": _mean(results[starts[key]]["knowledge_entropy"] for results in by_step),
                **_summary(group),
            }
            for key, group in runs.items()
        },
        "stages": manifest["stages"],
        "environment": manifest["environment"],
    }


def read_entropies(pretraining: Path) -> list[dict[str, Any]]:
    """knowledge_entropy.json of every checkpoint of a run, by step."""
    found = []
    for path in pretraining.glob(f"step*/{RESULT}"):
        found.append(read_json(path))
        shapes.check(path, found[-1], ENTROPY)
    return sorted(found, key=lambda result: result["checkpoint"]["step"])


def _summary(runs: Sequence[Run]) -> dict[str, Any]:
    """What the runs of one condition, which differ in their seed only, acquired and forgot.

    `common_start`: the same from the weights before resuscitation, as figures and verdicts have it; without
    resuscitation it is no other start.
    """
    first, originals = runs[0], [from_original(run) for run in runs]
    return {
        "common_start": {
            "A": acquired(originals).as_json(),
            "A_per_seed": [acquired([run]).value for run in originals],
            **acquired_in_parts(originals),
            **loss_rises(originals),
            "downstream": forgotten(originals),
            "accuracy": _accuracy(originals),
        },
        "K_before": _mean(run.before.entries().mean() for run in runs),
        "K_after": _mean(run.after.entries().mean() for run in runs),
        "A": acquired(runs).as_json(),
        "A_per_seed": [acquired([run]).value for run in runs],
        **acquired_in_parts(runs),
        **loss_rises(runs),
        "downstream": forgotten(runs),
        "accuracy": _accuracy(runs),
        "curve": [
            {"step": step, **{name: _mean(run.curve[place][1][name] for run in runs) for name in metrics}}
            for place, (step, metrics) in enumerate(first.curve)
        ],
        "injections": first.injections,
    }


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


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))
