"""What an injection brings and how long it stays (Chang et al., arXiv 2406.11813), from probes scored along a run.

l(q, n) is the log-probability of probe q's target span with the weights after n optimizer steps, s_1 < ... < s_N the
steps whose batch held a text of its entry, w the window. analysis/decay.py has the means and the fit over many probes.

    t_LAM(q, i) = argmax of l(q, n) over the tables with s_i <= n < s_i + w, before the entry's next injection
    E(q, i)     = l(q, t_LAM(q, i)) - l(q, s_i - 1)                                        effectivity
    R(q, t)     = (l(q, t_LAM(q, N) + t) - l(q, t_pre)) / (l(q, t_LAM(q, N)) - l(q, t_pre))     retainability
    a           = minus the slope of the mean R against log10 t: positive where knowledge decays

t_pre is s_1 - 1. An injection without a table of the step before has no probing window, and nothing is measured of it:
an older table differs also by what was trained between. Of equal maxima the first one is taken.

The maximum of w noisy values is higher than their mean: E is biased upwards, by about as many standard deviations of
the noise as the largest of w draws has (2.2 for 50 independent ones), most where little is acquired, and more with more
tables. For the same reason R falls below 1 at once. So runs should be compared where they were probed at the same
steps. A window that ends after the newest table has the maximum of the tables so far, which may still rise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analysis.choices import FLAGS
from analysis.estimates import Values, quantiles
from analysis.probes import Integers, ProbeSeries
from analysis.runs import Entry, probing_steps
from olmo.knowledge.entries import KINDS, SETTINGS

FEW = 20  # values; quartiles of fewer are unreliable


@dataclass(frozen=True)
class Options:
    """Settings of the measurement."""

    window: int = 50  # steps from an injection in which the maximum is sought
    outlier_factor: float = 1.5  # values so many interquartile ranges outside the quartiles are dropped; 0: none
    fit_range: tuple[int, float] = (1, math.inf)  # steps after the maximum, both included, of which the decay is fitted


def options(run: Path, given: Mapping[str, Any]) -> Options:
    """Those given, by name; the window is otherwise that in which a run was probed, if it has any."""
    steps = {"window": probing_steps(run) or Options.window}
    return Options(**{**steps, **{name: given[name] for name in FLAGS if given.get(name) is not None}})


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
    coverage: dict[str, int]  # how many pairs of probe and injection could be measured, and from which tables


def measure(probes: ProbeSeries, encounters: Mapping[Entry, Sequence[int]], options: Options) -> Dynamics:
    """E and R of all probes, outliers included. Injections after the newest table cannot be measured yet."""
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
    # Of pairs of probe and injection; `tables` are those in the windows of all pairs.
    coverage = dict.fromkeys(("pairs", "no_window", "measured", "no_table_after", "cut_short", "tables"), 0)
    for schedule, columns in schedules.items():
        for number, step in enumerate(schedule):
            following = schedule[number + 1] if number + 1 < len(schedule) else step + window
            end = min(step + window, following)
            _, before, _ = _best(steps, values, columns, step - 1, step)
            maximum_step, maximum, tables = _best(steps, values, columns, step, end)
            probed = ~np.isnan(before)
            maximum = np.where(probed, maximum, np.nan)
            effectivity[number, columns] = maximum - before
            if number == 0:
                base[columns] = before
            coverage["pairs"] += len(columns)
            coverage["no_window"] += int((~probed).sum())
            coverage["measured"] += int((~np.isnan(maximum)).sum())
            coverage["no_table_after"] += int((probed & np.isnan(maximum)).sum())
            coverage["cut_short"] += int(probed.sum()) if end - 1 > newest else 0
            coverage["tables"] += int(tables[probed].sum())
        peak[columns], peak_step[columns] = maximum, maximum_step
    acquired = peak - base
    # R is a share of what was acquired: undefined where nothing was.
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


def _best(
    steps: Integers, values: Values, columns: list[int], start: int, end: int
) -> tuple[Integers, Values, Integers]:
    """(step, value) of each probe's first maximum in the tables with start <= step < end, -1 and NaN where there is
    none; and how many of these tables have the probe."""
    rows = slice(*np.searchsorted(steps, (start, end)))
    part = values[rows][:, columns]
    if not len(part):
        return np.full(len(columns), -1), np.full(len(columns), np.nan), np.zeros(len(columns), dtype=np.int64)
    known = ~np.isnan(part)
    place = np.where(known, part, -np.inf).argmax(axis=0)
    found = part[place, np.arange(len(columns))]
    return np.where(np.isnan(found), -1, steps[rows][place]), found, known.sum(axis=0)


# --- outliers ---


def without_outliers(values: Values, factor: float) -> Values:
    """Values (rows, n) with NaN for those more than `factor` interquartile ranges outside the quartiles of their row
    (linear interpolation, ignoring NaN); unchanged for a factor of 0."""
    if not factor or not values.size:
        return values
    first, third = (quartile[:, None] for quartile in quantiles(values, (0.25, 0.75)))
    # Values that differ by rounding only are no outliers.
    room = factor * (third - first) + 1e-12 * (np.abs(first) + np.abs(third))
    with np.errstate(invalid="ignore"):
        return np.where((values >= first - room) & (values <= third + room), values, np.nan)


def clean(dynamics: Dynamics) -> Dynamics:
    """Without outliers: of E among the probes of a setting and kind at the same number of injections, of R at the
    same time. Times at which fewer than `FEW` probes have a value are pooled with the next ones."""
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
    """Slices of the fewest rows that hold at least `FEW` values each; rows left at the end join the last slice."""
    start, number, found = 0, 0, []
    for row, count in enumerate(counts):
        number += count
        if number >= FEW:
            found.append((start, row + 1))
            start, number = row + 1, 0
    if start < len(counts):
        found[-1:] = [(found[-1][0] if found else 0, len(counts))]
    return (slice(*ends) for ends in found)
