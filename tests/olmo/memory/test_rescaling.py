"""Rescaling rows of up projections: exactly those rows, in our models and in those of other families, and its file."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from analysis.resuscitation import resuscitate
from olmo.memory.locate import find_memories
from olmo.memory.rescaling import Multipliers, load_multipliers, rescale, rescale_model, up_projection_name
from olmo.model import OLMo
from tests.architectures import ARCHITECTURES, built, observed
from tests.reference import by_layer, table_of, tiny_config


def test_only_up_rows_change_and_they_change_exactly() -> None:
    torch.manual_seed(0)
    state = OLMo(tiny_config(include_bias=True)).state_dict()
    state = {name: torch.randn_like(tensor) for name, tensor in state.items()}
    before = {name: tensor.clone() for name, tensor in state.items()}
    multipliers = torch.ones(2, 48)
    multipliers[0, [0, 5, 47]] = torch.tensor([2.5, 0.3, 7.0])
    multipliers[1, 11] = 3.0
    edited = rescale(state, by_layer(multipliers))
    assert edited.keys() == before.keys()
    for name, tensor in before.items():
        wanted = tensor.clone()
        for layer in range(2):
            if name in (f"transformer.blocks.{layer}.ff_proj.weight", f"transformer.blocks.{layer}.ff_proj.bias"):
                for row in range(48):
                    wanted[row] = tensor[row] * multipliers[layer, row]
        assert torch.equal(edited[name], wanted), name
        assert torch.equal(state[name], tensor), "the state that came in was changed"
    changed = {name for name in before if not torch.equal(edited[name], before[name])}
    assert changed == {f"transformer.blocks.{layer}.ff_proj.{p}" for layer in (0, 1) for p in ("weight", "bias")}
    # Rows of multiplier 1 and the whole gate keep every bit, and what is untouched is not copied.
    assert torch.equal(edited[up_projection_name(0)][48:], before[up_projection_name(0)][48:])
    assert edited["transformer.wte.weight"] is state["transformer.wte.weight"]


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("factor", [0.5, 1.0, 3.0])
def test_edited_rows_reach_the_mean_times_the_factor_in_the_edited_layer(layer: int, factor: float) -> None:
    torch.manual_seed(0)
    model = OLMo(tiny_config(n_layers=3)).eval()
    with torch.no_grad():
        for block in model.blocks:  # uneven rows: some memories are much stronger than others
            block.ff_proj.weight[:48] *= torch.logspace(-1, 1, 48)[:, None]
    average = observed(model, "abs", 3).double().mean(0)
    chosen = resuscitate(by_layer(average.float()), 0.5, factor)
    multipliers = torch.ones(3, 48)
    multipliers[layer] = chosen.multipliers[layer]
    model.load_state_dict(rescale(model.state_dict(), by_layer(multipliers)))
    after = observed(model, "abs", 3).double().mean(0)
    rows = chosen.selected[layer]
    assert rows.sum() == 24
    wanted = (factor * average[layer].mean()).expand(24)
    torch.testing.assert_close(after[layer][rows], wanted, rtol=1e-5, atol=0)
    torch.testing.assert_close(after[layer][~rows], average[layer][~rows], rtol=1e-5, atol=0)
    torch.testing.assert_close(after[:layer], average[:layer], rtol=1e-5, atol=0)


def test_multipliers_of_another_shape_are_refused() -> None:
    state = OLMo(tiny_config()).state_dict()
    with pytest.raises(ValueError, match="multipliers for layers 0 to 2, the model has memories in layers 0, 1"):
        rescale(state, by_layer(torch.ones(3, 48)))
    with pytest.raises(ValueError, match="multipliers for layer 0, the model has memories in layers 0, 1"):
        rescale(state, by_layer(torch.ones(1, 48)))
    # Anything but half the rows of a swiglu layer would edit gate rows or leave up rows out.
    for memories in (24, 47, 49, 96, 97):
        said = f"layer 0: multipliers for {memories} memories, the layer has 48"
        with pytest.raises(ValueError, match=said):
            rescale(state, by_layer(torch.ones(2, memories)))


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_rows_of_half_precision_are_rounded_once(kind: torch.dtype) -> None:
    """As `rows * multiplier` of a float32 multiplier gives, assigned to those rows: the published script's way."""
    torch.manual_seed(0)
    name = up_projection_name(0)
    state = {key: torch.randn_like(tensor).to(kind) for key, tensor in OLMo(tiny_config()).state_dict().items()}
    multipliers = torch.rand(2, 48) * 3 + 0.1
    found = rescale(state, by_layer(multipliers))[name]
    assert found.dtype == kind
    assert torch.equal(found[:48].double(), (state[name][:48] * multipliers[0][:, None]).to(kind).double())
    assert torch.equal(found[48:], state[name][48:])


def test_weights_that_lack_a_layers_part_are_refused() -> None:
    state = OLMo(tiny_config()).state_dict()
    del state["transformer.blocks.1.ff_out.weight"]
    with pytest.raises(ValueError, match=r"blocks\.1\.ff_out\.weight: missing among the weights"):
        rescale(state, by_layer(torch.ones(2, 48)))


# --- multiplier files --------------------------------------------------------------------------------------------


def test_multiplier_files_round_trip(tmp_path: Path) -> None:
    values = torch.rand(2, 48) + 0.5
    about = {"resuscitation_ratio": 0.5, "checkpoint_fingerprint": "f"}
    Multipliers(by_layer(values), by_layer(values > 1), about).save(tmp_path / "m.safetensors")
    loaded = load_multipliers(tmp_path / "m.safetensors")
    assert torch.equal(table_of(loaded.values), values) and torch.equal(table_of(loaded.selected), values > 1)
    assert loaded.about == {"resuscitation_ratio": 0.5, "checkpoint_fingerprint": "f"}
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]


def test_files_that_hold_no_multipliers_are_refused(tmp_path: Path) -> None:
    path, about = tmp_path / "m.safetensors", {"resuscitation": json.dumps({})}
    with pytest.raises(FileNotFoundError, match=r"m\.safetensors: no such file"):
        load_multipliers(path)
    for tensors, metadata in (
        ({"multipliers": torch.ones(2, 3), "selected": torch.ones(2, 3)}, None),
        ({"multipliers": torch.ones(2, 3), "selected": torch.ones(2, 3)}, {"resuscitation": "[]"}),
        ({"else": torch.ones(2, 3)}, about),
        ({"multipliers": torch.ones(2, 3)}, about),
        ({"multipliers": torch.ones(2, 3), "selected": torch.ones(3, 2)}, about),
        ({"multipliers": torch.ones(3), "selected": torch.ones(3)}, about),
        ({"multipliers": torch.tensor([[1.0, math.inf]]), "selected": torch.ones(1, 2)}, about),
        ({"multipliers": torch.tensor([[1.0, math.nan]]), "selected": torch.ones(1, 2)}, about),
    ):
        save_file(tensors, path, metadata=metadata)
        with pytest.raises(ValueError, match=r"m\.safetensors: "):
            load_multipliers(path)
    path.write_bytes(b"no safetensors")
    with pytest.raises(ValueError, match=r"m\.safetensors: not a multiplier file"):
        load_multipliers(path)


# --- other families ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "GPT-OSS"])
def test_rows_of_every_architecture(name: str) -> None:
    """Coefficients of a gated layer scale by the factors; of a plain one its first projection does, bias and all."""
    model = built(name)
    layers = find_memories(model)
    factors = torch.ones(len(layers), sum(part.count for part in layers[0]))
    factors[0, ::3] = torch.linspace(0.25, 4, len(factors[0, ::3]))
    before = observed(model, "abs", 3)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    rescale_model(model, by_layer(factors))
    after = observed(model, "abs", 3)
    changed = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, state[key])}
    if layers[0][0].gated:
        torch.testing.assert_close(after[:, 0], before[:, 0] * factors[0], rtol=1e-5, atol=1e-6)
        assert len(changed) == len(layers[0])  # routed and shared experts
        return
    for key in changed:
        tensor, by_row = model.state_dict()[key], state[key]
        if name == "GPT-2" and key.endswith("weight"):
            tensor, by_row = tensor.T, by_row.T
        wanted = by_row * factors[0].view(-1, *[1] * (by_row.ndim - 1))
        torch.testing.assert_close(tensor, wanted, rtol=1e-6, atol=0)
    assert {key.rpartition(".")[2] for key in changed} == ({"weight"} if "Falcon" in name else {"weight", "bias"})


def test_experts_whose_coefficients_do_not_scale_are_refused() -> None:
    model = built("GPT-OSS")  # its coefficients are (up + 1) times a function of the gate
    with pytest.raises(
        ValueError, match=r"experts\.down_proj: cannot tell the up projection of these experts from their"
    ):
        rescale_model(model, by_layer(torch.full((2, 240), 2.0)))


def test_multipliers_of_another_family_must_fit() -> None:
    with pytest.raises(ValueError, match="layer 0: multipliers for 47 memories, the layer has 48"):
        rescale_model(built("Llama"), by_layer(torch.ones(2, 47)))


def test_a_gate_whose_activation_is_linear_cannot_be_told_from_the_up_projection() -> None:
    model = built("Llama", hidden_act="relu")  # relu(2 g) is 2 relu(g)
    with pytest.raises(ValueError, match="cannot tell the up projection of this layer from its gate"):
        rescale_model(model, by_layer(torch.full((2, 48), 2.0)))


def test_a_layer_that_wants_more_than_tokens_cannot_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    model = built("Llama")
    monkeypatch.setattr(model.model.layers[1].mlp, "forward", lambda tokens, routes: tokens)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj: cannot tell the up projection of this layer"):
        rescale_model(model, by_layer(torch.full((2, 48), 2.0)))
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
