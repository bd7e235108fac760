"""What an injection brings and how long it stays (Chang et al., arXiv 2406.11813), from probes scored along a run.

l(q, n) is the log-probability of probe q's target span with the weights after n optimizer steps, s_1 < ... < s_N the
steps whose batch held a text of its entry, w the window.

    t_LAM(q, i) = argmax of l(q, n) over the tables with s_i <= n < s_i + w, before the entry's next injection
    E(q, i)     = l(q, t_LAM(q, i)) - l(q, newest table before s_i)                        effectivity
    R(q, t)     = (l(q, t_LAM(q, N) + t) - l(q, t_pre)) / (l(q, t_LAM(q, N)) - l(q, t_pre))     retainability
    a           = minus the slope of the mean R against log10 t: positive where knowledge decays

t_pre is the newest table before s_1. A table before an injection counts if it is at most w steps older, and not from
before the previous injection. Of equal maxima the first one is taken.

A maximum over w noisy values lies above the value that it would have without noise: E is biased upwards, by about as
many standard deviations of the noise as the largest of w draws has (2.2 for 50 independent ones), most of all where
little is acquired, and the more the more tables there are. For the same reason R falls at once below 1. Runs are
compared fairly where they were probed at the same steps. A window that reaches beyond the newest table has the maximum
of what is there, which may yet rise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analysis.estimates import Estimate, Values, bands, bootstrap, finite, quantiles, ratio
from analysis.probes import Integers, ProbeSeries
from analysis.runs import Entry
from olmo.knowledge.entries import KINDS, SETTINGS

FEW = 20  # values of which quartiles tell little


@dataclass(frozen=True)
class Options:
    """How to measure."""

    window: int = 50  # steps from an injection in which the maximum is sought, and before it a table
    outlier_factor: float = 1.5  # values so many interquartile ranges outside the quartiles are left out; 0: none is
    fit_range: tuple[int, float] = (1, math.inf)  # steps after the maximum, both included, of which the decay is fitted


@dataclass(frozen=True)
class Dynamics:
    """E and R of every probe; NaN where they could not be measured."""

    probes: ProbeSeries
    options: Options
    effectivity: Values  # (N, Q): row i - 1 belongs to the i-th injection of the probe's entry
    times: Integers  # (T',) steps t >= 1 after the maximum, ascending
    retainability: Values  # (T', Q)
    injected: NDArray[np.bool_]  # (Q,) whether the probe's entry was injected at all
    acquired: Values  # (Q,) the denominator of R, NaN where unknown
    coverage: dict[str, int]  # how many pairs of a probe and an injection could be measured, and how well


def measure(probes: ProbeSeries, encounters: Mapping[Entry, Sequence[int]], options: Options) -> Dynamics:
    """E and R of all probes, outliers among them. Injections later than the newest table are yet to be measured."""
    steps, values, window = probes.steps, probes.values, options.window
    newest = int(steps[-1])
    schedules: dict[tuple[int, ...], list[int]] = {}  # injection steps -> probes
    for column, entry in enumerate(zip(probes.settings.tolist(), probes.entries.tolist())):
        schedule = tuple(step for step in encounters.get(entry, ()) if step <= newest)
        if schedule:
            schedules.setdefault(schedule, []).append(column)
    count = len(probes.entries)
    effectivity = np.full((max(map(len, schedules), default=0), count), np.nan)
    base, peak, peak_step = np.full(count, np.nan), np.full(count, np.nan), np.zeros(count, dtype=np.int64)
    coverage = dict.fromkeys(("pairs", "measured", "no_table_before", "just_before", "no_table_after", "cut_short"), 0)
    coverage["tables"] = 0  # in the windows of all pairs
    for schedule, columns in schedules.items():
        for number, step in enumerate(schedule):
            previous = schedule[number - 1] if number else -1
            following = schedule[number + 1] if number + 1 < len(schedule) else step + window
            before_step, before = _newest(steps, values, columns, max(step - window, previous), step)
            end = min(step + window, following)
            maximum_step, maximum, tables = _highest(steps, values, columns, step, end)
            effectivity[number, columns] = maximum - before
            if number == 0:
                base[columns] = before
            coverage["pairs"] += len(columns)
            both = ~np.isnan(maximum - before)
            coverage["measured"] += int(both.sum())
            coverage["no_table_before"] += int(np.isnan(before).sum())
            coverage["just_before"] += int((both & (before_step == step - 1)).sum())
            coverage["no_table_after"] += int(np.isnan(maximum).sum())
            coverage["cut_short"] += len(columns) if end - 1 > newest else 0
            coverage["tables"] += tables
        peak[columns], peak_step[columns] = maximum, maximum_step
    acquired = peak - base
    # Where nothing was acquired, there is nothing of which a share could be retained.
    [some] = np.nonzero(acquired > 0)
    since = steps[:, None] - peak_step[some]
    rows, which = np.nonzero((since >= 1) & ~np.isnan(values[:, some]))
    times, places = np.unique(since[rows, which], return_inverse=True)
    chosen = some[which]
    retainability = np.full((len(times), count), np.nan)
    retainability[places, chosen] = (values[rows, chosen] - base[chosen]) / acquired[chosen]
    injected = np.zeros(count, dtype=bool)
    injected[[column for columns in schedules.values() for column in columns]] = True
    return Dynamics(probes, options, effectivity, times, retainability, injected, acquired, coverage)


def _newest(steps: Integers, values: Values, columns: list[int], start: int, end: int) -> tuple[Integers, Values]:
    """(step, value) of each probe in its newest table with start <= step < end; -1 and NaN where there is none."""
    rows = slice(*np.searchsorted(steps, (start, end)))
    part = values[rows][:, columns]
    if not len(part):
        return np.full(len(columns), -1), np.full(len(columns), np.nan)
    place = len(part) - 1 - (~np.isnan(part))[::-1].argmax(axis=0)
    found = part[place, np.arange(len(columns))]
    return np.where(np.isnan(found), -1, steps[rows][place]), found


def _highest(steps: Integers, values: Values, columns: list[int], start: int, end: int) -> tuple[Integers, Values, int]:
    """(step, value) of each probe's first maximum in the tables with start <= step < end, NaN where there is none; and
    the number of values looked at."""
    rows = slice(*np.searchsorted(steps, (start, end)))
    part = values[rows][:, columns]
    if not len(part):
        return np.full(len(columns), -1), np.full(len(columns), np.nan), 0
    known = ~np.isnan(part)
    place = np.where(known, part, -np.inf).argmax(axis=0)
    return steps[rows][place], part[place, np.arange(len(columns))], int(known.sum())


# --- outliers ----------------------------------------------------------------------------------------------------


def without_outliers(values: Values, factor: float) -> Values:
    """Values (rows, n) with NaN for those that lie more than `factor` interquartile ranges outside the quartiles of
    their row (linear interpolation, NaN aside); unchanged for a factor of 0."""
    if not factor or not values.size:
        return values
    first, third = (quartile[:, None] for quartile in quantiles(values, (0.25, 0.75)))
    # Values that are equal but for rounding are no outliers of each other.
    room = factor * (third - first) + 1e-12 * (np.abs(first) + np.abs(third))
    with np.errstate(invalid="ignore"):
        return np.where((values >= first - room) & (values <= third + room), values, np.nan)


def clean(dynamics: Dynamics) -> Dynamics:
    """Without outliers: of E among the probes of a setting and kind at the same number of injections, of R at the
    same time. Times at which fewer than `FEW` probes have a value are judged together with the next ones."""
    effectivity, retainability = dynamics.effectivity.copy(), dynamics.retainability.copy()
    factor = dynamics.options.outlier_factor
    for setting in SETTINGS:
        for kind in KINDS:
            [columns] = np.nonzero((dynamics.probes.settings == setting) & (dynamics.probes.kinds == kind))
            effectivity[:, columns] = without_outliers(effectivity[:, columns], factor)
            part = retainability[:, columns]
            for rows in _together((~np.isnan(part)).sum(axis=1).tolist()):
                part[rows] = without_outliers(part[rows].reshape(1, -1), factor).reshape(part[rows].shape)
            retainability[:, columns] = part
    return replace(dynamics, effectivity=effectivity, retainability=retainability)


def _together(counts: Sequence[int]) -> Iterator[slice]:
    """Slices of rows, as few in each as hold at least `FEW` values; what is left at the end joins the last."""
    start, number, found = 0, 0, []
    for row, count in enumerate(counts):
        number += count
        if number >= FEW:
            found.append((start, row + 1))
            start, number = row + 1, 0
    if start < len(counts):
        found[-1:] = [(found[-1][0] if found else 0, len(counts))]
    return (slice(*ends) for ends in found)


# --- groups of probes --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """Some probes of a run by entry, without outliers: what bootstrap over the n entries of their settings needs."""

    columns: Integers  # (Q',) which probes
    member: Values  # (Q', n) 1 where a probe belongs to an entry
    strata: list[int]  # entries of each setting


def groups(probes: ProbeSeries) -> dict[str, Group]:
    """Everything as `all`, each setting, and each setting and kind of probe."""
    settings = [s for s in SETTINGS if s in probes.settings]
    asked = [(None, None), *((s, None) for s in settings), *((s, k) for s in settings for k in KINDS)]
    found = {}
    for setting, kind in asked:
        of_setting = (probes.settings == setting) if setting else np.ones(len(probes.settings), dtype=bool)
        names = list(dict.fromkeys(zip(probes.settings[of_setting].tolist(), probes.entries[of_setting].tolist())))
        [columns] = np.nonzero(of_setting & (probes.kinds == kind) if kind else of_setting)
        if len(columns):
            place = {name: number for number, name in enumerate(names)}
            member = np.zeros((len(columns), len(names)))
            for row, column in enumerate(columns):
                member[row, place[str(probes.settings[column]), int(probes.entries[column])]] = 1
            strata = [sum(name[0] == s for name in names) for s in ([setting] if setting else settings)]
            found["_".join(filter(None, (setting, kind))) or "all"] = Group(columns, member, strata)
    return found


def _sums(values: Values, group: Group) -> tuple[Values, Values]:
    """(sums, counts), each (n, rows), of the entries' values (rows, Q) in the group, NaN aside."""
    part = values[:, group.columns]
    known = ~np.isnan(part)
    return (np.where(known, part, 0) @ group.member).T, (known.astype(np.float64) @ group.member).T


def _effectivity_columns(dynamics: Dynamics, group: Group) -> list[Values]:
    """Of each entry, (1, n): number and sum of its E."""
    total, count = _sums(dynamics.effectivity, group)
    return [count.sum(axis=1)[None], total.sum(axis=1)[None]]


def _decay_columns(dynamics: Dynamics, group: Group) -> list[Values]:
    """Of each entry, (1, n): number of its R in the range of the fit, and sums of x = log10 t, y = R, x x and x y."""
    low, high = dynamics.options.fit_range
    chosen = (dynamics.times >= low) & (dynamics.times <= high)
    x = np.log10(dynamics.times[chosen])
    y, count = _sums(dynamics.retainability[chosen], group)
    return [part[None] for part in (count.sum(axis=1), count @ x, y.sum(axis=1), count @ x**2, y @ x)]


def _mean(count: Any, total: Any) -> Any:
    return ratio(total, count)


def _slope(count: Any, x: Any, y: Any, xx: Any, xy: Any) -> Any:
    """Slope of a least-squares line from sums (or means); NaN where all values lie at one time."""
    spread = ratio(xx, count) - ratio(x, count) ** 2
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(spread > 1e-12, (ratio(xy, count) - ratio(x, count) * ratio(y, count)) / spread, np.nan)


def _decay(*sums: Any) -> Any:
    return -_slope(*sums)


def _zero(count: Any, x: Any, y: Any, xx: Any, xy: Any) -> Any:
    """log10 of the time at which a line from sums is 0; infinite where it does not fall."""
    slope = _slope(count, x, y, xx, xy)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(slope >= 0, np.inf, ratio(x, count) - ratio(y, count) / slope)


def _estimate(columns: list[Values], statistic: Any, strata: Sequence[int]) -> Estimate | None:
    """None where nothing was measured: `columns` begin with numbers. Of a single entry the interval is not known."""
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

    A mean weighs as much as the number of probes that it is over, which differ where tables are sparse and where
    entries had their last injection at different steps; otherwise this is an ordinary least-squares fit.
    `standard_error` (of a) and `r_squared` are those of the fit to the means, as in the paper. Values of one probe at
    several times are not independent, so the interval, over entries, is the one to trust.
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
    """10 ** log10; None where that is unbounded, or no number of double precision."""
    return 10.0**log10 if log10 is not None and log10 < 300 else None


def summarise(dynamics: Dynamics) -> dict[str, Any]:
    """All of it, ready for JSON: means and fits without outliers, for each of `groups`."""
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
    """Mean over the group of each row of values (rows, Q) that has some, with pointwise intervals over entries."""
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


def compare(one: Dynamics, other: Dynamics) -> dict[str, dict[str, Any]]:
    """`other` minus `one`, paired over their entries: mean E, and a, of each group for which both are known."""
    first, second, found = clean(one), clean(other), {}
    of_other = groups(other.probes)
    for name, group in groups(one.probes).items():
        pairs = [
            (columns(first, group), columns(second, of_other[name]))
            for columns in (_effectivity_columns, _decay_columns)
        ]
        found[name] = {
            key: _difference(*pair, statistic, group.strata)
            for key, pair, statistic in zip(("effectivity", "a"), pairs, (_mean, _decay))
        }
    return found


def _difference(one: list[Values], other: list[Values], statistic: Any, strata: Sequence[int]) -> Any:
    def difference(*means: Any) -> Any:
        return statistic(*means[len(one) :]) - statistic(*means[: len(one)])

    found = bootstrap([*one, *other], difference, strata)
    return None if math.isnan(found.value) else found.as_json()
