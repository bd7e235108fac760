"""K, A, P, F and held-out losses against direct computations from the tables, and paired differences of runs."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest

from analysis import estimates
from analysis.estimates import Estimate, bootstrap
from analysis.outcomes import (
    acquired,
    acquired_against_original,
    compare,
    compare_forgotten,
    compare_loss_rise,
    forgotten,
    knowledge,
    loss_rise,
    strata,
)
from analysis.runs import Run, from_original, read_run
from tests.run_folders import AFTER, BEFORE, KINDS, TASKS, direct_k, probe_table, write_run


@pytest.fixture(autouse=True)
def _fewer_resamples(monkeypatch):
    monkeypatch.setattr(estimates, "RESAMPLES", 1000)


def varied(size: int, level: float, deviation: float, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(level, deviation, size)


def knowledge_run(folder: Path, before: dict, after: dict, **extra) -> Run:
    return read_run(write_run(folder, {0: probe_table(before), 20: probe_table(after)}, **extra))


# --- K and A ------------------------------------------------------------------------------------------------------


def test_k_and_a_equal_a_direct_computation(tmp_path):
    """Of everything, of each setting, of each kind and of each of both, from probes that all differ."""
    before, after = probe_table(BEFORE, spread=0.7, seed=1), probe_table(AFTER, spread=0.7, seed=2)
    run = read_run(write_run(tmp_path / "run", {0: before, 20: after}))
    for setting, kind in itertools.product((None, *BEFORE), (None, *KINDS)):
        first, last = (
            direct_k(t[((t.setting == setting) | (setting is None)) & ((t.kind == kind) | (kind is None))])
            for t in (before, after)
        )
        assert knowledge([run], "before", setting, kind).value == pytest.approx(first, rel=1e-12)
        assert knowledge([run], "after", setting, kind).value == pytest.approx(last, rel=1e-12)
        assert acquired([run], setting, kind).value == pytest.approx(100 * (last - first) / abs(first), rel=1e-12)


def test_settings_weigh_as_much_as_they_have_entries(tmp_path):
    """method.md section 4, in numbers that can be checked by hand: K = (3 * -16/3 + 5 * -31/5) / 8."""
    run = knowledge_run(tmp_path / "run", BEFORE, AFTER)
    assert knowledge([run], "before").value == pytest.approx(-47 / 8)
    assert acquired([run]).value == pytest.approx(100 * (47 - 34.5) / 47)


def test_every_probe_of_an_entry_weighs_alike(tmp_path):
    """Also where an entry has fewer probes of one kind, or none; and in the curve."""
    before, after = probe_table(BEFORE, spread=1.0, seed=1), probe_table(AFTER, spread=1.0, seed=2)
    gone = (before.kind == "semantic") & (before["index"] > 1)
    gone |= (before.kind == "composition") & (before.setting == "once") & (before.entry == 4)
    before, after = before[~gone], after[~gone]
    run = read_run(write_run(tmp_path / "run", {0: before, 20: after}))
    assert knowledge([run], "before").value == pytest.approx(direct_k(before), rel=1e-12)
    assert run.curve[-1][1]["K"] == pytest.approx(direct_k(after), rel=1e-12)
    last_of_once = before[(before.setting == "once") & (before.entry == 4)].mean_log_prob.mean()
    assert run.before.entries("once")[4] == pytest.approx(last_of_once, rel=1e-12)


def test_a_kind_that_only_one_setting_has(tmp_path):
    """An interval needs the numbers of entries that were probed with this kind."""
    before, after = (probe_table(x)[lambda t: (t.setting == "once") | (t.kind != "semantic")] for x in (BEFORE, AFTER))
    run = read_run(write_run(tmp_path / "run", {0: before, 20: after}))
    assert strata(run, None, "semantic") == [5]
    assert strata(run) == [3, 5]
    assert acquired([run], None, "semantic").value == acquired([run], "once").value


@pytest.mark.parametrize(("gain", "sign"), [(0.5, 1), (-0.5, -1)])
def test_a_is_positive_when_knowledge_was_gained(tmp_path, gain, sign):
    after = {s: np.add(levels, gain) for s, levels in BEFORE.items()}
    estimate = acquired([knowledge_run(tmp_path / "run", BEFORE, after)])
    assert sign * estimate.low > 0 and sign * estimate.high > 0
    assert estimate.low <= estimate.value <= estimate.high


def test_a_against_the_weights_before_resuscitation(tmp_path):
    """The edited start is worse; A against it looks like a gain, A against the original weights does not."""
    edited = {s: np.subtract(levels, 1.0) for s, levels in BEFORE.items()}
    run = knowledge_run(tmp_path / "run", edited, BEFORE, original=probe_table(BEFORE))
    k_original, k_edited = direct_k(probe_table(BEFORE)), direct_k(probe_table(edited))
    assert acquired([run]).value == pytest.approx(100 * (k_original - k_edited) / abs(k_edited))
    assert acquired_against_original([run]).value == pytest.approx(0.0, abs=1e-12)
    plain = knowledge_run(tmp_path / "plain", BEFORE, AFTER)
    assert acquired_against_original([plain]) is None
    assert acquired_against_original([run, plain]) is None


# --- forgetting ---------------------------------------------------------------------------------------------------


def test_p_and_f_equal_a_direct_computation(tmp_path):
    first = dict(zip(TASKS, (0.3, 0.5, 0.6, 0.25, 0.26, 0.31)))
    last = dict(zip(TASKS, (0.28, 0.52, 0.55, 0.25, 0.25, 0.3)))
    tables = {0: probe_table(BEFORE), 10: probe_table(AFTER), 20: probe_table(AFTER)}
    # A task that is none of P's six must not enter it.
    accuracy = {0: {**first, "copa": 0.9}, 20: {**last, "copa": 0.1}}
    run = read_run(write_run(tmp_path / "run", tables, accuracy=accuracy))
    p_before, p_after = sum(first.values()) / 6, sum(last.values()) / 6
    found = forgotten([run])
    assert found["P_before"]["value"] == pytest.approx(p_before) and found["P_after"]["value"] == pytest.approx(p_after)
    assert found["F"]["value"] == pytest.approx(100 * (p_before - p_after) / p_before)
    assert found["F"]["value"] > 0  # performance was lost
    assert found["P_chance"] == 0.25


def direct_interval(change, *columns: list[float]) -> tuple[float, float]:
    """2.5 and 97.5 % of all the 6^6 draws of six tasks, none of them left to chance."""
    draws = np.array(list(itertools.product(range(6), repeat=6)))
    low, high = np.quantile(change(*(np.array(column)[draws].mean(axis=1) for column in columns)), [0.025, 0.975])
    return float(low), float(high)


def test_the_interval_of_f_is_over_tasks(tmp_path, monkeypatch):
    """And that of a difference of two runs over the tasks that both have, each drawn in both."""
    monkeypatch.setattr(estimates, "RESAMPLES", 20_000)
    first, last = [0.3, 0.5, 0.6, 0.25, 0.26, 0.31], [0.28, 0.45, 0.55, 0.25, 0.25, 0.22]
    other = [0.2, 0.51, 0.55, 0.2, 0.3, 0.31]
    tables = {0: probe_table(BEFORE), 20: probe_table(AFTER)}
    runs = [
        read_run(write_run(tmp_path / name, tables, accuracy={0: dict(zip(TASKS, first)), 20: dict(zip(TASKS, after))}))
        for name, after in (("one", last), ("other", other))
    ]

    def lost(before, after):
        return 100 * (before - after) / before

    found = forgotten(runs[:1])
    low, high = direct_interval(lost, first, last)
    assert (found["F"]["low"], found["F"]["high"]) == pytest.approx((low, high), abs=0.04 * (high - low))
    low, high = direct_interval(lambda mean: mean, last)
    assert (found["P_after"]["low"], found["P_after"]["high"]) == pytest.approx((low, high), abs=0.04 * (high - low))
    difference = compare_forgotten(runs[:1], runs[1:])
    low, high = direct_interval(lambda a, b, c: lost(a, c) - lost(a, b), first, last, other)
    assert (difference.low, difference.high) == pytest.approx((low, high), abs=0.04 * (high - low))
    assert difference.value == pytest.approx(100 * (sum(last) - sum(other)) / sum(first))


def test_no_f_without_all_six_tasks(tmp_path):
    tables = {0: probe_table(BEFORE), 20: probe_table(AFTER)}
    five, six = dict.fromkeys(TASKS[:5], 0.5), dict.fromkeys(TASKS, 0.5)
    run = read_run(write_run(tmp_path / "run", tables, accuracy={0: five, 20: five}))
    full = read_run(write_run(tmp_path / "full", tables, accuracy={0: six, 20: six}))
    assert forgotten([run]) is None and forgotten([full, run]) is None
    assert compare_forgotten([full], [run]) is None
    assert compare_forgotten([full], [full]) == Estimate(0.0, 0.0, 0.0)


def test_several_seeds_widen_the_interval_of_f(tmp_path):
    tables = {0: probe_table(BEFORE), 20: probe_table(AFTER)}
    runs = [
        read_run(
            write_run(tmp_path / f"{p}", tables, accuracy={0: dict.fromkeys(TASKS, 0.5), 20: dict.fromkeys(TASKS, p)})
        )
        for p in (0.4, 0.45)
    ]
    found = forgotten(runs)["F"]
    assert found["value"] == pytest.approx(15.0)  # the mean of 20 and 10
    half = 12.706 * math.sqrt(50) / math.sqrt(2)  # Student's t of one degree of freedom, standard error of the mean
    assert (found["low"], found["high"]) == pytest.approx((15 - half, 15 + half))


def test_loss_rise_equals_a_direct_computation(tmp_path):
    tables = {0: probe_table(BEFORE), 20: probe_table(AFTER)}
    losses = {
        0: {"general": [4.0, 5.0, 6.0], "science": [3.0, 3.0]},
        20: {"general": [4.5, 5.5, 6.5], "science": [2, 3]},
    }
    run = read_run(write_run(tmp_path / "run", tables, losses))
    assert loss_rise([run], "general").value == pytest.approx(10.0)  # 0.5 of 5
    assert loss_rise([run], "science").value == pytest.approx(-100 / 6)
    assert set(run.losses) == {"general", "science"}


# --- differences --------------------------------------------------------------------------------------------------


def test_differences_are_paired_over_entries(tmp_path):
    """Entries differ much, the two runs' gains little: pairing takes the entries' differences out."""
    before = {"paraphrase": varied(30, -6, 2, 0), "once": varied(40, -7, 2, 1)}

    def gained(gain: float, seed: int) -> dict:
        return {s: levels + gain + varied(len(levels), 0, 0.05, seed) for s, levels in before.items()}

    one = knowledge_run(tmp_path / "one", before, gained(1.0, 2))
    other = knowledge_run(tmp_path / "other", before, gained(1.1, 3))
    paired = compare([one], [other])["K_after"]
    apart = [bootstrap([r.after.entries()[None]], lambda mean: mean, strata(r)) for r in (one, other)]
    unpaired = math.hypot(*(e.high - e.low for e in apart))
    assert paired.high - paired.low < unpaired / 10
    assert 0 < paired.low < 0.1 < paired.high
    # And it is the right width: of the mean of 70 differences.
    differences = other.after.entries() - one.after.entries()
    assert paired.value == pytest.approx(differences.mean())
    assert paired.high - paired.low == pytest.approx(2 * 1.96 * differences.std() / math.sqrt(70), rel=0.15)


def test_a_comparison_is_the_second_minus_the_first(tmp_path):
    one = knowledge_run(tmp_path / "one", BEFORE, AFTER)
    other = knowledge_run(tmp_path / "other", AFTER, BEFORE)
    found = compare([one], [other])
    assert found["A"].value == pytest.approx(acquired([other]).value - acquired([one]).value)
    assert found["K_after"].value == pytest.approx(direct_k(probe_table(BEFORE)) - direct_k(probe_table(AFTER)))
    assert compare([one], [one])["A"] == Estimate(0.0, 0.0, 0.0)


def test_a_comparison_of_loss_rises_is_paired_over_instances(tmp_path):
    tables, first = {0: probe_table(BEFORE), 20: probe_table(AFTER)}, varied(100, 5, 1, 0)
    runs = []
    for name, rise in (("one", 0.5), ("other", 0.75)):
        losses = {0: {"general": first}, 20: {"general": first + rise}}
        runs.append(read_run(write_run(tmp_path / name, tables, losses)))
    found = compare_loss_rise(runs[:1], runs[1:], "general")
    assert found.value == pytest.approx(100 * 0.25 / first.mean())
    # Every instance rose by as much, so that only the mean of the first losses varies.
    assert found.high - found.low < 0.1 * found.value


def test_losses_after_training_do_not_favour_a_start_that_was_made_worse(tmp_path):
    """The edited one starts at 6 instead of 5 and ends where the other does: it rose less, and is no better."""
    tables, first = {0: probe_table(BEFORE), 20: probe_table(AFTER)}, varied(100, 5, 1, 0)
    runs = []
    for name, start, end in (("one", 0.0, 0.5), ("edited", 1.0, 0.5), ("better", 1.0, 0.25)):
        losses = {0: {"general": first + start}, 20: {"general": first + end}}
        original = (probe_table(BEFORE), (), {"general": first}) if start else (None, ())
        runs.append(read_run(write_run(tmp_path / name, tables, losses, None, *original)))
    one, edited, better = ([run] for run in runs)
    assert compare_loss_rise(one, edited, "general").high < 0
    edited, better = ([from_original(run)] for run in (*edited, *better))
    found = compare_loss_rise(one, edited, "general")
    assert (found.value, found.low, found.high) == pytest.approx((0, 0, 0), abs=1e-12)
    found = compare_loss_rise(one, better, "general")
    assert found.value == pytest.approx(-100 * 0.25 / first.mean())
    assert found.low < found.value < found.high < 0


def test_runs_with_other_entries_are_not_compared(tmp_path):
    one = knowledge_run(tmp_path / "one", BEFORE, AFTER)
    fewer = knowledge_run(tmp_path / "fewer", *({**x, "once": x["once"][:4]} for x in (BEFORE, AFTER)))
    with pytest.raises(ValueError, match="one and fewer were probed with different entries"):
        compare([one], [fewer])
    # As many entries, but not the same ones.
    renamed = {"once": BEFORE["paraphrase"], "paraphrase": AFTER["once"]}
    swapped = knowledge_run(tmp_path / "swapped", renamed, renamed)
    alone = knowledge_run(tmp_path / "alone", {"paraphrase": BEFORE["once"]}, {"paraphrase": AFTER["once"]})
    once = knowledge_run(tmp_path / "once", {"once": BEFORE["once"]}, {"once": AFTER["once"]})
    for first, second in ((one, swapped), (alone, once)):
        with pytest.raises(ValueError, match="probed with different entries"):
            compare([first], [second])


def test_several_seeds_widen_the_interval(tmp_path):
    """What seeds differ by is noise of the result too. One value a seed: the interval of the mean spans them."""
    before = {"once": varied(50, -6, 0.5, 0)}
    runs = [
        knowledge_run(tmp_path / f"seed{i}", before, {"once": before["once"] + gain})
        for i, gain in enumerate((0.5, 1.0, 1.5))
    ]
    one, all_three = acquired(runs[1:2]), acquired(runs)
    assert all_three.value == pytest.approx(one.value, rel=0.01)
    assert all_three.high - all_three.low > 4 * (one.high - one.low)
    alike = acquired([runs[1]] * 3)
    assert alike.value == pytest.approx(one.value)
    assert alike.high - alike.low == pytest.approx(one.high - one.low, rel=0.1)


def test_seeds_are_paired_in_a_comparison(tmp_path):
    """What a seed does to both conditions alike is not noise of their difference."""
    before = {"once": varied(50, -6, 0.5, 0)}
    groups = [
        [knowledge_run(tmp_path / f"{c}{s}", before, {"once": before["once"] + gain + seed}) for s, seed in shifts]
        for c, gain in (("one", 1.0), ("other", 1.25))
        for shifts in [list(enumerate((-0.5, 0.0, 0.5)))]
    ]
    difference = compare(*groups)["K_after"]
    assert difference.value == pytest.approx(0.25)
    assert difference.high - difference.low < 1e-9
