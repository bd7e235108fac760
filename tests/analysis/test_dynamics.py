"""Effectivity, retainability and decay against plain loops and against answers that were put in, and their laws."""

import itertools
import math
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis import dynamics, estimates
from analysis.dynamics import Options, clean, measure, summarise, without_outliers
from analysis.probes import ProbeSeries, read_probes
from analysis.runs import read_encounters
from tests.run_folders import KINDS, probe_table, write_injections, write_run

KEEP_ALL = Options(outlier_factor=0)


@pytest.fixture(autouse=True, scope="module")
def _fewer_resamples():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(estimates, "RESAMPLES", 500)
        patch.setattr(estimates, "BAND_RESAMPLES", 50)
        yield


def series(steps, values, setting: str = "once", per_entry: int = 1) -> ProbeSeries:
    """Of probes of one setting and kind (T, Q), `per_entry` of them an entry."""
    values = np.asarray(values, dtype=np.float64)
    count = values.shape[1]
    return ProbeSeries(
        np.asarray(steps, dtype=np.int64),
        np.array([setting] * count),
        np.arange(count) // per_entry,
        np.array(["semantic"] * count),
        values,
    )


# --- against plain loops -----------------------------------------------------------------------------------------


def loops(probes: ProbeSeries, encounters: dict, window: int) -> tuple[dict, dict]:
    """({(probe, i): E}, {(probe, t): R}) by the definitions, one probe after the other."""
    steps = probes.steps.tolist()
    effectivity, retainability = {}, {}
    for probe in range(probes.values.shape[1]):
        level = {s: v for s, v in zip(steps, probes.values[:, probe].tolist()) if not math.isnan(v)}
        entered = encounters.get((str(probes.settings[probe]), int(probes.entries[probe])), [])
        entered = [s for s in entered if s <= steps[-1]]
        before = peak = at = None
        for number, step in enumerate(entered):
            earliest = step - window
            if number > 0:
                earliest = max(earliest, entered[number - 1])
            latest = step + window - 1
            if number + 1 < len(entered):
                latest = min(latest, entered[number + 1] - 1)
            previous = [s for s in level if earliest <= s < step]
            following = [s for s in level if step <= s <= latest]
            base = level[max(previous)] if previous else None
            peak = at = None
            for s in sorted(following):
                if peak is None or level[s] > peak:
                    peak, at = level[s], s
            if number == 0:
                before = base
            if peak is not None and base is not None:
                effectivity[probe, number] = peak - base
        if before is not None and peak is not None and peak > before:
            for s in level:
                if s > at:
                    retainability[probe, s - at] = (level[s] - before) / (peak - before)
    return effectivity, retainability


def measured(found: dynamics.Dynamics) -> tuple[dict, dict]:
    """The same of the program."""
    places = zip(*np.nonzero(~np.isnan(found.effectivity)))
    effectivity = {(int(q), int(i)): found.effectivity[i, q] for i, q in places}
    places = zip(*np.nonzero(~np.isnan(found.retainability)))
    return effectivity, {(int(q), int(found.times[t])): found.retainability[t, q] for t, q in places}


@pytest.mark.parametrize("window", [1, 3, 12, 1000])
@pytest.mark.parametrize("share", [1.0, 0.6, 0.1])
def test_e_and_r_are_those_of_plain_loops(tmp_path, window, share):
    """Random levels with ties, from a run's folder; tables at some steps only, one of them with some probes only."""
    generator = np.random.default_rng(int(100 * share))
    steps = sorted({0, *generator.choice(90, int(90 * share), replace=False).tolist()})
    tables = {}
    for step in steps:
        table = probe_table({"paraphrase": [-5.0] * 2, "once": [-5.0] * 4}, per_kind=2)
        levels = generator.integers(-12, 0, len(table)) / 2
        tables[step] = table.assign(mean_log_prob=levels.astype(float))
    for step in steps[1::5]:
        tables[step] = tables[step][tables[step].kind != "semantic"]
    folder = write_run(tmp_path / "run", tables)
    rounds = {20: ["once/0", "once/3"], 24: ["once/1"], 60: ["once/1"], 400: ["once/2", "once/0"]}
    for step in (20, 21, 45, 85):
        rounds.setdefault(step, []).extend(["paraphrase/0"])
    write_injections(folder, rounds)
    probes, encounters = read_probes(folder), read_encounters(folder)
    found = measure(probes, encounters, Options(window=window))
    for ours, plain in zip(measured(found), loops(probes, encounters, window), strict=True):
        assert ours.keys() == plain.keys()
        assert [ours[key] for key in plain] == pytest.approx(list(plain.values()))
    # once/2 is yet to be injected, paraphrase/1 never is.
    assert found.injected.sum() == 6 * (1 + 3)


def direct_outliers(values: list[float], factor: float) -> list[bool]:
    """Which to keep."""
    first, third = np.percentile(values, [25, 75])
    return [first - factor * (third - first) <= v <= third + factor * (third - first) for v in values]


@pytest.mark.parametrize("factor", [0.5, 1.5, 2.0])
def test_outliers_are_judged_by_quartiles(factor):
    values = np.random.default_rng(1).standard_t(2, (3, 40))
    values[0, :7] = np.nan
    values[2] = np.nan
    found = without_outliers(values, factor)
    assert np.isnan(found[2]).all()
    for row in (0, 1):
        there = ~np.isnan(values[row])
        kept = ~np.isnan(found[row, there])
        assert kept.tolist() == direct_outliers(values[row, there].tolist(), factor)
        assert not kept.all()
    assert without_outliers(values, 0) is values


def test_values_that_are_equal_but_for_rounding_are_no_outliers():
    values = np.array([[0.1 + 0.2] * 9 + [0.3]])
    assert not np.isnan(without_outliers(values, 1.5)).any()


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


def test_times_of_few_values_are_judged_with_their_neighbours():
    """Where maxima lie at different steps and tables are sparse, a time may have a single value."""
    slices = [(s.start, s.stop) for s in dynamics._together([25, 5, 5, 12, 40, 3, 3])]
    assert slices == [(0, 1), (1, 4), (4, 7)]
    assert [(s.start, s.stop) for s in dynamics._together([3, 4])] == [(0, 2)]
    assert list(dynamics._together([])) == []


# --- answers that were put in ------------------------------------------------------------------------------------


def decaying(gains, slope: float, start: float = 1.0, last: int = 400, at: int = 10, peak: int = 0) -> tuple:
    """(steps, values): probes that gain by an injection at step `at`, whose maximum is `peak` steps later, and of whose
    gain a share `start - slope * log10 t` is left t steps after it."""
    steps = np.arange(last + 1)
    t = np.maximum(steps - at - peak, 1)
    share = np.where(steps < at, 0.0, np.where(steps <= at + peak, 1.0, start - slope * np.log10(t)))
    share[(steps >= at) & (steps < at + peak)] = 0.5
    return steps, -6.0 + np.outer(share, gains)


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


def test_of_equal_maxima_the_first_counts():
    values = np.array([[-5.0], [-3.0], [-4.0], [-3.0], [-4.0]])
    found = measure(series(range(5), values), {("once", 0): [1]}, KEEP_ALL)
    assert found.times.tolist() == [1, 2, 3]
    assert found.retainability[:, 0].tolist() == [0.5, 1.0, 0.5]


def test_the_next_injection_ends_a_window():
    """A rise that the second injection brings is not the first one's."""
    values = np.array([-5.0, -4.5, -4.6, -1.0, -1.5])[:, None]
    found = measure(series(range(5), values), {("once", 0): [1, 3]}, Options(window=50, outlier_factor=0))
    assert found.effectivity[:, 0].tolist() == pytest.approx([0.5, 3.6])


# --- what is missing ---------------------------------------------------------------------------------------------


def test_probes_that_acquired_nothing_have_no_retainability():
    values = np.array([[-5.0, -5.0, -5.0], [-4.0, -5.0, -6.0], [-4.5, -5.0, -5.5]])
    found = measure(series(range(3), values), {("once", e): [1] for e in range(3)}, KEEP_ALL)
    assert found.retainability.shape == (1, 3)
    assert found.retainability[0, 0] == 0.5 and np.isnan(found.retainability[0, 1:]).all()
    assert found.effectivity[0].tolist() == [1.0, 0.0, -0.5]
    group = summarise(found)["groups"]["all"]
    assert (group["nothing_acquired"], group["not_known"], group["probes"]) == (2, 0, 3)


def test_windows_without_a_table_are_counted():
    """Tables at 0, 30 and 31, an injection at 10, 31 and, beyond the newest, 40; w = 5."""
    values = np.array([[-5.0], [-4.0], [-3.0]])
    encounters = {("once", 0): [10, 31, 40]}
    found = measure(series([0, 30, 31], values), encounters, Options(window=5))
    assert found.coverage == {
        "pairs": 2,
        "measured": 1,
        "no_table_before": 1,
        "just_before": 1,
        "no_table_after": 1,
        "cut_short": 1,
        "tables": 1,
    }
    group = summarise(found)["groups"]["all"]
    assert group["effectivity"] == {"value": 1.0, "low": None, "high": None}  # a single entry has no interval
    assert group["not_known"] == 1 and group["decay"] is None and group["retainability"]["at"] == []


def test_a_table_from_before_the_previous_injection_is_none_before_this_one():
    """What lies between tells of both."""
    values = np.array([[-5.0], [-3.0]])
    found = measure(series([0, 12], values), {("once", 0): [5, 10]}, Options(window=50))
    assert np.isnan(found.effectivity).all()
    assert found.coverage["no_table_before"] == 1 and found.coverage["no_table_after"] == 1


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


# --- intervals ---------------------------------------------------------------------------------------------------


def test_the_interval_of_e_holds_the_truth_as_often_as_it_says():
    """Entries differ, and so do their probes, less; without noise in time E is the gain. 200 repetitions."""
    generator, covered = np.random.default_rng(0), 0
    steps = [0, 1]
    encounters = {("once", e): [1] for e in range(40)}
    for _ in range(200):
        gains = (generator.normal(1.0, 0.5, (40, 1)) + generator.normal(0, 0.3, (40, 4))).ravel()
        probes = series(steps, np.stack((np.full(160, -6.0), gains - 6)), per_entry=4)
        found = measure(probes, encounters, KEEP_ALL)
        estimate = dynamics.effectivity(found, dynamics.groups(probes)["once"])
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
        fit = dynamics.decay(found, dynamics.groups(probes)["once"])
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
    found = dynamics.compare(one, other)["once"]
    assert found["effectivity"] == pytest.approx({"value": 0.1, "low": 0.1, "high": 0.1})
    assert found["a"] == pytest.approx({"value": 0.05, "low": 0.05, "high": 0.05})
    apart = summarise(one)["groups"]["once"]["effectivity"]
    assert apart["high"] - apart["low"] > 0.5
    nothing = measure(series(*decaying(gains, 0.2)), {("once", 0): [399]}, Options(window=1))
    assert dynamics.compare(one, nothing)["once"]["a"] is None


# --- laws --------------------------------------------------------------------------------------------------------

levels = st.lists(st.integers(-100, 0), min_size=24, max_size=24).map(lambda x: np.array(x, dtype=float).reshape(12, 2))
ENCOUNTERS = {("once", 0): [2, 6], ("once", 1): [3]}


@settings(max_examples=60)
@given(levels, st.floats(-50, 50))
def test_e_does_not_change_when_a_constant_is_added(values, constant):
    one, other = (measure(series(range(12), v), ENCOUNTERS, Options(window=4)) for v in (values, values + constant))
    np.testing.assert_allclose(other.effectivity, one.effectivity, atol=1e-9)


@settings(max_examples=60)
@given(levels, st.integers(-5, 5), st.integers(1, 8))
def test_r_does_not_change_in_another_unit_from_another_zero(values, constant, factor):
    """Of integers, so that ties stay ties."""
    one, other = (
        measure(series(range(12), v), ENCOUNTERS, Options(window=4)) for v in (values, factor * values + constant)
    )
    assert other.times.tolist() == one.times.tolist()
    np.testing.assert_allclose(other.retainability, one.retainability, atol=1e-9)


@settings(max_examples=30)
@given(levels)
def test_a_maximum_is_no_less_than_any_value_of_its_window(values):
    found = measure(series(range(12), values), ENCOUNTERS, Options(window=4))
    for (setting, entry), entered in ENCOUNTERS.items():
        assert setting == "once"
        for number, step in enumerate(entered):
            gains = values[step : min([step + 4, *entered[number + 1 :]]), entry] - values[step - 1, entry]
            assert found.effectivity[number, entry] == gains.max()


def test_groups_hold_every_probe_once(tmp_path):
    probes = read_probes(write_run(tmp_path / "run", {0: probe_table({"paraphrase": [0.0] * 3, "once": [0.0] * 2})}))
    found = dynamics.groups(probes)
    names = [f"{s}_{k}" for s, k in itertools.product(("paraphrase", "once"), KINDS)]
    assert next(iter(found)) == "all" and set(found) == {"all", "paraphrase", "once", *names}
    assert sorted(np.concatenate([found[name].columns for name in names]).tolist()) == list(range(75))
    assert (found["all"].strata, found["once_semantic"].strata) == ([3, 2], [2])
    assert found["all"].member.sum(axis=0).tolist() == [15] * 5


@pytest.mark.parametrize(("window", "cut_short"), [(2, 0), (3, 0), (4, 1)])
def test_a_window_is_cut_short_where_it_ends_beyond_the_newest_table(window, cut_short):
    """Steps 1, 2 and 3 are a whole window of three."""
    found = measure(series(range(4), [[0.0], [1.0], [2.0], [3.0]]), {("once", 0): [1]}, Options(window=window))
    assert found.coverage["cut_short"] == cut_short
