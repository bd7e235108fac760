"""Entropy on a GPU: that of the CPU, eager and compiled, in every precision, and without waiting for the device."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import knowledge_entropy
from analysis.measure import measure
from analysis.other_entropies import instance_entropies
from olmo.data.masks import padded
from olmo.distributed import Ranks
from olmo.memory import CoefficientAverages, observe
from olmo.model import OLMo
from tests.analysis.measuring import made_model, result_in, run, write
from tests.reference import tiny_config, to_transformers
from tests.running import CPU

pytestmark = pytest.mark.gpu

LENGTHS = (64, 64, 64, 64, 40, 3, 64, 10, 7)


def random_rows(lengths: tuple[int, ...] = LENGTHS) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(0, 128, length) for length in lengths]


def model_of(dtype: torch.dtype = torch.float32) -> OLMo:
    torch.manual_seed(0)
    return OLMo(tiny_config()).eval().to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("coefficient", ["abs", "relu"])
def test_entropy_equals_that_of_the_cpu(device: torch.device, coefficient: str, dtype: torch.dtype) -> None:
    expected = measure(model_of(), random_rows(), 4, coefficient, CPU, Ranks())
    found = measure(model_of(dtype).to(device), random_rows(), 4, coefficient, device, Ranks())
    np.testing.assert_allclose(found.layers, expected.layers, atol=1e-5 if dtype == torch.float32 else 5e-3)
    np.testing.assert_array_equal(found.knowledge.counts, expected.knowledge.counts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("compiler")
def test_compiled_layers_have_the_same_entropy(cuda: torch.device, dtype: torch.dtype) -> None:
    """Two full batches of the usual length, of which one has a shorter row, and a last one of another shape."""
    rows, model = random_rows((64, 64, 64, 64, 64, 64, 30, 64, 64)), model_of(dtype).to(cuda)
    found, eager = (measure(model, rows, 4, "abs", cuda, Ranks(), compiled=compiled) for compiled in (True, False))
    np.testing.assert_allclose(found.layers, eager.layers, atol=1e-5 if dtype == torch.float32 else 1e-3)


def test_other_entropies_equal_those_of_the_cpu(device: torch.device) -> None:
    measures = ("knowledge", "attention", "next_token")
    expected, found = (
        measure(model_of().to(place), random_rows(), 4, "abs", place, Ranks(), measures=measures)
        for place in (CPU, device)
    )
    for name in measures[1:]:
        np.testing.assert_allclose(found.others[name].average, expected.others[name].average, rtol=1e-4)


def test_a_model_of_transformers_has_the_same_entropy(device: torch.device) -> None:
    """In memory, as other programs have it, and edited there."""
    rows = [row.tolist() for row in random_rows()]
    expected = knowledge_entropy.measure(model_of(), rows)
    theirs = to_transformers(model_of()).to(device)
    found = knowledge_entropy.measure(theirs, rows)
    np.testing.assert_allclose(found.layers, expected.layers, atol=1e-5)
    with knowledge_entropy.resuscitate(theirs, found, 0.5, 1.0):
        edited = knowledge_entropy.measure(theirs, rows)
    assert edited.entropy > found.entropy
    np.testing.assert_allclose(knowledge_entropy.measure(theirs, rows).layers, found.layers, atol=1e-7)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_command_measures_a_checkpoint(device: torch.device, tmp_path: Path, precision: str) -> None:
    folder = write(tmp_path / "checkpoint", made_model(0))
    np.concatenate(random_rows((32,) * 12)).astype("<u2").tofile(tmp_path / "tokens.npy")
    argv = ["--checkpoint", folder, "--data", tmp_path / "tokens.npy", "--data_size", 12, "--eager"]
    run(*argv, "--device", "cpu", "--output", tmp_path / "cpu")
    run(*argv, "--device", device, "--precision", precision, "--output", tmp_path / "device")
    expected, found = (result_in(tmp_path / name)["layers"] for name in ("cpu", "device"))
    np.testing.assert_allclose(found, expected, atol=1e-5 if precision == "fp32" else 5e-3)


def test_a_batch_does_not_wait_for_the_device(cuda: torch.device) -> None:
    model = model_of(torch.bfloat16).to(cuda)
    averages = CoefficientAverages([48, 48])
    with observe(model) as observation:

        def batch(rows: list[np.ndarray], numbers: np.ndarray) -> None:
            ids, mask = padded(rows, cuda)
            averages.add(instance_entropies(model, observation, ids, mask)["knowledge"], numbers)

        batch(random_rows()[:4], np.arange(4))  # allocates, and moves the sums to the device
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            batch(random_rows()[4:8], np.arange(4, 8))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert averages.instances == 8
