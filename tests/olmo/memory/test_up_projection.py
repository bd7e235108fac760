"""Which rows of a feed-forward part scale its coefficients, in the families whose parts have another form."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from olmo.memory.locate import find_layers
from olmo.memory.parts import Experts
from olmo.memory.up_projection import up_projection
from tests.families import built, measured


@pytest.mark.parametrize(
    "family", ["llama4_text", "jamba", "granitemoehybrid", "kimi_linear", "lfm2", "zaya", "recurrent_gemma"]
)
def test_coefficients_scale_with_their_rows(family: str) -> None:
    """Every part of the last layer, the others unchanged."""
    model: Any = built(family)
    before = measured(model)
    parts = find_layers(model)[-1].parts
    factors = {part.name: torch.linspace(0.5, 2.0, part.count) for part in parts}
    with torch.no_grad():
        for part in parts:
            module, rows = up_projection(model, part)
            assert part.gated
            if isinstance(part, Experts):
                own, matrix = factors[part.name].view(part.experts, -1), module.gate_up_proj
                by_row = matrix.mT if part.transposed else matrix
                by_row[:, rows] *= own[..., None]
            else:
                module.weight[rows] *= factors[part.name][:, None]
                if module.bias is not None:
                    module.bias[rows] *= factors[part.name]
    for name, means in measured(model).items():
        torch.testing.assert_close(means, before[name] * factors.get(name, 1.0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["minimax_m3_vl_text", "bitnet"])
def test_coefficients_that_do_not_scale_are_refused(family: str) -> None:
    """Those of an up projection to which 1 is added, and those that are normalized."""
    model = built(family)
    with pytest.raises(ValueError, match=r"^model\.layers\.\d\.mlp\.\S+: cannot tell the up projection of th.* from"):
        up_projection(model, find_layers(model)[-1].parts[0])
