"""acquisition.json: everything measured about several runs, and what each differs by from the first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from analysis import decay, dynamics, estimates
from analysis.dynamics import Dynamics
from analysis.outcomes import (
    acquired,
    acquired_in_parts,
    compare,
    compare_forgotten,
    compare_loss_rise,
    forgotten,
    knowledge,
    loss_rise,
)
from analysis.runs import Run, read_run
from olmo.files.paths import read_json


def summarise(folders: Sequence[Path], options: dynamics.Options) -> dict[str, Any]:
    """Read and measure runs; ready for JSON. Raises OSError or ValueError where a folder holds no complete run."""
    runs = [read_run(folder) for folder in folders]
    if len({run.name for run in runs}) < len(runs):  # for instance runs of several seeds, in folders of one name
        runs = [replace(run, name=str(folder)) for run, folder in zip(runs, folders)]
    measured = [_measure(run, options) for run in runs]
    first, *others = zip(runs, measured)
    return {
        "runs": [_summary(run, of_run) for run, of_run in zip(runs, measured)],
        "comparisons": [_comparison(*first, *other) for other in others],
        "resamples": estimates.RESAMPLES,
    }


def read(path: Path) -> dict[str, Any]:
    """What `summarise` returned, from its file; raises ValueError for another file."""
    result = read_json(path)
    if not isinstance(result, dict) or not {"runs", "comparisons"} <= result.keys():
        raise ValueError(f"{path}: not written by analysis.acquisition")
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
        "first_step": run.first_step,
        "step": run.step,
        "K_before": knowledge(run, "before").as_json(),
        "K_after": knowledge(run, "after").as_json(),
        "K_original": None if run.original is None else float(run.original.entries().mean()),
        "A": acquired([run]).as_json(),
        **acquired_in_parts([run]),
        "by_setting_and_kind": {
            f"{s}_{k}": {
                "K_before": knowledge(run, "before", s, k).as_json(),
                "K_after": knowledge(run, "after", s, k).as_json(),
                "A": acquired([run], s, k).as_json(),
            }
            for s, k in run.before.sums
        },
        "loss_rise": {label: loss_rise([run], label).as_json() for label in run.losses},
        "loss_steps": {label: [step for step, _ in pair] for label, pair in run.losses.items()},
        "downstream": forgotten([run]),
        "downstream_steps": None if run.accuracy_steps is None else list(run.accuracy_steps),
        "accuracy_before": run.accuracy_before,
        "accuracy_after": run.accuracy_after,
        "chance": run.chance,
        "curve": [{"step": step, **values} for step, values in run.curve],
        "injections": run.injections,
        "injections_logged": run.encounters is not None,
        "dynamics": None if measured is None else decay.summarise(measured),
    }


def _comparison(one: Run, first: Dynamics | None, other: Run, second: Dynamics | None) -> dict[str, Any]:
    """Paired differences, `other` minus `one`, of everything that both have."""
    f = compare_forgotten([one], [other])
    labels = [k for k in one.losses if k in other.losses and len(other.losses[k][0][1]) == len(one.losses[k][0][1])]
    same_probes = first is not None and second is not None and first.probes.same(second.probes)
    return {
        "from": one.name,
        "to": other.name,
        **{name: found.as_json() for name, found in compare([one], [other]).items()},
        "by_setting_and_kind": {
            f"{s}_{k}": {name: found.as_json() for name, found in compare([one], [other], s, k).items()}
            for s, k in one.before.sums
        },
        "F": None if f is None else f.as_json(),
        "loss_rise": {label: compare_loss_rise([one], [other], label).as_json() for label in labels},
        "dynamics": decay.compare(first, second) if same_probes and first and second else None,
    }
