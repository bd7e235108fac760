"""E and R of every probe, against plain loops; outliers; what is missing; laws."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis import decay, dynamics, estimates
from analysis.dynamics import Options, measure, without_outliers
from analysis.probes import read_probes
from analysis.runs import read_encounters
from tests.probe_series import loops, series
from tests.run_folders import probe_table, write_injections, write_run

KEEP_ALL = Options(outlier_factor=0)


@pytest.fixture(autouse=True, scope="module")
def _fewer_resamples():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(estimates, "RESAMPLES", 500)
        patch.setattr(estimates, "BAND_RESAMPLES", 50)
        yield


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


def test_times_of_few_values_are_judged_with_their_neighbours():
    """Where maxima lie at different steps and tables are sparse, a time may have a single value."""
    slices = [(s.start, s.stop) for s in dynamics._together([25, 5, 5, 12, 40, 3, 3])]
    assert slices == [(0, 1), (1, 4), (4, 7)]
    assert [(s.start, s.stop) for s in dynamics._together([3, 4])] == [(0, 2)]
    assert list(dynamics._together([])) == []


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


def test_windows_without_a_table_are_counted():
    """Tables at 0, 30 and 31, an injection at 10, 31 and, beyond the newest, 40; w = 5."""
    values = np.array([[-5.0], [-4.0], [-3.0]])
    encounters = {("once", 0): [10, 31, 40]}
    found = measure(series([0, 30, 31], values), encounters, Options(window=5))
    assert found.coverage == {
        "pairs": 2,
        "no_window": 1,
        "measured": 1,
        "no_table_after": 0,
        "cut_short": 1,
        "tables": 1,
    }
    group = decay.summarise(found)["groups"]["all"]
    assert group["effectivity"] == {"value": 1.0, "low": None, "high": None}  # a single entry has no interval
    assert group["not_known"] == 1 and group["decay"] is None and group["retainability"]["at"] == []


@pytest.mark.parametrize(
    ("steps", "measured"),
    [
        ([0, 10, 20], False),  # evaluated at injections only, as in configs/tiny
        ([0, 8, 10, 11], False),  # an older table
        ([0, 9, 10, 20], True),  # probing.steps 1
    ],
)
def test_an_injection_without_a_probing_window_has_no_effectivity(steps, measured):
    values = np.arange(len(steps), dtype=float)[:, None] - 6
    found = measure(series(steps, values), {("once", 0): [10]}, Options(window=10))
    assert np.isfinite(found.effectivity).all() == measured
    assert (np.nansum(found.retainability) > 0) == measured
    assert found.coverage["no_window"] == (not measured)


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


@pytest.mark.parametrize(("window", "cut_short"), [(2, 0), (3, 0), (4, 1)])
def test_a_window_is_cut_short_where_it_ends_beyond_the_newest_table(window, cut_short):
    """Steps 1, 2 and 3 are a whole window of three."""
    found = measure(series(range(4), [[0.0], [1.0], [2.0], [3.0]]), {("once", 0): [1]}, Options(window=window))
    assert found.coverage["cut_short"] == cut_short
