"""Which rows of a feed-forward part scale its coefficients, in the families whose parts have another form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from olmo.memory import instance_means, observe
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


@pytest.mark.parametrize("family", ["minimax_m3_vl_text", "bitnet", "inkling2_text"])
def test_coefficients_that_do_not_scale_are_refused(family: str) -> None:
    """Those of an up projection to which 1 is added or that is clamped, and those that are normalized."""
    if family not in CONFIG_MAPPING:
        pytest.skip("not in this release of transformers")
    model = built(family)
    with pytest.raises(ValueError, match=r"^model\.layers\.\d\.mlp\.\S+: cannot tell the up projection of th.* from"):
        up_projection(model, find_layers(model)[-1].parts[0])
    with pytest.raises(ValueError, match=r"^model\.layers\.\d\.mlp\.\S+: cannot tell gate and up projection"):
        observe(model, "relu").__enter__()


def test_coefficients_that_float16_rounds_tell_up_projection_and_gate_too() -> None:
    model: Any = built("llama").half()
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.mlp.up_proj.weight, std=1e-3)  # many coefficients are below 6e-5
        [part] = next(found for found in find_layers(model) if found.module is layer).parts
        assert up_projection(model, part) == (layer.mlp.up_proj, slice(None))


def test_of_gates_with_relu_either_projection_scales_and_relu_changes_nothing() -> None:
    model: Any = built("llama")
    for layer in model.model.layers:
        layer.mlp.act_fn = torch.nn.ReLU()
    with pytest.raises(ValueError, match="cannot tell the up projection of this layer from its gate"):
        up_projection(model, find_layers(model)[-1].parts[0])
    ids, mlp, wanted = torch.arange(4, 20)[None], model.model.layers[-1].mlp, []
    with torch.no_grad():
        with observe(model, "relu") as observation:
            found = instance_means(model, observation, ids)[-1]
        mlp.register_forward_hook(lambda _, args, __: wanted.append(mlp.gate_proj(*args).relu() * mlp.up_proj(*args)))
        model(input_ids=ids)
    torch.testing.assert_close(found, wanted[0].relu().mean(1))
