"""What training changed, and how runs differ in it: K, A, P, F and held-out losses, with intervals (paper, B.2).

Most functions take several runs, which differ in their seed only: estimates are then means over seeds, and intervals
include the differences between the seeds that the result is about (`conditions.Repetitions`). Paired differences are
`other` minus `one`; the n-th runs of both are a pair.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from analysis import estimates
from analysis.conditions import mapped, units
from analysis.estimates import Estimate, Values, percent_change
from analysis.runs import TASKS, Run, from_original, on_published_scale
from olmo.knowledge.entries import SETTINGS


def strata(run: Run, setting: str | None = None, kind: str | None = None) -> list[int]:
    """Numbers of entries of the settings that a run probes, with probes of one kind or any."""
    probed = {s for s, k in run.before.sums if setting in (None, s) and kind in (None, k)}
    return [len(run.before.entries(s, kind)) for s in SETTINGS if s in probed]


def bootstrap(
    runs: Sequence[Run], columns: Sequence[Values], statistic: Callable[..., Any], strata: Sequence[int] = ()
) -> Estimate:
    """`estimates.bootstrap` of columns (runs, n), with the repetitions that these runs are."""
    return estimates.bootstrap(columns, statistic, strata, units=units(runs))


# --- pairs of arrays [before, after], each (runs, n) ---


def _entries(runs: Sequence[Run], setting: str | None, kind: str | None) -> list[Values]:
    return [np.stack([getattr(run, n).entries(setting, kind) for run in runs]) for n in ("before", "after")]


def _losses(runs: Sequence[Run], label: str) -> list[Values]:
    for run in runs:
        if label not in run.losses:
            raise ValueError(f"{run.folder}: the loss of {label} was not measured before and after training")
    return [np.stack([run.losses[label][place][1] for run in runs]) for place in (0, 1)]


def _accuracies(runs: Sequence[Run]) -> list[Values] | None:
    """Over the tasks of P; None where a run lacks one of them."""
    pairs = [(run.accuracy_before, run.accuracy_after) for run in runs]
    if not all(t in accuracy for pair in pairs for accuracy in pair for t in TASKS):
        return None
    return [np.array([[pair[i][t] for t in TASKS] for pair in pairs]) for i in (0, 1)]


# --- statistics of their means ---


def _lost(before: Any, after: Any) -> Any:
    return -percent_change(before, after)


def _difference_of_changes(before: Any, after: Any, other_before: Any, other_after: Any) -> Any:
    return percent_change(other_before, other_after) - percent_change(before, after)


# --- runs ---


def knowledge(runs: Sequence[Run], which: str, setting: str | None = None, kind: str | None = None) -> Estimate:
    """K `before` or `after`."""
    column = np.stack([getattr(run, which).entries(setting, kind) for run in runs])
    return bootstrap(runs, [column], lambda mean: mean, strata(runs[0], setting, kind))


def acquired(runs: Sequence[Run], setting: str | None = None, kind: str | None = None) -> Estimate:
    """A in percent against the weights that training started from."""
    return bootstrap(runs, _entries(runs, setting, kind), percent_change, strata(runs[0], setting, kind))


def were_edited(runs: Sequence[Run]) -> bool:
    """Whether all runs began with resuscitated weights."""
    return all(run.original is not None for run in runs)


def acquired_against_original(runs: Sequence[Run]) -> Estimate | None:
    """A in percent against the weights before resuscitation; None where nothing was resuscitated."""
    return acquired(mapped(from_original, runs)) if were_edited(runs) else None


def on_both_scales(
    measure: Callable[..., Mapping[str, Estimate | None]], *groups: Sequence[Run]
) -> dict[str, Estimate | None]:
    """Estimates of groups of runs, and the same on the paper's scale (analysis/published.py): `A` and `A_published`,
    `K_after` and `K_published_after`. The latter are None where a run's files lack them, and without an interval where
    these hold a logged mean only."""
    found = dict(measure(*groups))
    every = [run for runs in groups for run in runs]
    known = all(run.published is not None for run in every)
    scaled = measure(*(mapped(on_published_scale, runs) for runs in groups)) if known else dict.fromkeys(found)
    for name, e in scaled.items():
        if e is not None and not all(run.published and run.published.of_entries for run in every):
            e = replace(e, low=math.nan, high=math.nan)
        found[f"{name[0]}_published{name[1:]}"] = e
    return found


def k_and_a(runs: Sequence[Run], setting: str | None = None, kind: str | None = None) -> dict[str, Estimate | None]:
    """K before and after and A, of one setting or all and one kind of probe or all, `on_both_scales`."""
    return on_both_scales(
        lambda chosen: {
            "K_before": knowledge(chosen, "before", setting, kind),
            "K_after": knowledge(chosen, "after", setting, kind),
            "A": acquired(chosen, setting, kind),
        },
        runs,
    )


def as_json(found: Mapping[str, Estimate | None]) -> dict[str, Any]:
    return {name: None if estimate is None else estimate.as_json() for name, estimate in found.items()}


def acquired_in_parts(runs: Sequence[Run]) -> dict[str, Any]:
    """A against the original weights (or None), and K and A by setting and by kind of probe; ready for JSON."""
    by_setting = {s: as_json(k_and_a(runs, s)) for s in runs[0].before.settings}
    by_kind = {k: as_json(k_and_a(runs, None, k)) for k in runs[0].before.kinds}
    return {
        **as_json(on_both_scales(lambda chosen: {"A_against_original": acquired_against_original(chosen)}, runs)),
        "by_setting": by_setting,
        "by_kind": by_kind,
        "A_by_setting": {s: found["A"] for s, found in by_setting.items()},
        "A_by_kind": {k: found["A"] for k, found in by_kind.items()},
    }


def loss_rise(runs: Sequence[Run], label: str) -> Estimate:
    """Rise of a held-out loss in percent: forgetting, where the label's text is that of pretraining."""
    return bootstrap(runs, _losses(runs, label), percent_change)


def loss_rises(runs: Sequence[Run]) -> dict[str, Any]:
    """`loss_rise`, and `loss_rise_against_original` (or None), of every label that all runs have; ready for JSON."""
    originals = mapped(from_original, runs)
    against = {k: loss_rise(originals, k).as_json() for k in common_labels(originals)} if were_edited(runs) else None
    return {
        "loss_rise": {label: loss_rise(runs, label).as_json() for label in common_labels(runs)},
        "loss_rise_against_original": against,
    }


def common_labels(runs: Sequence[Run]) -> list[str]:
    """Labels of the held-out losses that all runs have of equally many instances."""
    first = runs[0].losses
    return [k for k in first if all(k in r.losses and len(r.losses[k][0][1]) == len(first[k][0][1]) for r in runs)]


def forgetting(runs: Sequence[Run]) -> dict[str, Estimate] | None:
    """P before and after, and F in percent, over the tasks of the paper; None where a run lacks one of them. Intervals:
    over the six tasks, and seeds."""
    columns = _accuracies(runs)
    if columns is None:
        return None
    return {
        "P_before": bootstrap(runs, columns[:1], lambda mean: mean),
        "P_after": bootstrap(runs, columns[1:], lambda mean: mean),
        "F": bootstrap(runs, columns, _lost),
    }


def forgotten(runs: Sequence[Run]) -> dict[str, Any] | None:
    """`forgetting`, and P of guessing, ready for JSON; None where a run lacks a task."""
    found = forgetting(runs)
    if found is None:
        return None
    known = all(t in run.chance for run in runs for t in TASKS)
    chance = float(np.mean([run.chance[t] for run in runs for t in TASKS])) if known else None
    return {**{name: estimate.as_json() for name, estimate in found.items()}, "P_chance": chance}


# --- paired differences ---


def compare(
    one: Sequence[Run], other: Sequence[Run], setting: str | None = None, kind: str | None = None
) -> dict[str, Estimate]:
    """A in points, and K(after), paired over entries. Raises ValueError where runs were probed with different ones."""
    for run in (*one, *other):
        if not run.before.same_probes(one[0].before):
            raise ValueError(f"{one[0].name} and {run.name} were probed with different entries")
    columns, sizes = [*_entries(one, setting, kind), *_entries(other, setting, kind)], strata(one[0], setting, kind)
    return {
        "A": bootstrap(one, columns, _difference_of_changes, sizes),
        "K_after": bootstrap(one, columns, lambda before, after, other_before, other_after: other_after - after, sizes),
    }


def compare_forgotten(one: Sequence[Run], other: Sequence[Run]) -> Estimate | None:
    """F in points, paired over tasks; None where a run lacks one of them."""
    first, second = _accuracies(one), _accuracies(other)
    if first is None or second is None:
        return None
    return bootstrap(one, [*first, *second], lambda a, b, c, d: _lost(c, d) - _lost(a, b))


def compare_accuracy(one: Sequence[Run], other: Sequence[Run]) -> Estimate | None:
    """P after training, paired over tasks; None where a run lacks one of them."""
    first, second = _accuracies(one), _accuracies(other)
    if first is None or second is None:
        return None
    return bootstrap(one, [first[1], second[1]], lambda a, b: b - a)


def compare_loss_rise(one: Sequence[Run], other: Sequence[Run], label: str) -> Estimate:
    """Rise of a held-out loss in points, paired over instances."""
    return bootstrap(one, [*_losses(one, label), *_losses(other, label)], _difference_of_changes)
