"""Seeds on two levels: which runs are repetitions of what, their intervals, their spread, and their pairs."""

import math

import numpy as np
import pytest

from analysis import estimates
from analysis.conditions import Repetitions, paired, spread, units
from analysis.estimates import STUDENT, student
from analysis.outcomes import acquired, acquired_against_original, compare, forgetting
from tests.run_folders import TASKS, run_in_memory

BEFORE = np.random.default_rng(0).normal(-6, 1, 30)
SEEDS = ((0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1))


@pytest.fixture(autouse=True)
def _fewer_resamples(monkeypatch):
    monkeypatch.setattr(estimates, "RESAMPLES", 500)


def study(gains: list, about: str = "model", seeds: tuple = SEEDS, **extra) -> Repetitions:
    runs = [run_in_memory({"once": BEFORE}, {"once": BEFORE + gain}, **extra) for gain in gains]
    return Repetitions(tuple(runs), seeds[: len(runs)], about)


def test_a_pretraining_counts_once_however_many_learning_seeds_it_has():
    """Three pretrainings 1 apart, with learning seeds 0.02 apart: the interval is that of three means, not of six."""
    gains = [0.99, 1.01, 1.99, 2.01, 2.99, 3.01]
    found, flat = acquired(study(gains)), acquired(list(study(gains)))
    assert (found.repetitions, flat.repetitions) == (3, 6)
    assert found.value == flat.value == pytest.approx(-200 / BEFORE.mean())
    half = STUDENT[1] * 1 / math.sqrt(3) * 100 / abs(BEFORE.mean())  # A of a gain, with two degrees of freedom
    assert half < found.high - found.value < 1.05 * half
    assert found.high - found.value > 2 * (flat.high - flat.value)
    assert found.per_run == pytest.approx([-100 * gain / BEFORE.mean() for gain in gains])


def test_few_entries_need_more_than_the_percentiles_of_a_bootstrap():
    """As Student's t of 19 degrees of freedom, and a variance from 20 values; here no seed changes anything."""
    before, after = BEFORE[:20], BEFORE[:20] + np.random.default_rng(1).normal(1, 1, 20)
    one = run_in_memory({"once": before}, {"once": after})
    single, thrice = acquired([one]), acquired([one] * 3)
    wider = 2.093 / 1.96 * math.sqrt(20 / 19)
    assert thrice.value == pytest.approx(single.value, rel=1e-12)
    for end in ("low", "high"):
        distances = [getattr(estimate, end) - estimate.value for estimate in (single, thrice)]
        assert distances[1] == pytest.approx(wider * distances[0], rel=1e-3)


def test_pretrainings_weigh_alike_whatever_their_numbers_of_learning_seeds():
    runs = study([1.0, 1.0, 1.0, 4.0], seeds=((0, 0), (0, 1), (0, 2), (1, 0)))
    assert acquired(runs).value == pytest.approx(-250 / BEFORE.mean())


def test_about_a_checkpoint_every_learning_seed_is_a_repetition():
    runs = study([0.9, 1.0, 1.1], "checkpoint", ((4, 0), (4, 1), (4, 2)))
    assert units(runs) == [0, 1, 2] and acquired(runs).repetitions == 3
    alone = study([0.9, 1.0, 1.1], "model", ((4, 0), (4, 1), (4, 2)))
    assert acquired(alone).repetitions == 1  # three seeds of one pretraining show nothing of another pretraining


def test_every_outcome_has_its_repetitions():
    accuracy = {"accuracy_before": dict.fromkeys(TASKS, 0.5), "accuracy_after": dict.fromkeys(TASKS, 0.4)}
    edited = {"original": run_in_memory({"once": BEFORE}, {"once": BEFORE}).before, "losses": {}, "original_losses": {}}
    runs = study([1.0, 1.2, 2.0, 2.2], **accuracy, **edited, original_accuracy=accuracy["accuracy_before"])
    assert {e.repetitions for e in forgetting(runs).values()} == {2}
    assert acquired_against_original(runs).repetitions == 2
    assert {e.repetitions for e in compare(runs, runs).values()} == {2}


def test_runs_are_paired_by_both_of_their_seeds():
    one, other = study([1.0, 2.0, 3.0, 4.0]), study([0.0, 0.0, 0.0], seeds=((1, 1), (0, 1), (5, 0)))
    first, second = paired(one, other)
    assert first.seeds == second.seeds == ((0, 1), (1, 1))
    assert list(first) == [one[1], one[3]] and list(second) == [other[1], other[0]]
    assert compare(first, second)["K_after"].per_run == pytest.approx([-2.0, -4.0])
    assert len(paired(one, study([0.0], seeds=((9, 0),)))[0]) == 0


def test_the_spread_at_each_level():
    """Against a simulation: pretrainings differ by 2, learning seeds by 1, two in each of 800."""
    generator = np.random.default_rng(0)
    seeds = tuple((p, s) for p in range(800) for s in range(2))
    values = np.repeat(generator.normal(0, 2, 800), 2) + generator.normal(0, 1, 1600)
    run = run_in_memory({"once": [-1.0]}, {"once": [-1.0]})
    found = spread(values.tolist(), Repetitions((run,) * 1600, seeds))
    assert found["pretraining"] == pytest.approx(2, rel=0.08) and found["learning"] == pytest.approx(1, rel=0.08)


@pytest.mark.parametrize(
    ("values", "seeds", "expected"),
    [
        ([1.0, 3.0, 5.0, 7.0], SEEDS[:4], (math.sqrt(8 - 1), math.sqrt(2))),
        ([1.0, 3.0, 5.0], ((0, 0), (1, 0), (2, 0)), (2.0, None)),  # what one learning seed adds is in the first
        ([1.0, 3.0, 5.0], ((7, 0), (7, 1), (7, 2)), (None, 2.0)),
        ([1.0, 9.0, 2.0, 10.0], SEEDS[:4], (0.0, math.sqrt(32))),  # less than learning seeds alone explain
        ([1.0], ((0, 0),), (None, None)),
    ],
)
def test_a_level_that_was_not_repeated_has_no_spread(values, seeds, expected):
    run = run_in_memory({"once": [-1.0]}, {"once": [-1.0]})
    found = spread(values, Repetitions((run,) * len(values), seeds))
    assert (found["pretraining"], found["learning"]) == pytest.approx(expected)


def test_students_quantiles():
    """Of published tables (NIST, 1.3.6.7.2)."""
    for degrees, quantile in {1: 12.706, 4: 2.776, 9: 2.262, 10: 2.228, 15: 2.131, 30: 2.042, 100: 1.984}.items():
        assert student(degrees) == pytest.approx(quantile, abs=0.0015)
