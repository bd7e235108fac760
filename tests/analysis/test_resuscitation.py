"""Algorithm 1 against its transcription (method section 2)."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from analysis import resuscitation
from analysis.resuscitation import Resuscitation
from tests.reference import by_layer, table_of


def resuscitate(average: torch.Tensor, *how: Any, **more: Any) -> SimpleNamespace:
    """Of a table (L, M), as tables."""
    found = resuscitation.resuscitate(by_layer(average), *how, **more)
    return SimpleNamespace(**{name: table_of(getattr(found, name)) for name in Resuscitation.__dataclass_fields__})


def transcribed(average: np.ndarray, p: float, q: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(selected, multiplier, dead) row by row, in float64."""
    selected, multipliers = np.zeros(average.shape, bool), np.ones(average.shape)
    dead = np.zeros(average.shape, bool)
    for layer, row in enumerate(average):
        t = np.quantile(row, p)  # linear interpolation
        for i, coefficient in enumerate(row.tolist()):
            if coefficient <= t:
                selected[layer, i] = True
                u = float(np.mean(row)) / coefficient * q if coefficient else math.inf
                if math.isfinite(u):
                    multipliers[layer, i] = u
                else:
                    dead[layer, i] = True
    return selected, multipliers, dead


# Few different values make ties at the quantile; the others reach from almost nothing to huge.
coefficients = st.one_of(
    st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0]),
    st.floats(1e-300, 1e300),
)
shapes = st.tuples(st.integers(1, 3), st.integers(1, 33))
ratios = st.one_of(st.sampled_from([1 / 16, 0.25, 0.5, 0.75, 1.0]), st.floats(1e-6, 1.0))


@settings(max_examples=400)
@given(hnp.arrays(np.float64, shapes, elements=coefficients), ratios, st.sampled_from([0.5, 1.0, 2.0, 3.0]))
def test_it_is_algorithm_1(average: np.ndarray, p: float, q: float) -> None:
    assume((average.max(1) > 0).all())
    found = resuscitate(torch.from_numpy(average), p, q)
    selected, multipliers, dead = transcribed(average, p, q)
    np.testing.assert_array_equal(found.selected.numpy(), selected)
    np.testing.assert_array_equal(found.dead.numpy(), dead)
    np.testing.assert_allclose(found.multipliers.numpy(), multipliers, rtol=1e-12)
    assert torch.isfinite(found.multipliers).all()


@settings(max_examples=200)
@given(
    hnp.arrays(np.float32, shapes, elements=st.one_of(st.just(0.0), st.floats(2**-149, 2**120, width=32))),
    ratios,
    st.sampled_from(["lowest", "random", "highest"]),
)
def test_nothing_infinite_ever_leaves_it(average: np.ndarray, p: float, select: str) -> None:
    assume((average.max(1) > 0).all())
    found = resuscitate(torch.from_numpy(average), p, 3.0, select)
    assert found.multipliers.dtype == torch.float32
    assert torch.isfinite(found.multipliers).all()
    assert (found.multipliers[~found.selected] == 1).all() and (found.multipliers[found.dead] == 1).all()
    assert not (found.dead & ~found.selected).any()


def test_a_case_by_hand() -> None:
    average = torch.tensor([[4.0, 1.0, 3.0, 2.0], [1.0, 1.0, 1.0, 5.0]])
    found = resuscitate(average, 0.5, 2.0)
    # Layer 0: t = 2.5, mean 2.5. Layer 1: t = 1, ties at the quantile are all selected, mean 2.
    assert found.selected.tolist() == [[False, True, False, True], [True, True, True, False]]
    assert found.multipliers.tolist() == [[1.0, 5.0, 1.0, 2.5], [4.0, 4.0, 4.0, 1.0]]
    assert not found.dead.any()


def test_the_whole_layer_with_ratio_1() -> None:
    average = torch.tensor([[4.0, 1.0, 3.0]])
    found = resuscitate(average, 1.0, 1.0)
    assert found.selected.all()
    torch.testing.assert_close(found.multipliers * average, torch.full((1, 3), 8 / 3))


def test_a_dead_memory_keeps_its_row_and_is_reported() -> None:
    found = resuscitate(torch.tensor([[0.0, 1.0, 2.0, 5.0]]), 0.5, 1.0)
    assert found.selected.tolist() == [[True, True, False, False]]
    assert found.dead.tolist() == [[True, False, False, False]]
    assert found.multipliers.tolist() == [[1.0, 2.0, 1.0, 1.0]]


def test_a_memory_too_weak_for_a_finite_multiplier_is_dead() -> None:
    found = resuscitate(torch.tensor([[1e-45, 1.0, 2.0, 5.0]]), 0.5, 1.0)
    assert found.dead.tolist() == [[True, False, False, False]] and found.multipliers[0, 0] == 1


@settings(max_examples=100)
@given(
    hnp.arrays(np.float64, shapes, elements=st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0, 3.0])),
    ratios,
    st.integers(0, 2**31),
)
def test_the_controls_take_as_many_rows_of_each_layer(average: np.ndarray, p: float, seed: int) -> None:
    assume((average.max(1) > 0).all())
    table = torch.from_numpy(average)
    lowest = resuscitate(table, p, 1.0)
    for select in ("random", "highest"):
        control = resuscitate(table, p, 1.0, select, seed)
        assert torch.equal(control.selected.sum(1), lowest.selected.sum(1))
        again = resuscitate(table, p, 1.0, select, seed)
        assert torch.equal(control.selected, again.selected)
        wanted = table.mean(1, keepdim=True) / table
        alive = control.selected & ~control.dead
        torch.testing.assert_close(control.multipliers[alive], wanted[alive], rtol=1e-12, atol=0)


def test_highest_takes_the_most_active_rows() -> None:
    average = torch.rand(3, 20, generator=torch.Generator().manual_seed(0))
    selected = resuscitate(average, 0.25, 1.0, "highest").selected
    for layer in range(3):
        weakest = average[layer][selected[layer]].min()
        assert (average[layer][~selected[layer]] < weakest).all()


def test_random_rows_depend_on_the_seed_and_not_on_the_activity() -> None:
    average = torch.rand(2, 64, generator=torch.Generator().manual_seed(0))
    draws = torch.stack([resuscitate(average, 0.5, 1.0, "random", seed).selected for seed in range(400)]).double()
    share = draws.mean(0)
    # 0.5 with a standard error of 0.025, 128 rows at once
    assert ((share - 0.5).abs() < 0.11).all()
    assert not torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0][0], draws[0][1]), "the layers share one draw"


@pytest.mark.parametrize(
    ("average", "ratio", "factor", "select", "said"),
    [
        ([[1.0]], 0.0, 1.0, "lowest", r"resuscitation ratio 0.0 is not in \(0, 1\]"),
        ([[1.0]], 1.01, 1.0, "lowest", "resuscitation ratio 1.01"),
        ([[1.0]], math.nan, 1.0, "lowest", "resuscitation ratio nan"),
        ([[1.0]], 0.5, 0.0, "lowest", "amplifying factor 0.0 is not a positive number"),
        ([[1.0]], 0.5, -1.0, "lowest", "amplifying factor -1.0"),
        ([[1.0]], 0.5, math.inf, "lowest", "amplifying factor inf"),
        ([[1.0]], 0.5, math.nan, "lowest", "amplifying factor nan"),
        ([[1.0]], 0.5, 1.0, "middle", "selection 'middle' is none of lowest, random, highest"),
        ([[1.0, -1.0]], 0.5, 1.0, "lowest", "average coefficients must be finite and not negative"),
        ([[1.0, math.nan]], 0.5, 1.0, "lowest", "average coefficients must be finite and not negative"),
        ([[1.0, math.inf]], 0.5, 1.0, "lowest", "average coefficients must be finite and not negative"),
        ([[3e38] * 4], 0.5, 1.0, "lowest", "average coefficients must be finite"),
        ([[1.0, 2.0], [0.0, 0.0]], 0.5, 1.0, "lowest", "a layer without a single active memory"),
    ],
)
def test_what_cannot_be_resuscitated_is_refused(
    average: list, ratio: float, factor: float, select: str, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        resuscitate(torch.tensor(average), ratio, factor, select)


# --- beyond the published algorithm ------------------------------------------------------------------------------


@settings(max_examples=200)
@given(
    hnp.arrays(np.float64, shapes, elements=coefficients),
    ratios,
    st.sampled_from(["layer", "global"]),
    st.one_of(st.none(), st.floats(1e-3, 1e3)),
    st.data(),
)
def test_layers_threshold_and_cap(
    average: np.ndarray, p: float, threshold: str, cap: float | None, data: st.DataObject
) -> None:
    assume((average.max(1) > 0).all())
    numbers = data.draw(st.sets(st.integers(0, len(average) - 1), min_size=1))
    found = resuscitate(torch.from_numpy(average), p, 2.0, threshold=threshold, layers=sorted(numbers), cap=cap)
    for layer, row in enumerate(average):
        t = np.quantile(row if threshold == "layer" else average[sorted(numbers)], p)
        for i, coefficient in enumerate(row.tolist()):
            selected = layer in numbers and coefficient <= t
            u = float(np.mean(row)) / coefficient * 2 if coefficient else math.inf
            above = cap is not None and coefficient > 0 and u > cap
            dead = selected and not above and not math.isfinite(u)
            wanted = 1.0 if not selected or dead else float(cap or 0) if above else u
            assert bool(found.selected[layer, i]) == selected
            assert bool(found.capped[layer, i]) == (selected and above)
            assert bool(found.dead[layer, i]) == dead
            assert math.isclose(float(found.multipliers[layer, i]), wanted, rel_tol=1e-12)


def test_the_threshold_of_all_layers_takes_more_of_the_quieter_one() -> None:
    average = torch.tensor([[1.0, 2.0, 3.0, 4.0], [10.0, 20.0, 30.0, 40.0]])
    assert resuscitate(average, 0.5, 1.0, threshold="global").selected.sum(1).tolist() == [4, 0]
    assert resuscitate(average, 0.5, 1.0, "random", threshold="global").selected.sum(1).tolist() == [4, 0]
    assert resuscitate(average, 0.5, 1.0, threshold="global", layers=[1]).selected.sum(1).tolist() == [0, 2]


def test_a_layer_named_twice_is_one() -> None:
    average = torch.tensor([[1.0, 2.0, 3.0, 4.0], [10.0, 20.0, 30.0, 40.0]])
    once, twice = (resuscitate(average, 0.4, 1.0, threshold="global", layers=n) for n in ([0, 1], [1, 0, 1, 1]))
    assert torch.equal(once.selected, twice.selected) and once.selected.sum(1).tolist() == [3, 0]


def test_a_layer_that_does_not_change_may_be_without_an_active_memory() -> None:
    average = torch.tensor([[1.0, 2.0], [0.0, 0.0]])
    for threshold in ("layer", "global"):
        assert resuscitate(average, 1.0, 1.0, threshold=threshold, layers=[0]).multipliers.tolist() == [
            [1.5, 0.75],
            [1.0, 1.0],
        ]
    with pytest.raises(ValueError, match="layer 1: a layer without a single active memory"):
        resuscitate(average, 1.0, 1.0, layers=[0, 1])


def test_no_cap_revives_a_dead_memory() -> None:
    found = resuscitate(torch.tensor([[0.0, 1e-45, 2.0, 5.0]]), 0.5, 1.0, cap=100.0)
    assert found.dead.tolist() == [[True, False, False, False]]
    assert found.multipliers.tolist() == [[1.0, 100.0, 1.0, 1.0]]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"cap": 0.0}, "cap 0.0 is not a positive number"),
        ({"cap": math.inf}, "cap inf is not a positive number"),
        ({"cap": math.nan}, "cap nan is not a positive number"),
        ({"threshold": "model"}, "threshold 'model' is none of layer, global"),
        ({"layers": [0, 2, 7]}, "layers 2, 7: the model has memories in layers 0, 1"),
        ({"layers": []}, "layers none: the model has memories in layers 0, 1"),
    ],
)
def test_options_that_make_no_sense_are_refused(more: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        resuscitate(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), 0.5, 1.0, **more)


@pytest.mark.parametrize("ratio", [1e-6, 0.25, 1 / 3, 0.5, 0.9, 1.0])
def test_the_quantile_of_more_coefficients_than_torch_sorts(monkeypatch: pytest.MonkeyPatch, ratio: float) -> None:
    average = torch.rand(2, 101, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wanted = resuscitate(average, ratio, 1.0, threshold="global").selected
    assert torch.equal(wanted, average <= np.quantile(average.numpy(), ratio))
    monkeypatch.setattr(resuscitation, "MOST_SORTED", 100)
    assert torch.equal(resuscitate(average, ratio, 1.0, threshold="global").selected, wanted)
