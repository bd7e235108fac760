"""Correlations of entropy and outcomes against direct formulas, and which points they are over."""

import math

import numpy as np
import pytest

from analysis.study import joined, published
from analysis.study.entropies import read_entropies
from analysis.study.joined import correlate, join, pearson, ranks
from analysis.study.plan_file import read_plan


def direct_ranks(values: list[float]) -> list[float]:
    """By counting, with ties at the mean of their places."""
    return [sum(v < x for v in values) + (sum(v == x for v in values) + 1) / 2 for x in values]


def test_pearson_and_spearman_equal_direct_formulas():
    generator = np.random.default_rng(0)
    for points in (3, 7, 20):
        x, y = generator.normal(144, 0.1, points), generator.normal(20, 4, points)
        y[-1] = y[0]  # a tie
        found = correlate(x[:, None], y[:, None])
        assert found["pearson"].value == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-9)
        of_ranks = np.corrcoef(direct_ranks(x.tolist()), direct_ranks(y.tolist()))[0, 1]
        assert found["spearman"].value == pytest.approx(of_ranks, abs=1e-9)


def test_points_drawn_several_times_count_several_times():
    generator = np.random.default_rng(1)
    x, y = generator.normal(size=(2, 6))
    for _ in range(20):
        counts = generator.multinomial(6, np.full(6, 1 / 6)).astype(float)
        if (counts > 0).sum() < 3:
            continue
        drawn = np.repeat(np.arange(6), counts.astype(int))
        [found] = pearson(x[None], y[None], counts[None])
        assert found == pytest.approx(np.corrcoef(x[drawn], y[drawn])[0, 1])
        [of_ranks] = ranks(x[None], counts[None])
        assert of_ranks[drawn].tolist() == direct_ranks(x[drawn].tolist())


@pytest.mark.parametrize("x", [[144.1] * 5, [0.1] * 5], ids=["large", "small"])
def test_a_constant_has_no_correlation(x):
    found = correlate(np.array(x)[:, None], np.arange(5.0)[:, None])
    assert all(math.isnan(e.value) and e.as_json() == dict.fromkeys(("value", "low", "high")) for e in found.values())


def test_the_interval_is_that_of_resampled_points_and_seeds(monkeypatch):
    """Against a plain loop with as many draws."""
    monkeypatch.setattr(joined, "RESAMPLES", 4000)
    generator = np.random.default_rng(2)
    x = generator.normal(size=(8, 1)) + 0.3 * generator.normal(size=(8, 3))
    y = x.mean(1, keepdims=True) + 0.8 * generator.normal(size=(8, 3))
    draws = []
    for _ in range(4000):
        points, units = generator.integers(8, size=8), generator.integers(3, size=3)
        draws.append(np.corrcoef(x[points][:, units].mean(1), y[points][:, units].mean(1))[0, 1])
    found = correlate(x, y)["pearson"]
    assert [found.low, found.high] == pytest.approx(np.nanquantile(draws, [0.025, 0.975]), abs=0.03)
    of_one = correlate(x[:, :1], y[:, :1])["pearson"]
    assert of_one.low != found.low  # one seed is not resampled


def test_a_study_joins_starts_and_interventions(found):
    join = found["joined"]
    names = [p["name"] for p in join["points"]]
    assert names == ["early", "middle", "last", "last, q1", "last, q2"]  # without injection nothing is acquired
    entropies = {(e["start"], e["intervention"]): e for e in found["entropies"]}
    conditions = {c["name"]: c for c in found["conditions"]}
    for point in join["points"]:
        entropy, outcomes = entropies[point["start"], point["intervention"]], conditions[point["name"]]["common_start"]
        assert point["H"] == pytest.approx(entropy["H"]["value"])
        assert point["H_last_layer"] == pytest.approx(entropy["layers"][-1])
        assert point["A"] == pytest.approx(outcomes["A"]["value"], rel=1e-3)
        assert point["loss_rise.general"] == pytest.approx(outcomes["loss_rise"]["general"]["value"])
    for correlation in join["correlations"]:
        chosen = join["points"][:3] if correlation["over"] == "starts" else join["points"]
        assert (correlation["points"], correlation["seeds"]) == (len(chosen), 2)
        x, y = ([p[correlation[axis]] for p in chosen] for axis in "xy")
        if correlation["y"] not in ("F", "P_after", "loss_rise.science"):  # the same everywhere
            assert correlation["pearson"]["value"] == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-6)
            low, high = correlation["pearson"]["low"], correlation["pearson"]["high"]
            assert (low, high) == (None, None) if len(chosen) == 3 else -1 <= low <= high <= 1
    assert {c["over"] for c in join["correlations"]} == {"starts", "starts and interventions"}
    assert "pretraining seeds" in join["resampled"] and "share a trend" in join["warning"]


def test_a_published_correlation_is_beside_that_of_its_setting_alone(planted, found):
    plan = read_plan(planted)
    measured, _ = read_entropies(plan)
    of_paper = published.study("paper_1b")["settings"]
    assert [name for name, setting in of_paper.items() if "correlations" in setting] == ["baseline"]
    for numbers, expected in ((of_paper, 0.94), ({"other": of_paper["baseline"]}, None)):
        made = join(found["conditions"], measured, plan.content["interventions"], "model", numbers)
        beside = {(c["x"], c["y"], c["over"]): c["published"] for c in made["correlations"]}
        assert beside["H", "A", "starts"] == expected
        assert beside["H", "A", "starts and interventions"] is None


def test_effects_are_differences_from_the_same_start(found):
    conditions = {c["name"]: c for c in found["conditions"]}
    entropies = {(e["start"], e["intervention"]): e["per_seed"] for e in found["entropies"]}
    assert [(row["name"], row["kind"]) for row in found["effects"]] == [
        ("last, q1", "resuscitation"),
        ("last, q2", "resuscitation"),
    ]
    for row in found["effects"]:
        one, other = conditions["last"], conditions[row["name"]]
        change = np.subtract(entropies["last", row["intervention"]], entropies["last", "none"])
        assert row["H"]["value"] == pytest.approx(change.mean())
        change = np.subtract(other["per_seed"]["K_after"], one["per_seed"]["K_after"])
        assert row["K_after"]["value"] == pytest.approx(change.mean())
        change = np.subtract(other["per_seed"]["loss_rise.general"], one["per_seed"]["loss_rise.general"])
        assert row["loss_rise.general"]["value"] == pytest.approx(change.mean())
        assert row["seeds"] == 2
