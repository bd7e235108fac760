"""Means and fits over groups of probes: answers that were put in, outliers, intervals, differences of two runs."""

import itertools
import math
from collections import defaultdict

import numpy as np
import pytest

from analysis import decay, estimates
from analysis.decay import summarise
from analysis.dynamics import Options, clean, measure
from analysis.probes import read_probes
from analysis.runs import read_encounters
from tests.probe_series import decaying, loops, series
from tests.run_folders import KINDS, probe_table, write_injections, write_run

KEEP_ALL = Options(outlier_factor=0)


@pytest.fixture(autouse=True, scope="module")
def _fewer_resamples():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(estimates, "RESAMPLES", 500)
        patch.setattr(estimates, "BAND_RESAMPLES", 50)
        yield


def test_outliers_of_e_are_sought_by_setting_kind_and_injection(tmp_path):
    """What would stand out among all does not among its like, and the other way round."""
    levels = {"paraphrase": np.zeros(12), "once": np.zeros(12)}
    step0 = probe_table(levels, per_kind=1)
    gain = {"memorization": 5.0, "semantic": 1.0, "composition": 0.1}
    up = step0.kind.map(gain) * np.where(step0.setting == "once", 3.0, 1.0)
    up = up + 0.01 * np.random.default_rng(0).uniform(-1, 1, len(up))
    planted = (step0.setting == "paraphrase") & (step0.kind == "composition") & (step0.entry == 4)
    up[planted] = 1.0  # as any semantic probe
    tables = {0: step0, 1: step0.assign(mean_log_prob=up), 2: step0.assign(mean_log_prob=3 * up)}
    folder = write_run(tmp_path / "run", tables)
    write_injections(folder, {s: [f"{k}/{n}" for k in levels for n in range(12)] for s in (1, 2)})
    found = summarise(measure(read_probes(folder), read_encounters(folder), Options()))["groups"]
    assert {name: group["outliers"]["effectivity"] for name, group in found.items() if "_" in name} == {
        f"{s}_{k}": 2 if (s, k) == ("paraphrase", "composition") else 0 for s in levels for k in KINDS
    }
    kept = up[(step0.setting == "paraphrase") & (step0.kind == "composition") & ~planted]
    mean = found["paraphrase_composition"]["effectivity"]["value"]
    assert mean == pytest.approx((kept.sum() + 2 * kept.sum()) / 22)


def test_outliers_of_r_are_removed_before_means_and_fits():
    """Forty probes that decay alike, and three whose small gain makes ratios of any size."""
    steps = [0, 1, *range(2, 60)]
    t = np.array([max(s - 1, 1) for s in steps], dtype=float)
    level = np.where(np.array(steps) < 1, 0.0, 1 - 0.2 * np.log10(t))
    values = np.repeat(level[:, None], 43, axis=1)
    values[2:, 40:] = [[50.0, -70.0, 30.0]] * 58
    values[1, 40:] = 100.0
    values[2:, 41] -= 10 * np.arange(58)
    encounters = {("once", entry): [1] for entry in range(43)}
    options = Options(window=1)
    found = summarise(measure(series(steps, values), encounters, options))["groups"]["all"]
    assert found["decay"]["a"]["value"] == pytest.approx(0.2)
    assert found["retainability"]["values"] == [40] * 58
    assert found["outliers"]["retainability"] == 3 * 58
    everything = summarise(measure(series(steps, values), encounters, Options(window=1, outlier_factor=0)))
    assert everything["groups"]["all"]["decay"]["a"]["value"] != pytest.approx(0.2, abs=0.01)


@pytest.mark.parametrize("peak", [0, 7])
@pytest.mark.parametrize("slope", [0.25, 0.05])
def test_a_decay_that_is_linear_in_log_t_is_found_exactly(slope, peak):
    gains = [0.5, 1.0, 3.0, 2.0]
    steps, values = decaying(gains, slope, 0.9, peak=peak)
    found = summarise(measure(series(steps, values), {("once", e): [10] for e in range(4)}, Options()))["groups"]["all"]
    fit = found["decay"]
    assert found["effectivity"]["value"] == pytest.approx(np.mean(gains))
    assert fit["a"] == pytest.approx({"value": slope, "low": slope, "high": slope})
    assert fit["intercept"] == pytest.approx(0.9)
    assert fit["r_squared"] == pytest.approx(1.0) and fit["standard_error"] == pytest.approx(0.0, abs=1e-9)
    assert fit["x_intercept_log10"]["value"] == pytest.approx(0.9 / slope)
    assert fit["x_intercept"]["value"] == pytest.approx(10 ** (0.9 / slope), rel=1e-9)
    last = 400 - 10 - peak
    assert fit["times"] == last
    ends = [(1, 0.9), (last, 0.9 - slope * math.log10(last))]
    assert [tuple(end) for end in fit["line"]] == pytest.approx([pytest.approx(end) for end in ends])
    assert found["retainability"]["at"] == list(range(1, last + 1))
    assert found["retainability"]["mean"][9] == pytest.approx(0.9 - slope)


def test_the_fit_is_that_of_the_usual_formulas():
    """Of the means at each time, all of as many probes: numpy's polyfit, and the textbook's standard error and R^2."""
    generator = np.random.default_rng(2)
    steps, values = decaying(generator.uniform(1, 2, 30), 0.2)
    values = values + generator.normal(0, 0.05, values.shape)
    values[10] += 0.5  # the maximum, of each probe
    fit_range = (3, 200)
    options = Options(outlier_factor=0, fit_range=fit_range)
    probes, encounters = series(steps, values, per_entry=3), {("once", e): [10] for e in range(10)}
    found = summarise(measure(probes, encounters, options))["groups"]["once"]
    t = np.arange(3, 201)
    r = (values[10 + t] - values[9]) / (values[10] - values[9])
    mean, x = r.mean(axis=1), np.log10(t)
    (slope, intercept), covariance = np.polyfit(x, mean, 1, cov=True)
    residual = mean - (slope * x + intercept)
    fit = found["decay"]
    assert fit["a"]["value"] == pytest.approx(-slope)
    assert fit["intercept"] == pytest.approx(intercept)
    assert fit["standard_error"] == pytest.approx(math.sqrt(covariance[0, 0]))
    assert fit["r_squared"] == pytest.approx(1 - (residual**2).sum() / ((mean - mean.mean()) ** 2).sum())
    assert fit["x_intercept_log10"]["value"] == pytest.approx(-intercept / slope)
    assert fit["x_intercept"]["value"] == pytest.approx(10 ** (-intercept / slope))
    assert fit["times"] == 198
    # The interval of a: entries drawn with replacement, the fit made anew.
    slopes = []
    for _ in range(500):
        drawn = (3 * generator.integers(0, 10, 10)[:, None] + np.arange(3)).ravel()
        slopes.append(-np.polyfit(x, r[:, drawn].mean(axis=1), 1)[0])
    low, high = np.quantile(slopes, [0.025, 0.975])
    assert (fit["a"]["low"], fit["a"]["high"]) == pytest.approx((low, high), abs=0.15 * (high - low))


def test_a_mean_weighs_as_much_as_it_has_values():
    """Half of the probes are injected late and have few times: the line is that through all values alike."""
    generator = np.random.default_rng(3)
    values = generator.normal(0, 0.3, (301, 20)).cumsum(axis=0) * 0.02
    values[10:, :10] += 3.0
    values[250:, 10:] += 3.0
    encounters = {("once", e): [10 if e < 10 else 250] for e in range(20)}
    found = measure(series(range(301), values), encounters, Options(window=1, outlier_factor=0))
    _, shares = loops(found.probes, encounters, 1)
    x, y = [math.log10(t) for _, t in shares], list(shares.values())
    slope, intercept = np.polyfit(x, y, 1)
    fit = summarise(found)["groups"]["all"]["decay"]
    assert (fit["a"]["value"], fit["intercept"]) == pytest.approx((-slope, intercept))
    # Standard error and R^2 are of the weighted means.
    by_time = defaultdict(list)
    for (_, t), share in shares.items():
        by_time[t].append(share)
    x, y, w = (np.array(c) for c in zip(*((math.log10(t), np.mean(v), len(v)) for t, v in by_time.items())))
    _, covariance = np.polyfit(x, y, 1, w=np.sqrt(w), cov=True)
    assert fit["standard_error"] == pytest.approx(math.sqrt(covariance[0, 0]))
    off, around = (w * (y - intercept - slope * x) ** 2).sum(), (w * (y - np.average(y, weights=w)) ** 2).sum()
    assert fit["r_squared"] == pytest.approx(1 - off / around)


def test_entries_injected_once_and_twice_in_one_run():
    """E of each injection apart; R counts from the maximum after the last one and from before the first one."""
    steps = np.arange(40)
    once = np.where(steps < 10, -5.0, -4.0)
    twice = np.select(
        [steps < 10, steps < 15, steps < 20, steps < 22, steps < 30], [-5.0, -4.0, -4.5, -2.5, -2.0], -3.0
    )
    encounters = {("once", 0): [10], ("once", 1): [10, 20]}
    found = measure(series(steps, np.stack((once, twice), axis=1)), encounters, KEEP_ALL)
    assert found.effectivity.tolist() == [[1.0, 1.0], [pytest.approx(np.nan, nan_ok=True), 2.5]]
    at = {int(t): row for t, row in zip(found.times, found.retainability)}
    assert at[1].tolist() == [1.0, 1.0]  # the maximum of the second is at step 22
    assert at[8].tolist() == [1.0, pytest.approx(2 / 3)]
    assert at[17].tolist() == [1.0, pytest.approx(2 / 3)]
    assert np.isnan(at[18][1]) and at[29][0] == 1.0
    group = summarise(found)["groups"]["once"]
    assert group["effectivity"]["value"] == pytest.approx(4.5 / 3)
    assert (group["effectivity_by_injection"]["at"], group["effectivity_by_injection"]["mean"]) == ([1, 2], [1.0, 2.5])
    assert group["effectivity_by_injection"]["values"] == [2, 1]


def test_probes_that_acquired_nothing_have_no_retainability():
    values = np.array([[-5.0, -5.0, -5.0], [-4.0, -5.0, -6.0], [-4.5, -5.0, -5.5]])
    found = measure(series(range(3), values), {("once", e): [1] for e in range(3)}, KEEP_ALL)
    assert found.retainability.shape == (1, 3)
    assert found.retainability[0, 0] == 0.5 and np.isnan(found.retainability[0, 1:]).all()
    assert found.effectivity[0].tolist() == [1.0, 0.0, -0.5]
    group = summarise(found)["groups"]["all"]
    assert (group["nothing_acquired"], group["not_known"], group["probes"]) == (2, 0, 3)


def test_a_run_without_injections_is_measured_to_nothing():
    found = measure(series(range(3), np.zeros((3, 2))), {}, Options())
    assert not found.injected.any() and found.effectivity.shape == (0, 2) and found.retainability.shape == (0, 2)
    assert clean(found).times.size == 0
    assert summarise(found)["groups"] == {}


def test_knowledge_that_does_not_fade_never_reaches_zero():
    steps, values = decaying([1.0, 2.0, 1.5], -0.1, 0.2)
    found = summarise(measure(series(steps, values), {("once", e): [10] for e in range(3)}, Options(window=1)))
    fit = found["groups"]["all"]["decay"]
    assert fit["a"]["value"] == pytest.approx(-0.1)
    assert fit["x_intercept"] == {"value": None, "low": None, "high": None}


def test_the_interval_of_e_holds_the_truth_as_often_as_it_says():
    """Entries differ, and so do their probes, less; without noise in time E is the gain. 200 repetitions."""
    generator, covered = np.random.default_rng(0), 0
    steps = [0, 1]
    encounters = {("once", e): [1] for e in range(40)}
    for _ in range(200):
        gains = (generator.normal(1.0, 0.5, (40, 1)) + generator.normal(0, 0.3, (40, 4))).ravel()
        probes = series(steps, np.stack((np.full(160, -6.0), gains - 6)), per_entry=4)
        found = measure(probes, encounters, KEEP_ALL)
        estimate = decay.effectivity(found, decay.groups(probes)["once"])
        covered += estimate.low <= 1.0 <= estimate.high
    assert 0.88 <= covered / 200 <= 0.99


def test_the_interval_of_a_holds_the_truth_as_often_as_it_says():
    """Every entry has a slope of its own. The standard error of the fit, of the same means, would be far too small."""
    generator, covered, fitted = np.random.default_rng(1), 0, 0
    steps = np.array([0, 1, *np.unique(np.logspace(0, 3, 25).astype(int)) + 1])
    x = np.log10(np.maximum(steps - 1, 1))[:, None]
    encounters = {("once", e): [1] for e in range(40)}
    for _ in range(200):
        slopes = generator.normal(0.2, 0.05, 40)
        values = np.where(steps[:, None] < 1, 0.0, 1 - slopes * x)
        probes = series(steps, values)
        found = measure(probes, encounters, Options(window=1, outlier_factor=0))
        fit = decay.decay(found, decay.groups(probes)["once"])
        covered += fit["a"]["low"] <= 0.2 <= fit["a"]["high"]
        fitted += abs(fit["a"]["value"] - 0.2) < 1.96 * fit["standard_error"]
    assert 0.88 <= covered / 200 <= 0.99
    assert fitted < 20


def test_differences_of_two_runs_are_paired_over_entries():
    """Entries differ much, runs little."""
    generator = np.random.default_rng(4)
    gains = generator.uniform(0.5, 5, 30)
    encounters = {("once", e): [10] for e in range(30)}
    one, other = (
        measure(series(*decaying(gains + more, slope)), encounters, KEEP_ALL) for more, slope in ((0, 0.2), (0.1, 0.25))
    )
    found = decay.compare([one], [other])["once"]
    assert found["effectivity"] == pytest.approx({"value": 0.1, "low": 0.1, "high": 0.1})
    assert found["a"] == pytest.approx({"value": 0.05, "low": 0.05, "high": 0.05})
    # Of two seeds of one setting the mean, and the spread of the seeds: 12.7 standard errors of two.
    mean = decay.over_seeds([one, other])["once"]
    assert mean["effectivity"]["value"] == pytest.approx(gains.mean() + 0.05)
    assert mean["effectivity"]["high"] - mean["effectivity"]["value"] > 12.7 * 0.05
    assert mean["decay"]["a"]["value"] == pytest.approx(0.225)
    apart = summarise(one)["groups"]["once"]["effectivity"]
    assert apart["high"] - apart["low"] > 0.5
    nothing = measure(series(*decaying(gains, 0.2)), {("once", 0): [399]}, Options(window=1))
    assert decay.compare([one], [nothing])["once"]["a"] is None


def test_seeds_of_one_condition_have_curves_that_are_means_over_them():
    """The second seed was probed to step 300 only, and its gains are three times as large."""
    gains, encounters = np.linspace(1, 2, 6), {("once", e): [10, 100] for e in range(6)}
    steps, values = decaying(gains, 0.2)
    one = measure(series(steps, values), encounters, KEEP_ALL)
    other = measure(series(steps[:301], 3 * values[:301]), encounters, KEEP_ALL)
    found, alone = decay.summarise_seeds([one, other])["groups"], [summarise(run)["groups"] for run in (one, other)]
    curve, curves = found["once"]["retainability"], [run["once"]["retainability"] for run in alone]
    for time, mean, number in zip(curve["at"], curve["mean"], curve["values"], strict=True):
        known = [c["mean"][c["at"].index(time)] for c in curves if time in c["at"]]
        assert (mean, number) == (pytest.approx(np.mean(known)), 6 * len(known))
    by_injection = [run["once"]["effectivity_by_injection"]["mean"] for run in alone]
    assert found["once"]["effectivity_by_injection"]["mean"] == pytest.approx(np.mean(by_injection, axis=0).tolist())
    mean = decay.over_seeds([one, other])["once"]
    assert found["once"]["effectivity"] == mean["effectivity"], "whose interval includes the seeds"
    assert found["once"]["decay"]["a"] == mean["decay"]["a"] and found["once"]["decay"]["line"]
    assert decay.summarise_seeds([one]) == summarise(one)


def test_groups_hold_every_probe_once(tmp_path):
    probes = read_probes(write_run(tmp_path / "run", {0: probe_table({"paraphrase": [0.0] * 3, "once": [0.0] * 2})}))
    found = decay.groups(probes)
    names = [f"{s}_{k}" for s, k in itertools.product(("paraphrase", "once"), KINDS)]
    assert next(iter(found)) == "all" and set(found) == {"all", "paraphrase", "once", *names}
    assert sorted(np.concatenate([found[name].columns for name in names]).tolist()) == list(range(75))
    assert (found["all"].strata, found["once_semantic"].strata) == ([3, 2], [2])
    assert found["all"].member.sum(axis=0).tolist() == [15] * 5
