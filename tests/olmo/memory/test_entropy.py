"""The entropy of average coefficients and its standard error, each against a direct computation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from olmo.distributed import Ranks
from olmo.memory.entropy import CoefficientAverages, jackknife_error, layer_entropy
from tests.reference import entropy_by_definition

averages_of_a_layer = hnp.arrays(
    np.float64,
    st.tuples(st.integers(1, 3), st.integers(1, 40)),
    elements=st.one_of(st.just(0.0), st.floats(1e-12, 1e6)),
).filter(lambda a: (a.sum(-1) > 0).all())


@given(averages_of_a_layer)
def test_entropy_lies_between_0_and_log_m(average: np.ndarray) -> None:
    entropy = layer_entropy(average)
    assert (entropy >= -1e-12).all() and (entropy <= math.log(average.shape[1]) + 1e-12).all()
    np.testing.assert_allclose(entropy, entropy_by_definition(torch.from_numpy(average)), rtol=0, atol=1e-9)
    np.testing.assert_allclose(layer_entropy(average * 7.0), entropy, rtol=0, atol=1e-9)


def test_entropy_of_known_cases() -> None:
    known = np.array([[1.0, 1, 1, 1], [5, 0, 0, 0], [1, 1, 0, 0], [3, 1, 0, 0]])
    quarter = 0.75 * math.log(4 / 3) + 0.25 * math.log(4)
    np.testing.assert_allclose(layer_entropy(known), [math.log(4), 0, math.log(2), quarter], rtol=1e-12, atol=1e-15)
    assert layer_entropy(np.ones((16, 8192))).sum() == pytest.approx(16 * 13 * math.log(2), rel=1e-12)


@pytest.mark.parametrize("bad", [[0.0, 0.0], [1.0, -0.1], [1.0, math.nan], [1.0, math.inf]])
def test_coefficients_that_make_no_distribution_are_refused(bad: list[float]) -> None:
    with pytest.raises(ValueError, match="must be finite, not negative and not all 0 in a layer"):
        layer_entropy(np.array([[1.0, 2.0], bad]))


# --- standard errors ---------------------------------------------------------------------------------------------


def test_averages_and_left_out_groups_by_definition() -> None:
    random = np.random.default_rng(0)
    means = random.gamma(1.0, size=(150, 2, 6)).astype(np.float32)
    averages = CoefficientAverages([6, 6])
    for start in range(0, 150, 7):  # batches that straddle groups
        numbers = np.arange(start, min(start + 7, 150))
        averages.add(torch.from_numpy(means[numbers]).flatten(1), numbers)
    assert averages.instances == 150
    np.testing.assert_allclose([*averages.layers.values()], means.astype(np.float64).mean(0), rtol=1e-12)
    left_out = averages.leave_one_out()
    assert left_out.shape == (64, 2)
    for group in range(64):
        kept = means[np.arange(150) % 64 != group].astype(np.float64).mean(0)
        np.testing.assert_allclose(left_out[group], entropy_by_definition(torch.from_numpy(kept)), rtol=1e-9)


def test_several_instances_of_a_group_in_one_batch_all_count() -> None:
    averages = CoefficientAverages([2])
    averages.add(torch.tensor([[1.0, 2.0], [3.0, 6.0], [5.0, 1.0]]), np.array([0, 64, 128]))
    assert averages.average.tolist() == [3.0, 3.0] and averages.instances == 3


def test_the_jackknife_of_a_mean_is_the_formula() -> None:
    values = np.random.default_rng(0).normal(size=(40, 3))
    left_out = (values.sum(0) - values) / 39
    np.testing.assert_allclose(jackknife_error(left_out), values.std(0, ddof=1) / math.sqrt(40), rtol=1e-12)


def test_few_instances_give_few_groups_and_one_gives_no_error() -> None:
    averages = CoefficientAverages([3, 3])
    averages.add(torch.rand(1, 6) + 0.1, np.array([5]))
    assert averages.leave_one_out().shape == (0, 2)
    assert np.isnan(jackknife_error(averages.leave_one_out())).all()
    averages.add(torch.rand(2, 6) + 0.1, np.array([6, 7]))
    assert averages.leave_one_out().shape == (3, 2)
    assert (jackknife_error(averages.leave_one_out()) > 0).all()


def test_the_interval_of_two_errors_covers_the_truth_as_often_as_it_says() -> None:
    random = np.random.default_rng(0)
    base = random.gamma(1.0, size=(2, 12)) + 0.2
    noise = 0.5
    # E[exp(noise * z)] is the same for every memory, so the true average is proportional to `base`.
    truth = sum(entropy_by_definition(torch.from_numpy(base)))
    covered = 0
    for _ in range(200):
        sample = base * np.exp(noise * random.normal(size=(256, 2, 12)))
        averages = CoefficientAverages([12, 12])
        averages.add(torch.from_numpy(sample).flatten(1), np.arange(256))
        error = float(jackknife_error(averages.leave_one_out().sum(1)))
        covered += abs(layer_entropy(averages.layers.values()).sum() - truth) < 1.96 * error
    assert 180 <= covered <= 198


def test_ranks_add_up() -> None:
    class Doubled(Ranks):
        """Another rank that has seen exactly the same."""

        def sum(self, values: np.ndarray) -> np.ndarray:
            return 2 * values

    averages = CoefficientAverages([3])
    averages.add(torch.tensor([[1.0, 2.0, 3.0]]), np.array([0]))
    averages.reduce(Doubled(0, 2))
    assert averages.instances == 2 and averages.average.tolist() == [1.0, 2.0, 3.0]
