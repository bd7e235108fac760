"""Memory coefficients on a GPU: those of every architecture, and their means over tokens."""

from __future__ import annotations

import pytest
import torch

from olmo.memory.forward import token_means
from tests.architectures import ARCHITECTURES, built, observed, reference

pytestmark = pytest.mark.gpu

# Of a mixture, a token near the border between two experts has another one in bfloat16.
DENSE = [name for name, (_, shape, _) in ARCHITECTURES.items() if "num_experts" not in shape]


@pytest.mark.parametrize("variant", ["abs", "relu"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_coefficients_are_the_formulas(device: torch.device, name: str, variant: str) -> None:
    if (name, variant) == ("GPT-OSS", "relu"):
        pytest.skip("refused")
    model = built(name)
    wanted = reference(name, model, variant)
    for batch_size in (1, 3):
        found = observed(model.to(device), variant, batch_size)
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5 * float(wanted.max()))


@pytest.mark.parametrize("name", DENSE)
def test_coefficients_in_bfloat16_are_near_the_formulas(device: torch.device, name: str) -> None:
    model = built(name)
    wanted = reference(name, model, "abs")
    found = observed(model.bfloat16().to(device), "abs", 3)
    assert found.dtype == torch.float32
    assert (found - wanted).abs().mean() < 0.03 * wanted.mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [None, [300, 7, 1, 299]])
def test_means_over_tokens(device: torch.device, dtype: torch.dtype, lengths: list[int] | None) -> None:
    torch.manual_seed(0)
    coefficients = torch.randn(4, 300, 96, device=device, dtype=dtype)
    mask = None if lengths is None else (torch.arange(300) < torch.tensor(lengths)[:, None]).long()
    found = token_means(coefficients, None if mask is None else mask.to(device))
    counts = torch.ones(4, 300, dtype=torch.float64) if mask is None else mask.double()
    wanted = (coefficients.cpu().double().abs() * counts[..., None]).sum(1) / counts.sum(1, keepdim=True)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.cpu().double(), wanted, rtol=1e-5, atol=0)
