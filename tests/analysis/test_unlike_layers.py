"""Models whose layers differ in their memories: measured, stored and edited layer by layer.

The reference is that of tests/architectures.py: float64, each instance alone, hooks of its own, the formulas.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from analysis import change_parameters, entropy
from analysis.measure import measure
from analysis.results import read_coefficients
from analysis.series import gather, read_result
from olmo.config.model import ModelConfig
from olmo.distributed import Ranks
from olmo.eval.entropy import EntropyBatch
from olmo.exceptions import exit_status
from olmo.memory.rescaling import load_multipliers
from olmo.model.causal_lm import CausalLM
from scripts import convert
from tests.architectures import DEEPSEEK, EXPERTS, MLP, SMALL, gated, mixture, plain
from tests.running import CPU

INSTANCES, LENGTH = 20, 12
HYBRID = {"layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp"], "num_hidden_layers": 4}
MAMBA = {"mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 1, "ssm_state_size": 16, "chunk_size": 16}
# family -> configuration, how the coefficients of each layer that has memories are had, numbers of memories
CASES: dict[str, tuple[dict[str, Any], dict[int, Any], dict[int, int]]] = {
    "DeepseekV3": (
        {**SMALL, **EXPERTS, **DEEPSEEK, "num_hidden_layers": 3, "first_k_dense_replace": 1},
        {0: gated(MLP), 1: mixture(MLP, shared="shared_experts"), 2: mixture(MLP, shared="shared_experts")},
        {0: 48, 1: 84, 2: 84},
    ),
    "NemotronH": (
        {**SMALL, "head_dim": 8, **HYBRID, **MAMBA},
        dict.fromkeys((1, 3), plain("model.layers.{}.mixer.down_proj")),
        {1: 48, 3: 48},
    ),
}


@torch.no_grad()
def direct(model: nn.Module, places: dict[int, Any], rows: Sequence[np.ndarray]) -> dict[int, Tensor]:
    """Mean coefficients of each instance, (N, M_l), by the number of the layer, float64."""
    model = copy.deepcopy(model).double()
    model.set_experts_implementation("eager")  # type: ignore[operator]
    heard: dict[int, Tensor] = {}
    formulas = {}
    for number, place in places.items():
        module, formulas[number] = place(model, number)

        def hook(module: nn.Module, args: tuple[Tensor, ...], number: int = number) -> None:
            heard.setdefault(number, args[0].reshape(-1, args[0].shape[-1]))

        module.register_forward_pre_hook(hook)
    means: dict[int, list[Tensor]] = {number: [] for number in places}
    for row in rows:
        heard.clear()
        model(torch.from_numpy(row)[None], use_cache=False)
        for number, formula in formulas.items():
            means[number].append(formula(heard[number], "abs").mean(0))
    return {number: torch.stack(values) for number, values in means.items()}


def entropies(means: dict[int, Tensor]) -> list[float]:
    """H^l of the instances together."""
    shares = [values.mean(0) / values.mean(0).sum() for values in means.values()]
    return [-float(torch.xlogy(share, share).sum()) for share in shares]


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A measured checkpoint, its tokens, and what a direct computation finds."""
    config, places, sizes = CASES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    model = getattr(transformers, f"{request.param}ForCausalLM")(
        getattr(transformers, f"{request.param}Config")(**config)
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder / "model")
    rows = np.random.default_rng(0).integers(2, 128, (INSTANCES, LENGTH))
    rows.astype("<u2").tofile(folder / "tokens.npy")
    found = SimpleNamespace(model=model, folder=folder, places=places, sizes=sizes, rows=list(rows))
    found.result = measured(found, folder / "result")
    found.wanted = direct(model, places, found.rows)
    return found


def measured(case: SimpleNamespace, output: Path, *more: object) -> dict[str, Any]:
    argv = ["--checkpoint", case.folder / "model", "--data", case.folder / "tokens.npy", "--data_size", INSTANCES]
    entropy.main([str(a) for a in (*argv, "--sequence_length", LENGTH, "--output", output, *more)])
    return json.loads((output / "knowledge_entropy.json").read_text())


def test_every_layer_has_its_own_entropy_and_ceiling(case: SimpleNamespace) -> None:
    result, layers = case.result, entropies(case.wanted)
    np.testing.assert_allclose(result["layers"], layers, rtol=0, atol=1e-5)
    assert result["knowledge_entropy"] == pytest.approx(sum(layers), abs=1e-5)
    assert result["maximum"] == pytest.approx(sum(math.log(size) for size in case.sizes.values()), abs=1e-12)
    left_out = np.array(
        [
            entropies({n: values[torch.arange(INSTANCES) != k] for n, values in case.wanted.items()})
            for k in range(INSTANCES)
        ]
    )
    spread = ((left_out - left_out.mean(0)) ** 2).sum(0), ((left_out.sum(1) - left_out.sum(1).mean()) ** 2).sum()
    factor = (INSTANCES - 1) / INSTANCES
    np.testing.assert_allclose(result["layer_standard_errors"], np.sqrt(factor * spread[0]), rtol=1e-2)
    assert result["standard_error"] == pytest.approx(math.sqrt(factor * spread[1]), rel=1e-2)
    assert dict(zip(result["layer_numbers"], result["layer_sizes"])) == case.sizes
    depth = case.model.config.num_hidden_layers
    assert result["layers_without_memories"] == [number for number in range(depth) if number not in case.sizes]


def test_the_coefficients_are_stored_layer_by_layer(case: SimpleNamespace) -> None:
    file = case.folder / "result/mlp_average_coefficients.safetensors"
    tensors = load_file(file)
    bits = tensors.pop("most_active_memories")
    assert bits.shape[1] == -(-sum(case.sizes.values()) // 8)
    assert {name: len(values) for name, values in tensors.items()} == {
        f"mlp_average_coefficients.{number}": size for number, size in case.sizes.items()
    }
    for found in (read_coefficients(file).average, {int(n.rpartition(".")[2]): v for n, v in tensors.items()}):
        for number, values in case.wanted.items():
            torch.testing.assert_close(found[number].double(), values.mean(0), rtol=1e-4, atol=1e-6)


def test_a_series_numbers_layers_as_the_model_does(case: SimpleNamespace) -> None:
    file = case.folder / "result/knowledge_entropy.json"
    series = gather([(read_result(file), file)])
    assert series["rows"][0]["layer_numbers"] == list(case.sizes)
    [curve] = series["distributions"]
    assert curve.get("layer_numbers", [0, 1, 2]) == list(case.sizes)
    for shares, values in zip(curve["shares"], case.wanted.values()):
        average = values.mean(0)
        assert shares[0] == pytest.approx(float(average.max() / average.sum()), rel=1e-4)


def test_attention_entropy_is_refused_where_not_every_layer_has_attention(
    case: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--checkpoint", case.folder / "model", "--data", case.folder / "tokens.npy", "--data_size", "2"]
    argv += ["--sequence_length", "4", "--output", tmp_path, "--measures", "knowledge,attention"]
    status = exit_status(entropy.main, [str(a) for a in argv])
    said = capsys.readouterr().err
    if case.sizes.keys() == {0, 1, 2}:
        assert (
            status == 0 and len(json.loads((tmp_path / "knowledge_entropy.json").read_text())["attention_layers"]) == 3
        )
    else:
        assert status == 1 and "1 calls of scaled_dot_product_attention for 4 layers" in said.splitlines()[-1]


def test_a_model_in_training_has_the_same_entropies(case: SimpleNamespace) -> None:
    """`eval/{label}/layer_{n}`: n is the number of the layer in the model."""
    batch = EntropyBatch.__new__(EntropyBatch)
    batch.label, batch.rows = "first", case.rows
    model = CausalLM(case.model, ModelConfig(), [])
    found = batch.evaluate(model, 7, CPU, Ranks(), lambda count: None)
    layers = {f"eval/first/layer_{number}": h for number, h in zip(case.sizes, entropies(case.wanted))}
    assert found.keys() == {*layers, "eval/first/knowledge_entropy", "eval/first/standard_error"}
    assert {name: found[name] for name in layers} == pytest.approx(layers, abs=1e-5)
    assert found["eval/first/knowledge_entropy"] == pytest.approx(case.result["knowledge_entropy"], abs=1e-6)


def test_layers_of_any_width_by_hand() -> None:
    torch.manual_seed(0)
    model: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SMALL, "num_hidden_layers": 3})).eval()
    for number, size in ((0, 12), (2, 100)):
        config = transformers.LlamaConfig(**{**SMALL, "intermediate_size": size})
        model.model.layers[number].mlp = type(model.model.layers[number].mlp)(config)
    rows = [row[: 3 + number] for number, row in enumerate(np.random.default_rng(1).integers(2, 128, (9, LENGTH)))]
    found = measure(model, rows, 4, "abs", CPU, Ranks())
    wanted = direct(model, dict.fromkeys(range(3), gated(MLP)), rows)
    np.testing.assert_allclose(found.layers, entropies(wanted), rtol=0, atol=1e-6)
    assert found.to_dict()["maximum"] == pytest.approx(math.log(12 * 48 * 100), abs=1e-12)
    for number, values in wanted.items():
        np.testing.assert_allclose(found.coefficients[number], values.mean(0), rtol=1e-4, atol=1e-8)


# --- edits -------------------------------------------------------------------------------------------------------


def change(case: SimpleNamespace, output: Path, *more: object) -> int:
    argv = ["--checkpoint", case.folder / "model", "--coefficients", case.folder / "result", "--output", output]
    argv += ["--resuscitation_ratio", 0.5, "--amplifying_factor", 2, *more]
    return exit_status(change_parameters.main, [str(a) for a in argv])


def transcribed(case: SimpleNamespace, everywhere: bool = False) -> dict[int, Tensor]:
    """The multipliers of algorithm 1 with p = 0.5 and q = 2, row by row, from the stored coefficients."""
    stored = load_file(case.folder / "result/mlp_average_coefficients.safetensors")
    average = {number: stored[f"mlp_average_coefficients.{number}"].double().numpy() for number in case.sizes}
    limit = np.quantile(np.concatenate(list(average.values())), 0.5)
    result = {}
    for number, row in average.items():
        threshold = limit if everywhere else np.quantile(row, 0.5)
        result[number] = torch.tensor([2 * row.mean() / c if 0 < c <= threshold else 1.0 for c in row.tolist()])
    return result


@torch.no_grad()
def edited_by_hand(case: SimpleNamespace, multipliers: dict[int, Tensor]) -> nn.Module:
    """The model with its up projections multiplied, row by row."""
    model: Any = copy.deepcopy(case.model)
    for number, factors in multipliers.items():
        layer = model.model.layers[number]
        if not hasattr(layer, "mlp"):
            layer.mixer.up_proj.weight *= factors[:, None]
        elif number == 0:
            layer.mlp.up_proj.weight *= factors[:, None]
        else:  # experts of 12 memories, gates first; then the shared expert
            for expert in range(5):
                layer.mlp.experts.gate_up_proj[expert, 12:] *= factors[12 * expert : 12 * expert + 12, None]
            layer.mlp.shared_experts.up_proj.weight *= factors[60:, None]
    return model


def test_an_edit_is_algorithm_1_in_every_layer(
    case: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The multiplier file, the full state dict and the converted folder all make the model that is edited by hand."""
    wanted = transcribed(case)
    assert change(case, tmp_path / "edit.safetensors", "--verify") == 0
    shown = capsys.readouterr().out
    alive = sum(int((values != 1).sum()) for values in wanted.values())
    assert f": {alive} of {sum(case.sizes.values())} up-projection rows multiplied" in shown
    assert f"layer {min(case.sizes)}, the first one edited" in shown
    file = load_multipliers(tmp_path / "edit.safetensors")
    assert load_file(tmp_path / "edit.safetensors").keys() == {
        f"{name}.{number}" for name in ("multipliers", "selected") for number in case.sizes
    }
    for number, values in wanted.items():
        torch.testing.assert_close(file.values[number], values.float(), rtol=1e-6, atol=0)
    model = edited_by_hand(case, wanted)
    layers = entropies(direct(model, case.places, case.rows))
    found = measured(case, tmp_path / "one", "--resuscitation", tmp_path / "edit.safetensors")
    np.testing.assert_allclose(found["layers"], layers, rtol=0, atol=1e-4)
    assert abs(found["knowledge_entropy"] - case.result["knowledge_entropy"]) > 1e-2
    assert change(case, tmp_path / "edit.pt", "--format", "full") == 0
    found = measured(case, tmp_path / "two", "--resuscitation", tmp_path / "edit.pt")
    np.testing.assert_allclose(found["layers"], layers, rtol=0, atol=1e-4)
    argv = [case.folder / "model", tmp_path / "hf", "--to", "hf", "--resuscitation", tmp_path / "edit.safetensors"]
    assert exit_status(convert.main, [str(a) for a in argv]) == 0
    again = type(case.model).from_pretrained(tmp_path / "hf").state_dict()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(again[name], tensor, rtol=1e-6, atol=0)


def test_one_threshold_for_all_layers(case: SimpleNamespace, tmp_path: Path) -> None:
    assert change(case, tmp_path / "edit.safetensors", "--threshold", "global") == 0
    wanted, found = transcribed(case, everywhere=True), load_multipliers(tmp_path / "edit.safetensors")
    for number, values in wanted.items():
        torch.testing.assert_close(found.values[number], values.float(), rtol=1e-6, atol=0)


def test_layers_to_edit_are_those_of_the_model(
    case: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last = max(case.sizes)
    for select in ("random", "highest"):
        assert change(case, tmp_path / f"{select}.safetensors", "--layers", last, "--select", select) == 0
        marked = load_multipliers(tmp_path / f"{select}.safetensors").selected
        assert {number: int(values.sum()) for number, values in marked.items() if values.any()} == {
            last: case.sizes[last] // 2
        }
    capsys.readouterr()
    assert change(case, tmp_path / "none.safetensors", "--layers", last + 1) == 2
    held = "layers 0 to 2" if last == 2 else "layers 1, 3"
    assert capsys.readouterr().err == f"error: layers {last + 1}: the model has memories in {held}\n"


def test_an_edit_of_other_layers_does_not_fit(
    case: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert change(case, tmp_path / "edit.safetensors") == 0
    tensors = load_file(tmp_path / "edit.safetensors")
    about = {"resuscitation": json.dumps(load_multipliers(tmp_path / "edit.safetensors").about)}
    first = min(case.sizes)
    moved = {name.replace(f".{first}", ".2") if name.endswith(f".{first}") else name: t for name, t in tensors.items()}
    shorter = {name: values[:-1] if name.endswith(f".{first}") else values for name, values in tensors.items()}
    for other, said in (
        (moved, "the model has memories in layers"),
        (shorter, f"layer {first}: multipliers for 47 memories, the layer has 48"),
    ):
        save_file(other, tmp_path / "other.safetensors", metadata=about)
        argv = [case.folder / "model", tmp_path / "hf", "--to", "hf", "--resuscitation", tmp_path / "other.safetensors"]
        capsys.readouterr()
        assert exit_status(convert.main, [str(a) for a in argv]) == 1
        shown = capsys.readouterr().err.splitlines()
        assert shown[-1].startswith("error: ") and said in shown[-1]
