"""Intervals: how often they hold the truth, what is drawn together, and what is left out."""

import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from analysis import estimates
from analysis.estimates import Estimate, bands, bootstrap, percent_change, quantiles, ratio


@pytest.fixture(autouse=True)
def _fewer_resamples(monkeypatch):
    monkeypatch.setattr(estimates, "RESAMPLES", 1000)


@pytest.mark.parametrize("statistic", ["mean", "A"])
def test_an_interval_holds_the_truth_as_often_as_it_says(statistic):
    """200 repetitions; of a binomial of 200 at 95 %, 88 to 99 % leaves out far less than one in a thousand."""
    generator, covered = np.random.default_rng(0), 0
    for _ in range(200):
        before = generator.normal(-6, 2, 80)
        after = before + generator.normal(1, 1, 80)
        if statistic == "mean":
            estimate, truth = bootstrap([before[None]], lambda mean: mean), -6.0
        else:
            estimate, truth = bootstrap([before[None], after[None]], percent_change), 100 / 6
        covered += estimate.low <= truth <= estimate.high
    assert 0.88 <= covered / 200 <= 0.99


def test_entries_are_drawn_within_their_setting():
    """Two settings far apart, without variation inside: nothing varies, unless the numbers of each were drawn."""
    values = np.array([[-1.0] * 20 + [-9.0] * 30])
    within = bootstrap([values], lambda mean: mean, [20, 30])
    assert within.low == pytest.approx(within.high) and within.value == pytest.approx(-5.8)
    free = bootstrap([values], lambda mean: mean)
    assert free.high - free.low > 1


def test_a_few_seeds_are_covered_as_often_as_the_interval_says():
    """What seeds share is not resampled; what they differ by has Student's t, so three seeds are wide enough."""
    generator = np.random.default_rng(5)
    hits = 0
    for _ in range(300):
        values = generator.normal(0.0, 1.0, (3, 1)) + generator.normal(0.0, 0.05, (3, 40))
        estimate = bootstrap([values], lambda mean: mean)
        hits += estimate.low <= 0.0 <= estimate.high
    assert 0.90 <= hits / 300 <= 0.99


def test_intervals_are_the_same_every_time():
    values = np.random.default_rng(0).normal(0, 1, 50)[None]
    once, again, other = (bootstrap([values], lambda mean: mean, seed=seed) for seed in (0, 0, 1))
    assert once == again != other


def test_resamples_come_in_blocks_where_there_are_many_values(monkeypatch):
    """Of 200,000 instances ten at a time: the interval is that of the mean, and no block is drawn twice."""
    monkeypatch.setattr(estimates, "RESAMPLES", 40)
    values = np.random.default_rng(0).normal(0, 1, 200_000)[None]
    seen = []
    bootstrap([values], lambda mean: seen.append(mean) or mean)
    drawn = np.concatenate([x for x in seen if np.ndim(x)])
    assert len(drawn) == len(set(drawn.tolist())) == 40
    assert drawn.std() == pytest.approx(1 / np.sqrt(200_000), rel=0.4)
    estimates._block.cache_clear()  # 16 MB each


@given(
    arrays.arrays(
        np.float64,
        st.tuples(st.integers(1, 4), st.integers(1, 12)),
        elements=st.one_of(st.floats(-1e3, 1e3), st.just(np.nan)),
    ),
    st.lists(st.floats(0, 1), min_size=1, max_size=3),
)
def test_quantiles_are_those_of_numpy(values, shares):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of rows that are all NaN
        wanted = np.nanquantile(values, shares, axis=1)
    np.testing.assert_allclose(quantiles(values, shares), wanted, rtol=1e-9, atol=1e-9)


def test_an_end_at_infinity_is_unknown():
    [low], [high] = quantiles(np.array([[0.0, 1.0, 2.0, np.inf, np.inf]]), (0.25, 0.975))
    assert low == 1.0 and not np.isfinite(high)


def test_draws_that_tell_nothing_are_left_out():
    """One of five entries has a value: a third of all draws hold none of it, the others always the same."""
    count, total = np.array([[0.0, 0, 1, 0, 0]]), np.array([[0.0, 0, 3, 0, 0]])
    found = bootstrap([count, total], lambda n, x: ratio(x, n))
    assert (found.value, found.low, found.high) == pytest.approx((3.0, 3.0, 3.0))


def test_bands_are_intervals_of_ratios_of_sums(monkeypatch):
    """Pointwise, over entries that have different numbers of values; against the bootstrap of each point alone."""
    monkeypatch.setattr(estimates, "BAND_RESAMPLES", 1000)
    generator = np.random.default_rng(0)
    counts = generator.integers(0, 6, (30, 4)).astype(float)
    totals = counts * generator.normal(2, 1, (30, 4))
    low, high = bands(totals, counts, [10, 20])
    for point in range(4):
        columns = [counts[None, :, point], totals[None, :, point]]
        one = bootstrap(columns, lambda n, x: ratio(x, n), [10, 20])
        assert (low[point], high[point]) == pytest.approx((one.low, one.high))


def test_json_has_no_nan_and_no_infinity():
    assert Estimate(1.0, np.nan, np.inf).as_json() == {"value": 1.0, "low": None, "high": None}
