"""`resuscitate` in place: the edit of the command, undone to the last bit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import knowledge_entropy as ke
from analysis import change_parameters, entropy_series
from analysis.models import open_model
from olmo.memory.locate import find_layers
from tests.analysis.measuring import LENGTH, made_model, rows_of, write
from tests.architectures import built

FAMILIES = ["OLMo", "Pythia", "OLMoE", "GPT-2"]  # rows, rows with a bias, experts, columns


def made(name: str) -> Any:
    return made_model(0) if name == "OLMo" else built(name, max_position_embeddings=LENGTH)


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    kinds = {torch.float32: torch.int32, torch.bfloat16: torch.int16}  # -0.0 equals 0.0, but is another bit
    return one.keys() == other.keys() and all(
        torch.equal(
            tensor.view(kinds.get(tensor.dtype, tensor.dtype)), other[name].view(kinds.get(tensor.dtype, tensor.dtype))
        )
        for name, tensor in one.items()
    )


@pytest.fixture(scope="module")
def rows(tokens: Path) -> np.ndarray:
    return rows_of(tokens)[:12]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FAMILIES)
def test_undo_restores_every_bit(name: str, dtype: torch.dtype, rows: np.ndarray) -> None:
    model = made(name).to(dtype)
    before, parameters = bits(model), list(model.parameters())
    result = ke.measure(model, rows)
    edit = ke.resuscitate(model, result, 0.5, 2.0)
    assert not same(bits(model), before) and ke.measure(model, rows).entropy != result.entropy
    assert all(one is other for one, other in zip(model.parameters(), parameters))
    for number, values in result.coefficients.items():
        wanted = torch.from_numpy(values.astype(np.float32))
        assert torch.equal(edit.selected[number], wanted <= wanted.quantile(0.5))
    edit.undo()
    assert same(bits(model), before)
    with ke.resuscitate(model, result, 0.3, 1.0, select="random", seed=3) as edit:
        assert not same(bits(model), before)
    assert same(bits(model), before) and repr(edit).endswith("undone)")
    with pytest.raises(KeyboardInterrupt), ke.resuscitate(model, result, 0.5, 3.0):
        raise KeyboardInterrupt
    assert same(bits(model), before)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_edit_is_that_of_the_command_on_what_save_wrote(name: str, rows: np.ndarray, tmp_path: Path) -> None:
    model = made(name)
    if name == "OLMo":
        write(tmp_path / "model", model)
    else:
        model.save_pretrained(tmp_path / "model")
    result = ke.measure(model, rows)
    result.save(tmp_path / "result")
    flags = ["--coefficients", str(tmp_path / "result"), "--resuscitation_ratio", "0.5", "--amplifying_factor", "2"]
    file = tmp_path / "edit.safetensors"
    change_parameters.main(["--checkpoint", str(tmp_path / "model"), *flags, "--output", str(file)])
    theirs = open_model(tmp_path / "model", torch.device("cpu"), torch.float32, file)
    ke.resuscitate(model, result, 0.5, 2.0)
    assert same(bits(model), bits(theirs))
    if name == "Pythia":
        entropy_series.main([str(tmp_path / "result"), "--output", str(tmp_path / "series")])

    ke.measure(model, rows).save(tmp_path / "edited")
    flags[1] = str(tmp_path / "edited")
    with pytest.raises(ValueError, match="measured on another checkpoint"):
        change_parameters.main(
            ["--checkpoint", str(tmp_path / "model"), *flags, "--output", str(tmp_path / "b.safetensors")]
        )


def test_an_optimizer_keeps_its_parameters(rows: np.ndarray) -> None:
    model = made("Pythia")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = torch.from_numpy(rows)
    ke.resuscitate(model, ke.measure(model, rows), 0.5, 2.0)
    other = copy.deepcopy(model)
    others = torch.optim.AdamW(other.parameters(), lr=1e-2)
    for one, its in ((model, optimizer), (other, others)):
        one(input_ids=ids, labels=ids).loss.backward()
        its.step()
    assert same(bits(model), bits(other))


def test_edits_are_undone_in_reverse_and_only_of_unchanged_weights(rows: np.ndarray) -> None:
    model = made("OLMo")
    before, result = bits(model), ke.measure(model, rows)
    first = ke.resuscitate(model, result, 0.5, 2.0)
    between = bits(model)
    with pytest.warns(UserWarning, match="measured on other weights"):
        second = ke.resuscitate(model, result, 0.5, 2.0, layers=[1])
    with pytest.raises(ValueError, match="1 later edit of this model must be undone first"):
        first.undo()
    second.undo()
    assert same(bits(model), between)
    with pytest.raises(ValueError, match="undone already"):
        second.undo()
    name = "transformer.blocks.0.ff_proj.weight"
    parameter = model.get_parameter(name)
    with torch.no_grad():
        parameter[0, 0] += 1
        with pytest.raises(ValueError, match=f"{name} has changed since the edit"):
            first.undo()
        parameter.copy_(between[name])
    first.undo()
    assert same(bits(model), before)


def test_a_seed_without_effect_is_a_warning(rows: np.ndarray) -> None:
    model = built("Llama")
    with pytest.warns(UserWarning, match="seed has no effect with select 'lowest'"):
        ke.resuscitate(model, ke.measure(model, rows), 0.5, 2.0, seed=3)


def test_an_edit_that_fails_changes_nothing(rows: np.ndarray) -> None:
    model = made("Pythia")
    with torch.no_grad():  # of the last layer, after the first one has been edited
        model.get_parameter("gpt_neox.layers.1.mlp.dense_h_to_4h.weight")[:, 0] = 1e10
    before, result = bits(model), ke.measure(model, rows)
    with pytest.raises(ValueError, match=r"exceeds torch\.float32; use a cap$"):
        ke.resuscitate(model, result, 0.5, 1e35)
    assert same(bits(model), before)
    for wrong in ({"ratio": 0.0}, {"factor": -1.0}, {"select": "best"}, {"layers": [7]}, {"threshold": "model"}):
        with pytest.raises(ValueError, match=str(next(iter(wrong.values()))).strip("[]")):
            ke.resuscitate(model, result, **{"ratio": 0.5, "factor": 2.0, **wrong})
    with pytest.raises(ValueError, match="result: str; expected a Result"):
        ke.resuscitate(model, "results/a", 0.5, 2.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="compare: str; expected a Result"):
        result.compare("results/a")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="multipliers for 48 memories, the layer has 80"):
        ke.resuscitate(made("GPT-2"), result, 0.5, 2.0)
    assert same(bits(model), before)


def test_observe_finds_what_measure_averages(rows: np.ndarray) -> None:
    model, ids = made("Pythia"), torch.from_numpy(rows)
    with ke.observe(model) as observation:
        model(input_ids=ids)
    result = ke.measure(model, rows)
    for number, means in enumerate(observation.means):
        np.testing.assert_allclose(means.double().mean(0).detach(), result.coefficients[number], rtol=1e-5)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert len(find_layers(model)) == 2
