"""Means of effectivity and retainability over groups of probes, the fit of the decay, and differences of two runs.

All intervals are over entries, paired for differences. analysis/dynamics.py defines E, R and a.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from analysis.dynamics import Dynamics, clean
from analysis.estimates import Estimate, Values, bands, bootstrap, finite, ratio
from analysis.probes import Integers, ProbeSeries
from olmo.knowledge.entries import KINDS, SETTINGS


@dataclass(frozen=True)
class Group:
    """Some probes of a run, and the n entries of their settings, over which they are resampled."""

    columns: Integers  # (Q',) which probes
    member: Values  # (Q', n) 1 where a probe belongs to an entry
    strata: list[int]  # entries of each setting


def groups(probes: ProbeSeries) -> dict[str, Group]:
    """Everything as `all`, each setting, and each setting and kind of probe."""
    settings = [s for s in SETTINGS if s in probes.settings]
    asked = [(None, None), *((s, None) for s in settings), *((s, k) for s in settings for k in KINDS)]
    found = {}
    entries = list(zip(probes.settings.tolist(), probes.entries.tolist()))  # of each probe
    for setting, kind in asked:
        names = list(dict.fromkeys(entry for entry in entries if setting in (None, entry[0])))
        place = {name: number for number, name in enumerate(names)}
        [columns] = np.nonzero([e in place and kind in (None, k) for e, k in zip(entries, probes.kinds.tolist())])
        if len(columns):
            member = np.eye(len(names))[[place[entries[column]] for column in columns]]
            strata = [sum(name[0] == s for name in names) for s in ([setting] if setting else settings)]
            found["_".join(filter(None, (setting, kind))) or "all"] = Group(columns, member, strata)
    return found


def _sums(values: Values, group: Group) -> tuple[Values, Values]:
    """(sums, counts), each (n, rows), of the entries' values (rows, Q) in the group, ignoring NaN."""
    part = values[:, group.columns]
    known = ~np.isnan(part)
    return (np.where(known, part, 0) @ group.member).T, (known.astype(np.float64) @ group.member).T


def _effectivity_columns(dynamics: Dynamics, group: Group) -> list[Values]:
    """Number and sum of each entry's E, each (1, n)."""
    total, count = _sums(dynamics.effectivity, group)
    return [count.sum(axis=1)[None], total.sum(axis=1)[None]]


def _decay_columns(dynamics: Dynamics, group: Group) -> list[Values]:
    """Number of each entry's R in the range of the fit, and sums of x = log10 t, y = R, x x and x y, each (1, n)."""
    low, high = dynamics.options.fit_range
    chosen = (dynamics.times >= low) & (dynamics.times <= high)
    x = np.log10(dynamics.times[chosen])
    y, count = _sums(dynamics.retainability[chosen], group)
    return [part[None] for part in (count.sum(axis=1), count @ x, y.sum(axis=1), count @ x**2, y @ x)]


def _mean(count: Any, total: Any) -> Any:
    return ratio(total, count)


def _decay(count: Any, x: Any, y: Any, xx: Any, xy: Any) -> Any:
    """Minus the slope of a least-squares line, from sums (or means); NaN where all values are of one time."""
    spread = ratio(xx, count) - ratio(x, count) ** 2
    with np.errstate(invalid="ignore", divide="ignore"):
        return -np.where(spread > 1e-12, (ratio(xy, count) - ratio(x, count) * ratio(y, count)) / spread, np.nan)


def _zero(count: Any, x: Any, y: Any, xx: Any, xy: Any) -> Any:
    """log10 of the time at which a line from sums is 0; infinite where it does not fall."""
    slope = -_decay(count, x, y, xx, xy)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(slope >= 0, np.inf, ratio(x, count) - ratio(y, count) / slope)


def _estimate(columns: list[Values], statistic: Any, strata: Sequence[int]) -> Estimate | None:
    """None where nothing was measured (`columns` begin with counts). The interval of a single entry is unknown."""
    entries = int((columns[0] > 0).sum())
    if not entries:
        return None
    found = bootstrap(columns, statistic, strata)
    return found if entries > 1 else Estimate(found.value, math.nan, math.nan)


def effectivity(dynamics: Dynamics, group: Group) -> Estimate | None:
    """Mean of E over probes and injections, interval over entries."""
    return _estimate(_effectivity_columns(dynamics, group), _mean, group.strata)


def decay(dynamics: Dynamics, group: Group) -> dict[str, Any] | None:
    """The line through the means of R at each time, against log10 t; None where R is known at fewer than two times.

    Each mean is weighted by its number of probes. These differ where tables are sparse and where entries had their
    last injection at different steps; otherwise this is an ordinary least-squares fit. `standard_error` (of a) and
    `r_squared` are those of the fit to the means, as in the paper. Values of one probe at several times are not
    independent, so prefer the interval, which is over entries.
    """
    columns = _decay_columns(dynamics, group)
    total, counts = _sums(dynamics.retainability, group)
    low, high = dynamics.options.fit_range
    weight, y = counts.sum(axis=0), total.sum(axis=0)
    chosen = (dynamics.times >= low) & (dynamics.times <= high) & (weight > 0)
    weight, times, mean = weight[chosen], dynamics.times[chosen], y[chosen] / weight[chosen]
    if len(times) < 2:
        return None
    a = _estimate(columns, _decay, group.strata)
    zero = _estimate(columns, _zero, group.strata)
    assert a is not None and zero is not None
    x = np.log10(times)
    centre = np.average(x, weights=weight)
    intercept = np.average(mean, weights=weight) + a.value * centre
    squares = weight @ (mean - (intercept - a.value * x)) ** 2
    spread = weight @ (mean - np.average(mean, weights=weight)) ** 2
    across = weight @ (x - centre) ** 2
    ends = (int(times[0]), int(times[-1]))
    return {
        "a": a.as_json(),
        "standard_error": finite(math.sqrt(squares / (len(times) - 2) / across)) if len(times) > 2 else None,
        "r_squared": finite(1 - squares / spread) if spread > 0 else None,
        "intercept": float(intercept),
        "x_intercept_log10": zero.as_json(),
        "x_intercept": {name: _steps(value) for name, value in zero.as_json().items()},
        "times": len(times),
        "line": [[t, float(intercept - a.value * math.log10(t))] for t in ends],
    }


def _steps(log10: float | None) -> float | None:
    """10 ** log10; None where that is unbounded or exceeds double precision."""
    return 10.0**log10 if log10 is not None and log10 < 300 else None


def summarise(dynamics: Dynamics) -> dict[str, Any]:
    """Means and fits of each of `groups`, without outliers, ready for JSON."""
    cleaned, found = clean(dynamics), {}
    for name, group in groups(dynamics.probes).items():
        injected = dynamics.injected[group.columns]
        if not injected.any():
            continue
        mean = effectivity(cleaned, group)
        acquired = dynamics.acquired[group.columns]
        raw, kept = (
            [int((~np.isnan(values[:, group.columns])).sum()) for values in (d.effectivity, d.retainability)]
            for d in (dynamics, cleaned)
        )
        found[name] = {
            "probes": int(injected.sum()),
            "effectivity": None if mean is None else mean.as_json(),
            "effectivity_by_injection": _curve(cleaned.effectivity, group, 1 + np.arange(len(cleaned.effectivity))),
            "outliers": {"effectivity": raw[0] - kept[0], "retainability": raw[1] - kept[1]},
            "nothing_acquired": int((acquired <= 0).sum()),
            "not_known": int((np.isnan(acquired) & injected).sum()),
            "retainability": _curve(cleaned.retainability, group, cleaned.times),
            "decay": decay(cleaned, group),
        }
    low, high = dynamics.options.fit_range
    return {
        "window": dynamics.options.window,
        "outlier_factor": dynamics.options.outlier_factor,
        "fit_range": [low, finite(high)],
        "coverage": dynamics.coverage,
        "groups": found,
    }


def _curve(values: Values, group: Group, at: Integers) -> dict[str, list]:
    """Mean over the group of each row of values (rows, Q) that has any, with pointwise intervals over entries."""
    totals, counts = _sums(values, group)
    some = counts.sum(axis=0) > 0
    totals, counts = totals[:, some], counts[:, some]
    low, high = bands(totals, counts, group.strata)
    return {
        "at": at[some].tolist(),
        "mean": (totals.sum(axis=0) / counts.sum(axis=0)).tolist(),
        "low": [finite(end) for end in low],
        "high": [finite(end) for end in high],
        "values": counts.sum(axis=0).astype(int).tolist(),
    }


def _of_seeds(columns: Callable[..., list[Values]], runs: Sequence[Dynamics], group: Group) -> list[Values]:
    """`columns` of runs that differ in their seed only: arrays (seeds, n)."""
    return [np.concatenate(of_seeds) for of_seeds in zip(*(columns(run, group) for run in runs))]


def pool(runs: Sequence[Dynamics]) -> Dynamics:
    """Runs that have the same probes and differ in their seed only, as one: its probes are those of all runs side by
    side, further probes of the same entries, so that intervals are over entries."""
    first, times = runs[0].probes, np.unique(np.concatenate([run.times for run in runs]))
    number, count = len(runs), len(first.entries)
    settings, entries = np.tile(first.settings, number), np.tile(first.entries, number)
    effectivity = np.full((max(len(run.effectivity) for run in runs), number * count), np.nan)
    retainability = np.full((len(times), number * count), np.nan)
    for place, run in enumerate(runs):
        columns = slice(place * count, (place + 1) * count)
        effectivity[: len(run.effectivity), columns] = run.effectivity
        retainability[np.searchsorted(times, run.times), columns] = run.retainability
    return Dynamics(
        ProbeSeries(first.steps[:0], settings, entries, np.tile(first.kinds, number), np.zeros((0, number * count))),
        runs[0].options,
        effectivity,
        times,
        retainability,
        np.concatenate([run.injected for run in runs]),
        np.concatenate([run.acquired for run in runs]),
        {name: sum(run.coverage[name] for run in runs) for name in runs[0].coverage},
    )


def summarise_seeds(runs: Sequence[Dynamics]) -> dict[str, Any]:
    """As `summarise`, of runs that have the same probes and differ in their seed only: curves and fits of their
    `pool`, E and a with intervals over entries and seeds."""
    if len(runs) == 1:
        return summarise(runs[0])
    found, of_seeds = summarise(pool(runs)), over_seeds(runs)
    for name, group in found["groups"].items():
        group["effectivity"] = of_seeds[name]["effectivity"]
        if group["decay"] is not None and of_seeds[name]["decay"] is not None:
            group["decay"]["a"] = of_seeds[name]["decay"]["a"]
    return found


def over_seeds(runs: Sequence[Dynamics]) -> dict[str, dict[str, Any]]:
    """E and a of each group, over runs that have the same probes and differ in their seed only, with intervals over
    entries and seeds; shaped as `summarise` shapes those of one run."""
    cleaned, found = [clean(run) for run in runs], {}
    for name, group in groups(runs[0].probes).items():
        e = _estimate(_of_seeds(_effectivity_columns, cleaned, group), _mean, group.strata)
        a = _estimate(_of_seeds(_decay_columns, cleaned, group), _decay, group.strata)
        known = a is not None and math.isfinite(a.value)
        found[name] = {
            "effectivity": None if e is None else e.as_json(),
            "decay": {"a": a.as_json()} if a is not None and known else None,
        }
    return found


def compare(one: Sequence[Dynamics], other: Sequence[Dynamics]) -> dict[str, dict[str, Any]]:
    """`other` minus `one`, each the runs of one condition, paired over their entries and seeds: mean E, and a, of each
    group for which both are known."""
    first, second, of_other = [clean(run) for run in one], [clean(run) for run in other], groups(other[0].probes)
    measures = {"effectivity": (_effectivity_columns, _mean), "a": (_decay_columns, _decay)}
    return {
        name: {
            key: _difference(
                _of_seeds(columns, first, group), _of_seeds(columns, second, of_other[name]), statistic, group.strata
            )
            for key, (columns, statistic) in measures.items()
        }
        for name, group in groups(one[0].probes).items()
    }


def _difference(one: list[Values], other: list[Values], statistic: Any, strata: Sequence[int]) -> Any:
    def difference(*means: Any) -> Any:
        return statistic(*means[len(one) :]) - statistic(*means[: len(one)])

    found = bootstrap([*one, *other], difference, strata)
    return None if math.isnan(found.value) else found.as_json()
