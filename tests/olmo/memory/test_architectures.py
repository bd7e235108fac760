"""Memory coefficients of every architecture against the formula."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from olmo.memory import CoefficientAverages, layer_entropy
from tests.architectures import ARCHITECTURES, built, observed, reference


@pytest.mark.parametrize("variant", ["abs", "relu"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_coefficients_and_entropy_are_the_formulas(name: str, variant: str) -> None:
    model = built(name)
    if (name, variant) == ("GPT-OSS", "relu"):
        with pytest.raises(ValueError, match=r"^model\.layers\.0\.mlp\.experts\.down_proj: cannot tell gate and up"):
            observed(model, variant, 3)
        return
    wanted = reference(name, model, variant)
    for batch_size in (1, 3):
        found = observed(model, variant, batch_size)
        assert found.dtype == torch.float32 and found.shape == wanted.shape
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-6 * float(wanted.max()))
        averages = CoefficientAverages([found.shape[2]] * found.shape[1])
        averages.add(found.flatten(1), np.arange(len(found)))
        average = wanted.mean(0)
        p = average / average.sum(1, keepdim=True)
        entropy = -torch.xlogy(p, p).sum(1)
        np.testing.assert_allclose([*averages.layers.values()], average, rtol=1e-4, atol=1e-6 * float(average.max()))
        np.testing.assert_allclose(layer_entropy(averages.layers.values()), entropy, rtol=0, atol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("name", ["OLMoE", "Qwen2-MoE"])
def test_every_implementation_of_experts_has_the_same_coefficients(name: str, implementation: str) -> None:
    model = built(name)
    model.set_experts_implementation(implementation)
    wanted = reference(name, model, "abs")
    torch.testing.assert_close(observed(model, "abs", 3).double(), wanted, rtol=1e-4, atol=1e-6 * float(wanted.max()))


def test_coefficients_of_a_mixture_in_bfloat16_are_reduced_in_float32() -> None:
    model = built("Qwen2-MoE", moe_intermediate_size=16, shared_expert_intermediate_size=24)
    wanted = reference("Qwen2-MoE", model, "abs")
    found = observed(model.bfloat16(), "abs", 3)
    assert found.dtype == torch.float32
    # A token near the border between two experts may go to the other one.
    assert (found - wanted).abs().mean() < 0.1 * wanted.mean()
