"""`Result`: its numbers, its files, and what may be compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch

import knowledge_entropy as ke
from analysis.results import COEFFICIENTS_FILE, RESULT
from tests.analysis.measuring import made_model, rows_of, run


@pytest.fixture(scope="module")
def rows(tokens: Path) -> np.ndarray:
    return rows_of(tokens)


@pytest.fixture(scope="module")
def result(rows: np.ndarray) -> ke.Result:
    return ke.measure(made_model(0), rows)


def test_a_difference_is_paired_on_the_same_instances(result: ke.Result, rows: np.ndarray) -> None:
    other = ke.measure(made_model(1), rows)
    found = result.compare(other)
    assert found.value == other.entropy - result.entropy
    # The jackknife by definition: 64 groups, instance k in group k mod 64, each left out of both.
    left_out = []
    for group in range(64):
        kept = rows[np.arange(len(rows)) % 64 != group]
        one, two = (
            (ke.measure(made_model(seed), kept, batch_size=32).entropy for seed in (0, 1)) if group < 3 else (0, 0)
        )
        left_out.append(two - one)
    wanted = [
        sum(b) - sum(a) for a, b in zip(result.to_dict()["leave_one_group_out"], other.to_dict()["leave_one_group_out"])
    ]
    np.testing.assert_allclose(left_out[:3], wanted[:3], atol=1e-9)
    error = np.sqrt(63 / 64 * np.square(np.array(wanted) - np.mean(wanted)).sum())
    assert found.standard_error == pytest.approx(error) and error > 0
    assert (found.low, found.high) == pytest.approx((found.value - 1.959964 * error, found.value + 1.959964 * error))
    back = other.compare(result)
    assert back.value == -found.value and repr(found).startswith(f"Difference({found.value:+.4f}, standard error ")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"coefficient": "relu"}, r"different coefficients \(abs, relu\)"),
        ({"data_size": 50}, r"different numbers of instances \(100 instances, 50 instances\)"),
        ({"sequence_length": 8}, "different sequence lengths"),
    ],
)
def test_only_the_same_instances_and_settings_are_compared(
    settings: dict[str, Any], reason: str, result: ke.Result, rows: np.ndarray
) -> None:
    with pytest.raises(ValueError, match=reason):
        result.compare(ke.measure(made_model(0), rows, **settings))
    with pytest.raises(ValueError, match="different data"):
        result.compare(ke.measure(made_model(0), rows[::-1]))


def test_what_is_saved_is_loaded(result: ke.Result, tmp_path: Path, shared: Path, tokens: Path) -> None:
    result.save(tmp_path / "a" / "b")
    found = ke.Result.load(tmp_path / "a" / "b")
    assert found.to_dict() == result.to_dict() and found.compare(result).value == 0
    for number, values in result.coefficients.items():
        assert np.array_equal(found.coefficients[number], values.astype(np.float32))
    found.save(tmp_path / "again")
    for file in (RESULT, COEFFICIENTS_FILE):
        assert len((tmp_path / "again" / file).read_bytes()) == len((tmp_path / "a" / "b" / file).read_bytes())
    run("--checkpoint", shared, "--data", tokens, "--data_size", 9, "--output", tmp_path / "command")
    assert ke.Result.load(tmp_path / "command").entropy == ke.measure(shared, tokens, data_size=9).entropy

    (tmp_path / "again" / COEFFICIENTS_FILE).unlink()
    with pytest.raises(FileNotFoundError, match=COEFFICIENTS_FILE):
        ke.Result.load(tmp_path / "again")
    (tmp_path / "command" / RESULT).write_bytes((tmp_path / "a" / "b" / RESULT).read_bytes())
    with pytest.raises(ValueError, match="coefficients of another measurement"):
        ke.Result.load(tmp_path / "command")


def test_the_dictionary_is_a_copy_and_the_representation_one_line(result: ke.Result) -> None:
    result.to_dict()["data"]["sha256"] = "changed"
    assert json.dumps(result.to_dict()).count("changed") == 0
    assert repr(result) == (
        f"Result(entropy {result.entropy:.4f}, standard error {result.standard_error:.4f}, 100 instances, "
        f"at most {result.maximum:.2f})"
    )


def test_a_plot_shows_the_layers_and_changes_no_settings(result: ke.Result) -> None:
    before = dict(matplotlib.rcParams)
    figure = result.plot()
    left, right = figure.axes
    assert np.array_equal(left.lines[0].get_ydata(), result.layers)
    for line, values in zip(right.lines, result.coefficients.values()):
        assert line.get_ydata()[[0, -1]] == pytest.approx([values.max() / values.sum(), values.min() / values.sum()])
    assert figure._repr_png_().startswith(b"\x89PNG")  # in a notebook, without pyplot
    assert dict(matplotlib.rcParams) == before
    single = ke.measure(made_model(0), torch.tensor([[3, 4, 5]]))
    assert single.standard_error is None and single.compare(single).low is None and single.plot().axes
