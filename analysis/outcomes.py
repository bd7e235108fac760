"""What training changed, and how runs differ in it: K, A, P, F and held-out losses (method section 4), with intervals.

Most functions take several runs, which differ in their seed only: estimates are then means over seeds, and intervals
hold what these differ by.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from analysis.estimates import Estimate, bootstrap, percent_change
from analysis.runs import TASKS, Run
from olmo.knowledge.entries import SETTINGS


def knowledge(run: Run, which: str, setting: str | None = None, kind: str | None = None) -> Estimate:
    """K `before` or `after`."""
    return bootstrap([getattr(run, which).entries(setting, kind)[None]], _itself, strata(run, setting, kind))


def _itself(mean: Any) -> Any:
    return mean


def acquired(runs: Sequence[Run], setting: str | None = None, kind: str | None = None) -> Estimate:
    """A in percent against the weights that training started from, over runs that differ in their seed only."""
    before, after = ([getattr(r, n).entries(setting, kind) for r in runs] for n in ("before", "after"))
    return bootstrap([np.stack(before), np.stack(after)], percent_change, strata(runs[0], setting, kind))


def acquired_in_parts(runs: Sequence[Run]) -> dict[str, Any]:
    """A against the original weights (or None), by setting, and by kind of probe; ready for JSON."""
    against_original, probed = acquired_against_original(runs), runs[0].before
    return {
        "A_against_original": None if against_original is None else against_original.as_json(),
        "A_by_setting": {s: acquired(runs, s).as_json() for s in probed.settings},
        "A_by_kind": {k: acquired(runs, None, k).as_json() for k in probed.kinds},
    }


def acquired_against_original(runs: Sequence[Run]) -> Estimate | None:
    """A in percent against the weights before resuscitation; None where nothing was resuscitated."""
    originals = [r.original for r in runs if r.original is not None]
    if len(originals) != len(runs):
        return None
    columns = [np.stack([o.entries() for o in originals]), np.stack([r.after.entries() for r in runs])]
    return bootstrap(columns, percent_change, strata(runs[0]))


def strata(run: Run, setting: str | None = None, kind: str | None = None) -> list[int]:
    """Numbers of entries of the settings that a run probes, with probes of one kind or any."""
    probed = {s for s, k in run.before.sums if setting in (None, s) and kind in (None, k)}
    return [len(run.before.entries(s, kind)) for s in SETTINGS if s in probed]


def loss_rise(runs: Sequence[Run], label: str) -> Estimate:
    """Rise of a held-out loss in percent: forgetting, where the label's text is what came before."""
    columns = [np.stack([getattr(r, n)[label] for r in runs]) for n in ("losses_before", "losses_after")]
    return bootstrap(columns, percent_change)


def forgotten(runs: Sequence[Run]) -> dict[str, Any] | None:
    """P before and after and F in percent over the tasks of the paper, over runs that differ in their seed only, ready
    for JSON; None where a run has not all of them. Intervals: over the six tasks, and seeds."""
    columns = _accuracies(runs)
    if columns is None:
        return None
    before, after = columns
    known = all(t in run.chance for run in runs for t in TASKS)
    return {
        "P_before": bootstrap([before], _itself).as_json(),
        "P_after": bootstrap([after], _itself).as_json(),
        "P_chance": float(np.mean([run.chance[t] for run in runs for t in TASKS])) if known else None,
        "F": bootstrap([before, after], _lost).as_json(),
    }


def _lost(before: Any, after: Any) -> Any:
    return -percent_change(before, after)


def _accuracies(runs: Sequence[Run]) -> list[Any] | None:
    """[before, after], each (seeds, tasks); None where a run has not all of the tasks."""
    pairs = [(run.accuracy_before, run.accuracy_after) for run in runs]
    if not all(t in accuracy for pair in pairs for accuracy in pair for t in TASKS):
        return None
    return [np.array([[pair[i][t] for t in TASKS] for pair in pairs]) for i in (0, 1)]


def compare(
    one: Sequence[Run], other: Sequence[Run], setting: str | None = None, kind: str | None = None
) -> dict[str, Estimate]:
    """`other` minus `one`, paired over their common entries: A in points, and K(after)."""
    for run in (*one, *other):
        if not run.before.same_probes(one[0].before):
            raise ValueError(f"{one[0].name} and {run.name} were probed with different entries")
    columns = [
        np.stack([getattr(r, n).entries(setting, kind) for r in runs])
        for runs in (one, other)
        for n in ("before", "after")
    ]

    def difference_of_a(before: Any, after: Any, other_before: Any, other_after: Any) -> Any:
        return percent_change(other_before, other_after) - percent_change(before, after)

    def difference_of_k(before: Any, after: Any, other_before: Any, other_after: Any) -> Any:
        return other_after - after

    sizes = strata(one[0], setting, kind)
    return {
        "A": bootstrap(columns, difference_of_a, sizes),
        "K_after": bootstrap(columns, difference_of_k, sizes),
    }


def compare_forgotten(one: Sequence[Run], other: Sequence[Run]) -> Estimate | None:
    """F of `other` minus F of `one`, in points, paired over tasks; None where a run has not all of them."""
    first, second = _accuracies(one), _accuracies(other)
    if first is None or second is None:
        return None
    return bootstrap([*first, *second], lambda a, b, c, d: _lost(c, d) - _lost(a, b))


def compare_loss_rise(one: Sequence[Run], other: Sequence[Run], label: str) -> Estimate:
    """`other` minus `one`: rise of a held-out loss in points, paired over instances."""
    columns = [
        np.stack([getattr(r, n)[label] for r in runs])
        for runs in (one, other)
        for n in ("losses_before", "losses_after")
    ]
    return bootstrap(columns, lambda a, b, c, d: percent_change(c, d) - percent_change(a, b))


def compare_loss_after(one: Sequence[Run], other: Sequence[Run], label: str) -> Estimate:
    """Held-out loss after training, `other` minus `one`, in percent of the loss from which `one` started; paired over
    instances. Unlike the rise of each from its own start, it does not favour a start that an edit made worse."""
    columns = [
        np.stack([values[label] for values in group])
        for group in (
            [r.losses_before for r in one],
            [r.losses_after for r in one],
            [r.losses_after for r in other],
        )
    ]
    return bootstrap(columns, lambda before, after, other_after: 100 * (other_after - after) / before)
