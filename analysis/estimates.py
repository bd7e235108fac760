"""Numbers with 95 % intervals, on two levels: the entries (instances, tasks) that all seeds share, and the seeds.

A bootstrap resamples the entries, which gives the interval of a single run. Three to five seeds are too few to be
resampled: their part is Student's t, added in quadrature. `python -m tests.coverage` prints how often such intervals
contain the truth, beside those of simpler ones.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from olmo.memory import jackknife_error

RESAMPLES = 10_000
BAND_RESAMPLES = 1_000  # for the intervals of a curve, which are drawn, not printed
NORMAL = 1.959964  # the 97.5 % quantile of the normal distribution
# Those of Student's t with 1, 2, ... degrees of freedom.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval.

    repetitions: how often what it is about was repeated, such as pretrainings of a kind of model; 1 if the interval
    is only over entries of one run; None if seeds do not matter. per_run: the value of every run.
    """

    value: float
    low: float
    high: float
    repetitions: int | None = field(default=1, compare=False)
    per_run: tuple[float, ...] = field(default=(), compare=False)

    def as_json(self) -> dict[str, float | None]:
        """JSON has neither infinity nor NaN: unbounded or unknown numbers become null."""
        return {"value": finite(self.value), "low": finite(self.low), "high": finite(self.high)}


def finite(number: float) -> float | None:
    return float(number) if math.isfinite(number) else None


def percent_change(before: Any, after: Any) -> Any:
    """100 (after - before) / |before|, NaN where `before` is 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(before == 0, np.nan, 100 * (after - before) / np.abs(before))


def ratio(total: Any, count: Any) -> Any:
    """total / count, NaN where nothing was counted."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(count > 0, np.divide(total, count), np.nan)


def _draws(sizes: Sequence[int], resamples: int, seed: int) -> Iterator[Values]:
    """Blocks (resamples of the block, n) of how often each of n entries was drawn, within strata of these sizes."""
    block = max(1, 2_000_000 // sum(sizes))  # resamples at a time, to bound memory
    for start in range(0, resamples, block):
        yield _block(tuple(sizes), min(block, resamples - start), (seed, start))


@functools.lru_cache(maxsize=6)  # many estimates use the same draws, which take longer than the estimates
def _block(sizes: tuple[int, ...], number: int, seed: tuple[int, int]) -> Values:
    generator = np.random.default_rng(seed)
    drawn = [generator.multinomial(size, np.full(size, 1 / size), number) for size in sizes]
    found = np.concatenate(drawn, axis=1).astype(np.float64)
    found.setflags(write=False)
    return found


def bootstrap(
    columns: Sequence[Values],
    statistic: Callable[..., Any],
    strata: Sequence[int] = (),
    seed: int = 0,
    units: Sequence[int] = (),
) -> Estimate:
    """Estimate of a statistic of the means of `columns`, by resampling the entries that they share.

    columns: arrays (runs, n), all of one shape: values of the same n entries (or instances) under several
    conditions. Entries are drawn with replacement, within strata of the given sizes, the same draw for every
    condition and run. statistic: takes one mean a column (float64, vectorised); draws for which it is NaN are left
    out. units: the repetition that each run belongs to, such as its pretraining; by default each run is its own. With
    several repetitions the interval is about their population (`over_seeds`). Where every stratum has one entry,
    nothing can be drawn, and the interval is unknown (NaN).
    """
    of_runs = np.stack(columns)  # (conditions, runs, n)
    count = of_runs.shape[2]
    of_units = of_runs
    if units:
        of_units = np.stack([of_runs[:, np.equal(units, unit)].mean(axis=1) for unit in dict.fromkeys(units)], axis=1)
    over_units, repetitions = of_units.mean(axis=1), of_units.shape[1]
    sizes = list(strata) or [count]
    assert sum(sizes) == count
    found, of_each = [], []
    for drawn in _draws(sizes, RESAMPLES, seed):
        found.append(statistic(*(over_units @ (drawn / count).T)))
        if repetitions > 1:
            of_each.append(statistic(*(of_units @ (drawn / count).T)))
    low, high = (float(end[0]) if max(sizes) > 1 else math.nan for end in _ends(np.concatenate(found)[:, None]))
    value = float(statistic(*over_units.mean(axis=1)))
    per_run = tuple(float(statistic(*of_runs[:, run].mean(axis=1))) for run in range(of_runs.shape[1]))
    if repetitions == 1:
        return Estimate(value, low, high, 1, per_run)
    per_unit = np.array([statistic(*of_units[:, unit].mean(axis=1)) for unit in range(repetitions)])
    # What is left of each repetition's resampled values without what the draws do to all of them.
    of_each_drawn = np.concatenate(of_each, axis=1)
    with np.errstate(invalid="ignore"):
        apart = of_each_drawn - of_each_drawn.mean(axis=0)
    estimate = Estimate(value, low, high, repetitions, per_run)
    return over_seeds(estimate, per_unit, _variance(apart), count - len(sizes) + 1)


def bands(totals: Values, counts: Values, strata: Sequence[int]) -> list[Values]:
    """[low, high], each (points,): pointwise intervals of the means totals.sum(0) / counts.sum(0), both (n, points):
    the n entries' sums of values at each point, and how many values each sums. Entries are drawn as in `bootstrap`."""
    found = [ratio(drawn @ totals, drawn @ counts) for drawn in _draws(strata, BAND_RESAMPLES, 0)]
    return _ends(np.concatenate(found))


def quantiles(values: Values, shares: Sequence[float]) -> list[Values]:
    """Quantiles (rows,) of each row of values (rows, n), ignoring NaN, with linear interpolation; NaN where no value is
    left, or where a quantile is infinite."""
    ordered = np.sort(values, axis=1)  # NaN comes last
    last = np.maximum((~np.isnan(values)).sum(axis=1, keepdims=True) - 1, 0)
    found = []
    for share in shares:
        below = np.floor(share * last).astype(np.int64)
        low = np.take_along_axis(ordered, below, 1)
        high = np.take_along_axis(ordered, np.minimum(below + 1, last), 1)
        with np.errstate(invalid="ignore"):  # between two infinities
            found.append((low + (high - low) * (share * last - below))[:, 0])
    return found


def _ends(resampled: Values) -> list[Values]:
    """The two ends (points,) of 95 % intervals, from resampled values (resamples, points)."""
    return quantiles(resampled.T, (0.025, 0.975))


def _variance(apart: Values) -> float:
    """The variance that the entries add to a mean over seeds by what they do to each seed alone, from the deviations
    (seeds, resamples) of each seed's resampled values from their mean."""
    known = apart[:, np.isfinite(apart).all(axis=0)]
    return float(known.var(axis=1).sum()) / (len(apart) - 1) / len(apart) if known.size else 0.0


def over_seeds(estimate: Estimate, per_seed: Values, shared_twice: float, entries: int = 0) -> Estimate:
    """Add the uncertainty of a mean over few seeds to an interval over entries, in quadrature.

    per_seed: the estimate of every seed (seeds,), at least two. Their part is Student's t times the standard error of
    their mean. It contains what an entry does to one seed alone, and so does the interval over entries: the variance
    of that, `shared_twice`, is taken out of the latter. What remains is enlarged for a small number of resampled
    `entries`, as Student's t is.
    """
    seeds = len(per_seed)
    half = student(seeds - 1) * float(np.std(per_seed, ddof=1)) / math.sqrt(seeds)
    enlarged = 1.0 if entries < 2 else student(entries - 1) / NORMAL * math.sqrt(entries / (entries - 1))
    low, high = (
        estimate.value
        + side * math.hypot(math.sqrt(max((end - estimate.value) ** 2 - NORMAL**2 * shared_twice, 0)) * enlarged, half)
        for side, end in ((-1, estimate.low), (1, estimate.high))
    )
    return replace(estimate, low=low, high=high)


def jackknife(values: Sequence[float], left_out: Values, about: str = "model") -> Estimate:
    """A mean over the pretrainings of a kind of model, or the value of one checkpoint.

    values: one a seed. left_out (seeds, groups): the same without one group of instances at a time. The interval over
    instances is 1.96 standard errors of the jackknife, widened by the differences between seeds. All seeds were
    measured on the same instances, so a group is left out of all of them together: their errors do not average out.
    `about` a checkpoint, whose entropy depends on no seed of continual learning, one value is enough.
    """
    value, seeds = float(np.mean(values)), len(values)
    half = 1.96 * float(jackknife_error(left_out.mean(axis=0)))
    repetitions = None if about == "checkpoint" and seeds == 1 else seeds
    estimate = Estimate(value, value - half, value + half, repetitions, tuple(map(float, values)))
    if seeds == 1:
        return estimate
    errors = np.array([float(jackknife_error(of_seed)) for of_seed in left_out - left_out.mean(axis=0)])
    return over_seeds(estimate, np.array(values), float(np.square(errors).sum()) / (seeds - 1) / seeds)


def student(degrees: int) -> float:
    """The 97.5 % quantile of Student's t, to 0.1 %: tabulated up to 9 degrees of freedom, then expanded in their
    inverse (Abramowitz and Stegun, 26.7.5)."""
    if degrees <= len(STUDENT):
        return STUDENT[degrees - 1]
    z = NORMAL
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / degrees + second / degrees**2 + third / degrees**3
