"""Measures of breadth, each against a direct formula in float64, and their errors against repeated samples."""

from __future__ import annotations

import json
from functools import reduce
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from analysis import series
from analysis.breadth import BREADTHS, Breadth, _halves, half_sample_error, overlap
from analysis.results import read_coefficients
from olmo.memory import CoefficientAverages
from olmo.model import OLMo
from tests.analysis.measuring import (
    LENGTH,
    direct,
    entropies,
    made_model,
    olmo_places,
    result_in,
    rows_of,
    run,
    write,
)
from tests.reference import to_transformers

SIZE = 34  # instances, each a group
FILE = "mlp_average_coefficients.safetensors"
# Rows of a Hadamard matrix of order 64 (Sylvester): True is the first half. Odd rows part neighbours.
SPLITS = (reduce(np.kron, [np.array([[1, 1], [1, -1]])] * 6) > 0)[1::2]


def by_definition(layer: np.ndarray) -> list[float]:
    """effective, gini, dead of the coefficients (M,) of a layer."""
    [entropy] = entropies(torch.from_numpy(layer)[None])
    apart = np.abs(layer[:, None] - layer).mean() / (2 * layer.mean())
    return [np.exp(entropy) / len(layer), apart, float(np.mean([c < 0.1 * layer.mean() for c in layer]))]


def most_active(layer: np.ndarray) -> set[int]:
    return set(sorted(range(len(layer)), key=lambda i: (-layer[i], i))[: round(0.1 * len(layer))])


def averages_of(means: np.ndarray, sizes: list[int]) -> CoefficientAverages:
    averages = CoefficientAverages(sizes)
    averages.add(torch.from_numpy(means), np.arange(len(means)))
    return averages


def test_known_cases() -> None:
    even, single, few = np.ones(10), np.eye(10)[3], np.array([1.0, 0.05, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    found = Breadth.without_errors([even, single, few]).to_dict()
    assert found["effective"]["layers"][:2] == pytest.approx([1.0, 0.1])
    assert found["gini"]["layers"] == pytest.approx([0.0, 0.9, by_definition(few)[1]])
    assert found["dead"]["layers"] == pytest.approx([0.0, 0.9, 0.2])
    assert all(found[name]["standard_error"] is None and found[name]["half_differences"] == [] for name in BREADTHS)
    # Of unlike layers each counts by its memories.
    found = Breadth.without_errors([np.ones(30), single]).to_dict()
    assert found["dead"]["value"] == pytest.approx(0.9 * 10 / 40) and found["dead_below"] == 0.1


def uneven(change: float) -> OLMo:
    """A model with memories on either side of the threshold of dead ones, and one that resembles it."""
    model = made_model(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for block in model.blocks:
            block.ff_proj.weight[:48] *= torch.linspace(0.05, 1.0, 48)[:, None]
            block.ff_proj.weight *= 1 + change * torch.randn(block.ff_proj.weight.shape, generator=generator)
    return model


def test_a_measured_checkpoint_by_definition(tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(series, "draw", lambda *_: None)
    folders = [write(tmp_path / f"step{n}", uneven(change)) for n, change in enumerate((0.0, 0.5))]
    run("--checkpoint", *folders, "--data", tokens, "--data_size", SIZE, "--output", tmp_path / "out")
    groups, layers_of = np.arange(SIZE), []
    for change, folder in zip((0.0, 0.5), folders):
        theirs = to_transformers(uneven(change))
        each = torch.stack(
            [direct(theirs, olmo_places(), [row]) for row in rows_of(tokens)[:SIZE]]
        ).numpy()  # (N, L, M)
        chosen = [np.isin(groups, np.flatnonzero(half)) for split in SPLITS for half in (split, ~split)]
        layers_of.append([each.mean(0), *(each[half].mean(0) for half in chosen)])
        values = np.array([[by_definition(layer) for layer in average] for average in layers_of[-1]])  # (1 + 2S, L, 3)
        halves = (values[1::2] - values[2::2]) / 2
        found = result_in(tmp_path / "out" / folder.name)["breadth"]
        for place, name in enumerate(BREADTHS):
            one = found[name]
            # The model computes in float32: a count may differ where a coefficient is next to the threshold.
            near = {"abs": 1.01 / 96, "rel": 1e-5} if name == "dead" else {"abs": 1e-9, "rel": 1e-5}
            assert 0 < one["standard_error"] < 0.1
            assert one["value"] == pytest.approx(values[0, :, place].mean(), **near)
            assert one["layers"] == pytest.approx(values[0, :, place].tolist(), **{**near, "abs": 2 * near["abs"]})
            wanted = np.sqrt((halves[:, :, place].mean(1) ** 2).mean())
            assert one["standard_error"] == pytest.approx(wanted, rel=0.05 if name == "dead" else 1e-2)
            wanted = np.sqrt((halves[:, 1, place] ** 2).mean())
            assert one["layer_standard_errors"][1] == pytest.approx(wanted, rel=0.05 if name == "dead" else 1e-2)
    shares = [
        np.mean([len(most_active(one) & most_active(other)) / round(0.1 * 48) for one, other in zip(*pair)])
        for pair in zip(*layers_of)
    ]
    found = overlap(*(read_coefficients(tmp_path / "out" / folder.name / FILE).most_active for folder in folders))
    assert 0 < shares[0] < 1 and found["value"] == pytest.approx(shares[0])
    halves = (np.array(shares[1::2]) - shares[2::2]) / 2
    assert found["standard_error"] == pytest.approx(2**0.25 * np.sqrt((halves**2).mean()), rel=0.1)


@pytest.mark.parametrize("instances", [2, 63, 64, 640])
def test_half_samples_of_a_mean_give_the_error_of_the_pairs(instances: int) -> None:
    """For a mean over groups of one size it is the root of the summed squares of the pairs' differences, over their
    number; without a split there is none."""
    values = np.random.default_rng(0).normal(5.0, 1.0, (instances, 1)).astype(np.float32)
    halves = np.array(list(_halves(averages_of(values, [1])))).reshape(-1, 2, 1)
    assert len(halves) == 32
    error = half_sample_error((halves[:, 0] - halves[:, 1]) / 2)
    if instances % 2:  # the halves differ by one
        assert error == pytest.approx(1 / np.sqrt(instances), rel=0.4)
        return
    groups = min(instances, 64)
    means = [values[group::64].astype(np.float64).mean() for group in range(groups)]
    pairs = np.array(means[::2]) - means[1::2]
    assert error == pytest.approx(np.sqrt((pairs**2).sum()) / groups)
    assert not list(_halves(averages_of(values[:1], [1])))


def test_errors_are_those_of_repeated_samples() -> None:
    """A count beyond a threshold changes in steps; the jackknife that leaves out one of 64 groups gives three times the
    error of `dead` and of the overlap."""
    generator = np.random.default_rng(0)
    level = generator.lognormal(0, 1, 256)
    levels, found, errors = [level, level * generator.lognormal(0, 0.15, 256)], [], []
    for _ in range(40):
        noise = generator.lognormal(0, 0.7, (64, 256))
        one, other = (Breadth.of(averages_of((noise * level).astype(np.float32), [256])) for level in levels)
        numbers, shared = one.to_dict(), overlap(one.most_active, other.most_active)
        found.append([numbers[name]["value"] for name in BREADTHS] + [shared["value"]])
        errors.append([numbers[name]["standard_error"] for name in BREADTHS] + [shared["standard_error"]])
    ratio = np.sqrt(np.mean(np.square(errors), 0)) / np.std(found, 0, ddof=1)
    assert (ratio > 0.7).all() and (ratio < 1.3).all(), ratio


def test_files_without_the_sets_are_read_and_damaged_ones_refused(tokens: Path, shared: Path, tmp_path: Path) -> None:
    run("--checkpoint", shared, "--data", tokens, "--data_size", 9, "--output", tmp_path)
    kept = load_file(tmp_path / FILE)
    assert kept["most_active_memories"].shape == (65, 12)
    average = kept["mlp_average_coefficients"].double().numpy()
    save_file({"mlp_average_coefficients": kept["mlp_average_coefficients"]}, tmp_path / FILE)
    assert read_coefficients(tmp_path / FILE).most_active is None
    alone = Breadth.without_errors(list(average))
    assert (alone.most_active[0] == kept["most_active_memories"].numpy()[0]).all()
    assert overlap(alone.most_active, kept["most_active_memories"].numpy()) == {"value": 1.0, "standard_error": None}
    for damaged in (kept["most_active_memories"][:, 1:], kept["most_active_memories"].float()):
        save_file({**kept, "most_active_memories": damaged.contiguous()}, tmp_path / FILE)
        with pytest.raises(ValueError, match=r"most_active_memories: expected uint8 of 12 columns$"):
            read_coefficients(tmp_path / FILE)
    # A single instance gives no error; JSON has no NaN.
    run("--checkpoint", shared, "--data", tokens, "--data_size", 1, "--output", tmp_path / "one")
    result = json.loads((tmp_path / "one/knowledge_entropy.json").read_text())
    assert result["breadth"]["gini"]["standard_error"] is None and result["breadth"]["gini"]["half_differences"] == []
    assert result["sequence_length"] == LENGTH
