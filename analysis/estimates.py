"""Numbers with 95 % intervals: percentile bootstrap over entries (instances, tasks), and Student's t over seeds."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
BAND_RESAMPLES = 1_000  # for the intervals of a curve, which are drawn, not printed
# 97.5 % quantiles of Student's t with 1, 2, ... degrees of freedom; beyond the last one they change little.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval."""

    value: float
    low: float
    high: float

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
    columns: Sequence[Values], statistic: Callable[..., Any], strata: Sequence[int] = (), seed: int = 0
) -> Estimate:
    """Estimate of a statistic of the means of `columns`, by resampling the entries that they share.

    columns: arrays (seeds, n), all of one shape: values of the same n entries (or instances) under several
    conditions. Entries are drawn with replacement, within strata of the given sizes, the same draw for every
    condition and seed. statistic: takes one mean a column (float64, vectorised); draws for which it is NaN are left
    out. With several seeds the interval is widened by the differences between them (`widen`). Where every stratum has
    one entry, nothing can be drawn, and the interval is unknown (NaN).
    """
    stacked = np.stack(columns)  # (conditions, seeds, n)
    over_seeds, count = stacked.mean(axis=1), stacked.shape[2]
    sizes = list(strata) or [count]
    assert sum(sizes) == count
    found = [statistic(*(over_seeds @ (drawn / count).T)) for drawn in _draws(sizes, RESAMPLES, seed)]
    low, high = (float(end[0]) if max(sizes) > 1 else math.nan for end in _ends(np.concatenate(found)[:, None]))
    estimate = Estimate(float(statistic(*over_seeds.mean(axis=1))), low, high)
    return widen(estimate, np.array([statistic(*stacked[:, s].mean(axis=1)) for s in range(stacked.shape[1])]))


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


def widen(estimate: Estimate, per_seed: Values) -> Estimate:
    """Add the uncertainty of a mean over few seeds to an interval, in quadrature.

    per_seed: the estimate of every seed (seeds,). Its part is Student's t with seeds - 1 degrees of freedom times the
    standard error of their mean; a single seed leaves the interval as it is.
    """
    seeds = len(per_seed)
    if seeds < 2:
        return estimate
    half = STUDENT[min(seeds - 2, len(STUDENT) - 1)] * float(np.std(per_seed, ddof=1)) / math.sqrt(seeds)
    below, above = math.hypot(estimate.value - estimate.low, half), math.hypot(estimate.high - estimate.value, half)
    return Estimate(estimate.value, estimate.value - below, estimate.value + above)
