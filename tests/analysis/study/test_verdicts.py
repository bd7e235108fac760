"""The rule of the verdict, and the paired difference of entropies."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.estimates import Estimate
from analysis.study.directions import verdict
from analysis.study.entropies import Entropies, difference_of
from tests.study import ALIKE, INSTANCES, LAYERS, MEMORIES, OTHERWISE, PAPER, coefficients, make_plan, measured

SEEN, OPPOSITE, NOISE = "seen", "not seen (the opposite)", "within noise at this scale"
ONE_RUN = "one run; not a verdict"


# --- verdict -----------------------------------------------------------------------------------------------------

numbers = st.floats(-1e6, 1e6).filter(lambda x: abs(x) > 1e-6)


@given(st.lists(numbers, min_size=3, max_size=3).map(sorted), st.sampled_from([-1, 1]))
def test_the_verdict_follows_from_the_interval_alone(ends, expected):
    low, value, high = ends
    found = verdict(Estimate(value, low, high, repetitions=3), expected)
    if low < 0 < high:
        assert found == NOISE
    else:
        assert found == (SEEN if math.copysign(1, low) == expected else OPPOSITE)


@given(st.lists(numbers, min_size=3, max_size=3).map(sorted), st.sampled_from([-1, 1]))
def test_the_mirrored_result_gets_the_mirrored_verdict(ends, expected):
    low, value, high = ends
    mirrored = {SEEN: OPPOSITE, OPPOSITE: SEEN, NOISE: NOISE}
    found = verdict(Estimate(value, low, high, repetitions=3), expected)
    assert verdict(Estimate(-value, -high, -low, repetitions=3), expected) == mirrored[found]
    assert verdict(Estimate(value, low, high, repetitions=3), -expected) == mirrored[found]


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-1.0, 0.0), (0.0, 0.0), (-math.inf, math.inf)])
def test_an_interval_that_touches_0_shows_nothing(low, high):
    estimate = Estimate(0.5, low, high, repetitions=3)
    assert verdict(estimate, 1) == verdict(estimate, -1) == NOISE


@pytest.mark.parametrize(("low", "high"), [(math.nan, math.nan), (1.0, math.nan), (math.nan, -1.0)])
def test_an_unknown_interval_is_no_verdict(low, high):
    estimate = Estimate(0.5, low, high, repetitions=3)
    assert verdict(estimate, 1) == verdict(estimate, -1) == "not measured"


@pytest.mark.parametrize("ends", [(1.0, 2.0), (-2.0, -1.0), (-1.0, 1.0)])
def test_one_run_gives_no_verdict_whatever_its_interval(ends):
    estimate = Estimate(0.5, *ends)
    assert verdict(estimate, 1) == verdict(estimate, -1) == ONE_RUN
    assert verdict(replace(estimate, repetitions=2), 1) != ONE_RUN


# --- entropy ---


def entropy_difference(first, second, about: str = "model") -> Estimate:
    """H of `second` minus `first`, the n-th of both of one pretraining."""
    one, other = (Entropies("text", "abs", "", "none", dict(enumerate(e)), about) for e in (first, second))
    found = difference_of(one, other)
    assert found is not None
    return found


def direct_entropy(means: np.ndarray) -> float:
    """Equation 2, from the instances: average, share, entropy, sum over layers."""
    shares = means.astype(np.float64).mean(0)
    shares = shares / shares.sum(1, keepdims=True)
    return float(-(shares * np.log(shares)).sum())


def direct_error(change, instances: np.ndarray) -> float:
    """Delete-a-group jackknife: leave out the instances of one residue mod 64 after the other."""
    left_out = np.array([change(instances[np.arange(len(instances)) % 64 != g]) for g in range(64)])
    return math.sqrt(63 / 64 * ((left_out - left_out.mean()) ** 2).sum())


def test_entropy_difference_equals_a_direct_paired_jackknife():
    one, other = coefficients(1.0, seed=0), coefficients(2.0, seed=0) * coefficients(0.0, seed=1)
    found = entropy_difference([measured(one, 90)], [measured(other, 720)])

    def change(chosen: np.ndarray) -> float:
        return direct_entropy(other[chosen]) - direct_entropy(one[chosen])

    error = direct_error(change, np.arange(INSTANCES))
    assert found.value == pytest.approx(change(np.arange(INSTANCES)), rel=1e-9)
    assert found.value - found.low == pytest.approx(1.96 * error, rel=1e-6)
    assert found.high - found.value == pytest.approx(1.96 * error, rel=1e-6)


def test_pairing_takes_out_what_instances_do_to_both_checkpoints():
    """The same noise in both: the error of the difference is far below those of the two entropies."""
    one, other = measured(coefficients(1.0, seed=0), 90), measured(coefficients(1.2, seed=0), 720)
    found = entropy_difference([one], [other])
    unpaired = 1.96 * math.hypot(one["standard_error"], other["standard_error"])
    assert found.high - found.value < 0.2 * unpaired
    assert found.high < 0  # the second is sharper


def test_the_interval_of_an_entropy_difference_holds_the_truth_as_often_as_it_says():
    """200 draws of instances; the truth is the difference of the entropies of the levels without noise."""
    truth = LAYERS * (math.log(MEMORIES) - direct_entropy(np.ones((1, 1, MEMORIES))))
    for sharpness, sign in ((2.0, 1), (1.0, -1)):
        level = np.exp(-sharpness * np.arange(MEMORIES) / MEMORIES)
        truth += sign * direct_entropy(np.tile(level, (1, LAYERS, 1)))
    covered = 0
    for seed in range(200):
        one, other = coefficients(1.0, 2 * seed), coefficients(2.0, 2 * seed) * coefficients(0.0, 2 * seed + 1, 0.2)
        found = entropy_difference([measured(one, 90)], [measured(other, 720)])
        covered += found.low <= truth <= found.high
    assert 0.88 <= covered / 200 <= 0.99


def test_seeds_measured_on_the_same_instances_do_not_average_their_error_out():
    """Three times the same checkpoint is no more than once."""
    one, other = measured(coefficients(1.0, seed=0), 90), measured(coefficients(1.0, seed=1), 720)
    once, thrice = entropy_difference([one], [other]), entropy_difference([one] * 3, [other] * 3)
    assert thrice.as_json() == pytest.approx(once.as_json(), rel=1e-9)


def test_the_entropy_of_a_checkpoint_needs_no_second_seed():
    """Of a kind of model it does: another pretraining has another entropy."""
    pair = [measured(coefficients(1.0, seed=0), 90)], [measured(coefficients(2.0, seed=0), 720)]
    of_checkpoint, of_model = entropy_difference(*pair, about="checkpoint"), entropy_difference(*pair)
    assert of_checkpoint == of_model and of_model.high < 0
    assert (verdict(of_checkpoint, -1), verdict(of_model, -1)) == (SEEN, ONE_RUN)
    assert verdict(entropy_difference(*(3 * part for part in pair)), -1) == SEEN


def test_the_spread_between_seeds_widens_the_interval():
    pairs = [(measured(coefficients(1.0, 0), 90), measured(coefficients(s, 0), 720)) for s in (1.5, 2.0, 3.0)]
    found = entropy_difference(*zip(*pairs))
    differences = np.array([b["knowledge_entropy"] - a["knowledge_entropy"] for a, b in pairs])
    assert found.value == pytest.approx(differences.mean())
    spread = 4.303 * differences.std(ddof=1) / math.sqrt(3)  # Student, two degrees of freedom
    assert spread < found.high - found.value < 1.1 * spread


@pytest.mark.parametrize(
    "changed",
    [{"data": {"path": "text", "sha256": "xyz"}}, {"number_of_instances": 64}, {"coefficient": "relu"}],
    ids=lambda changed: next(iter(changed)),
)
def test_entropies_of_different_data_are_not_compared(changed):
    one = measured(coefficients(1.0, seed=0), 90)
    with pytest.raises(ValueError, match=r"measured with different (data|numbers of instances|coefficients)"):
        entropy_difference([one], [{**one, **changed}])


# --- of a study ---


@pytest.mark.parametrize(
    ("effects", "sharpness", "noise", "seeds", "expected"),
    [
        (PAPER, (1.0, 1.5, 2.0), 0.05, 3, SEEN),
        (OTHERWISE, (2.0, 1.5, 1.0), 0.05, 3, OPPOSITE),
        (ALIKE, (1.0, 1.0, 1.0), 0.3, 3, NOISE),
        (PAPER, (1.0, 1.5, 2.0), 0.05, 1, ONE_RUN),
    ],
    ids=["as the paper", "the opposite", "no effect", "one seed"],
)
def test_other_data_give_other_verdicts(tmp_path, gathered, effects, sharpness, noise, seeds, expected):
    """No verdict is written down anywhere: every one of them follows the data."""
    found = gathered(make_plan(tmp_path / "study", effects, sharpness, seeds, noise))["directions"]
    verdicts = [direction["verdict"] for direction in found]
    # Of a dozen true nulls one in twenty is expected to leave its interval: with these seeds, at most one does.
    assert verdicts.count(expected) >= len(found) - (expected == NOISE)
