"""The ways to compute the loss that the bench compares, on a small case."""

from __future__ import annotations

import pytest
import torch

from scripts.benchmarks.loss import Case, losses_here

CPU = torch.device("cpu")


@pytest.mark.parametrize("half", [False, True])
def test_all_losses_are_the_same_one(half: bool) -> None:
    case = Case(48, 16, 128, half, CPU)
    assert next(iter(losses_here(CPU))) == "ours, in parts"
    for name in losses_here(CPU):
        loss, gradients = case.errors(name)
        assert 0 < gradients < (2e-2 if half else 2e-6), name
        assert loss < (1e-2 if half else 1e-6), name  # torch's rounds it to bfloat16
        assert case.seconds(name)[0] > 0
