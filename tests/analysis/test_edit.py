"""What an edit writes, against the published algorithm, and what it does to a model."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from analysis import change_parameters
from olmo import checkpoint
from olmo.config import save_model_config
from olmo.files.tensors import read_tensors, write_olmo_safetensors
from olmo.memory.rescaling import load_multipliers
from olmo.model import OLMo
from scripts.benchmarks.processes import forget_peak, peak_bytes, run_in_subprocess
from tests.analysis.editing import LENGTH, MEMORIES, change, coefficients, measure, uneven_model, write
from tests.reference import table_of, tiny_config, to_transformers
from tests.running import CPU


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "tokens.npy"
    np.random.default_rng(0).integers(2, 128, 40 * LENGTH).astype("<u2").tofile(path)
    return path


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory, tokens: Path) -> Path:
    folder = write(tmp_path_factory.mktemp("measured") / "step90-unsharded", uneven_model())
    measure(folder, tokens)
    return folder


@pytest.fixture
def folder(tmp_path: Path, measured: Path) -> Iterator[Path]:
    """A measured checkpoint of the test's own."""
    yield Path(shutil.copytree(measured, tmp_path / "step90-unsharded"))


def published(state: dict[str, Tensor], average: Tensor, p: float, q: float) -> dict[str, Tensor]:
    """The published script, line by line: quantile, mask, multiply the masked rows of the first half of ff_proj."""
    edited = {name: tensor.clone() for name, tensor in state.items()}
    for layer in range(average.shape[0]):
        weight = edited[f"transformer.blocks.{layer}.ff_proj.weight"]
        up_projection = weight[: weight.shape[0] // 2]
        threshold = torch.quantile(average[layer], p)
        mask = average[layer] <= threshold
        multiplier = average[layer].mean() / average[layer] * q
        up_projection[mask] = up_projection[mask] * multiplier[mask].unsqueeze(1)
    return edited


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize(("p", "q"), [(0.5, 2.0), (0.5, 1.0), (0.25, 0.5), (1.0, 3.0)])
def test_the_full_state_dict_is_the_published_one_bit_for_bit(folder: Path, p: float, q: float) -> None:
    change(folder, p, q, "--format", "full")
    found = torch.load(folder / f"resuscitation_ratio{p}_amplifying{q}.pt", weights_only=True)
    wanted = published(dict(uneven_model().state_dict()), coefficients(folder), p, q)
    same(found, wanted)
    changed = {name for name in found if not torch.equal(found[name], uneven_model().state_dict()[name])}
    assert changed == {f"transformer.blocks.{layer}.ff_proj.weight" for layer in (0, 1)}


def test_the_default_is_a_small_file_of_the_published_name(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path.name for path in folder.iterdir()}
    argv = ["--checkpoint", str(folder), "--resuscitation_ratio", "0.5", "--amplifying_factor", "2"]
    change_parameters.main(argv)
    name = "resuscitation_ratio0.5_amplifying2.0.safetensors"
    assert {path.name for path in folder.iterdir()} == before | {name}
    made = load_multipliers(folder / name)
    assert table_of(made.values).shape == (2, MEMORIES) and made.values[0].dtype == torch.float32
    assert made.about["resuscitation_ratio"] == 0.5 and made.about["amplifying_factor"] == 2.0
    assert made.about["select"] == "lowest"
    assert (folder / name).stat().st_size < 2000
    assert capsys.readouterr().out == f"{folder / name}: 48 of 96 up-projection rows multiplied\n"


@pytest.mark.parametrize("select", ["lowest", "random", "highest"])
def test_both_formats_make_the_same_model(folder: Path, select: str) -> None:
    change(folder, 0.5, 2.0, "--select", select, "--seed", 3)
    change(folder, 0.5, 2.0, "--select", select, "--seed", 3, "--format", "full")
    stem = "resuscitation_ratio0.5_amplifying2.0"
    stem += {"lowest": "", "random": "_random_seed3", "highest": "_highest"}[select]
    models = []
    for suffix in (".safetensors", ".pt"):
        assert (folder / (stem + suffix)).is_file()
        config = tiny_config(max_sequence_length=LENGTH, resuscitation=stem + suffix)
        models.append(checkpoint.load_model(folder, CPU, config=config).state_dict())
    same(*models)


def test_the_controls_multiply_as_many_rows(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for select in ("lowest", "random", "highest"):
        change(folder, 0.3, 1.0, "--select", select)
    lines = capsys.readouterr().out.splitlines()
    assert len({line.split(": ")[1] for line in lines}) == 1
    change(folder, 0.3, 1.0, "--select", "random", "--seed", 1, "--output", folder / "other.safetensors")
    first = table_of(load_multipliers(folder / "resuscitation_ratio0.3_amplifying1.0_random.safetensors").values)
    assert not torch.equal(first, table_of(load_multipliers(folder / "other.safetensors").values))


def test_an_output_elsewhere_and_a_step_of_the_published_layout(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    place = Path("checkpoints/pretrained_1B/738020-unsharded")
    place.parent.mkdir(parents=True)
    folder.rename(place)
    argv = ["--step", "738020", "--resuscitation_ratio", "0.5", "--amplifying_factor", "2"]
    change_parameters.main(argv)
    assert (place / "resuscitation_ratio0.5_amplifying2.0.safetensors").is_file()
    change_parameters.main([*argv, "--output", "new/folder/edit.safetensors"])
    files = (place / "resuscitation_ratio0.5_amplifying2.0.safetensors", Path("new/folder/edit.safetensors"))
    assert torch.equal(*(table_of(load_multipliers(file).values) for file in files))


def test_the_published_coefficients_are_read(folder: Path) -> None:
    """`mlp_average_coefficients.pt` says nothing about its checkpoint; it is trusted, where ours are not there."""
    average = coefficients(folder).sqrt()
    torch.save(average, folder / "mlp_average_coefficients.pt")
    change(folder, 0.5, 2.0)
    [made] = folder.glob("resuscitation*")
    assert load_multipliers(made).about["coefficients"].endswith(".safetensors")
    (folder / "mlp_average_coefficients.safetensors").unlink()
    torch.save(average, folder / "mlp_average_coefficients.pt")
    change(folder, 0.5, 2.0, "--format", "full")
    found = torch.load(folder / "resuscitation_ratio0.5_amplifying2.0.pt", weights_only=True)
    same(found, published(dict(uneven_model().state_dict()), average, 0.5, 2.0))


def test_coefficients_may_lie_elsewhere(folder: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere.safetensors"
    (folder / "mlp_average_coefficients.safetensors").rename(moved)
    change(folder, 0.5, 2.0, "--coefficients", moved)
    assert (folder / "resuscitation_ratio0.5_amplifying2.0.safetensors").is_file()


def test_a_dead_memory_keeps_its_row_and_is_reported(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    average = coefficients(folder)
    average[1, 7] = 0.0
    torch.save(average, folder / "mlp_average_coefficients.pt")
    change(folder, 0.5, 2.0, "--coefficients", folder / "mlp_average_coefficients.pt", "--format", "full")
    shown = capsys.readouterr()
    assert "47 of 96" in shown.out or "48 of 96" in shown.out
    assert "1 dead memories (coefficient 0) keep their rows" in shown.out + shown.err
    found = torch.load(folder / "resuscitation_ratio0.5_amplifying2.0.pt", weights_only=True)
    name = "transformer.blocks.1.ff_proj.weight"
    assert torch.equal(found[name][7], uneven_model().state_dict()[name][7])
    assert all(torch.isfinite(tensor).all() for tensor in found.values())


def test_transformers_layout_of_the_same_weights(folder: Path, tmp_path: Path) -> None:
    to_transformers(uneven_model()).save_pretrained(tmp_path / "hf")
    given = folder / "mlp_average_coefficients.safetensors"
    change(tmp_path / "hf", 0.5, 2.0, "--coefficients", given)
    change(folder, 0.5, 2.0)
    name = "resuscitation_ratio0.5_amplifying2.0.safetensors"
    assert torch.equal(*(table_of(load_multipliers(place / name).values) for place in (tmp_path / "hf", folder)))


def test_entropy_rises_when_the_least_active_memories_are_raised_to_the_mean(
    folder: Path, tmp_path: Path, tokens: Path
) -> None:
    before = json.loads((folder / "knowledge_entropy.json").read_text())["knowledge_entropy"]
    after = {}
    for select in ("lowest", "highest"):
        change(folder, 0.5, 1.0, "--select", select)
        name = "resuscitation_ratio0.5_amplifying1.0" + ("" if select == "lowest" else "_highest") + ".safetensors"
        config = tiny_config(max_sequence_length=LENGTH, resuscitation=name)
        edited = checkpoint.load_model(folder, CPU, config=config)
        edited.config.resuscitation = None
        after[select] = measure(write(tmp_path / select, edited), tokens)
    assert after["lowest"] > before + 0.1
    # Raising to the mean what is below it, or lowering to it what is above, both even the layer out.
    assert after["highest"] > before + 0.1
    assert after["lowest"] != after["highest"]


def test_in_the_first_layer_edited_rows_come_to_the_mean_times_the_factor(
    folder: Path, tmp_path: Path, tokens: Path
) -> None:
    """Later layers see changed inputs; the first one does not."""
    average = coefficients(folder)
    change(folder, 0.5, 2.0)
    name = "resuscitation_ratio0.5_amplifying2.0.safetensors"
    edited = checkpoint.load_model(folder, CPU, config=tiny_config(max_sequence_length=LENGTH, resuscitation=name))
    edited.config.resuscitation = None
    measure(write(tmp_path / "edited", edited), tokens)
    again = coefficients(tmp_path / "edited")
    chosen = load_multipliers(folder / name).values[0] != 1
    assert chosen.sum() == MEMORIES // 2
    torch.testing.assert_close(again[0][chosen], (2 * average[0].mean()).expand(MEMORIES // 2), rtol=1e-5, atol=0)
    torch.testing.assert_close(again[0][~chosen], average[0][~chosen], rtol=1e-6, atol=0)


def test_each_setting_has_a_file_of_its_own(folder: Path) -> None:
    before = set(folder.iterdir())
    for more in ("--select random", "--select random --seed 3", "--threshold global", "--layers 0,1", "--cap 1.5"):
        change(folder, 0.5, 2.0, *more.split())
    names = {path.name.removeprefix("resuscitation_ratio0.5_amplifying2.0") for path in set(folder.iterdir()) - before}
    ends = ("_random", "_random_seed3", "_global", "_layers0-1", "_cap1.5")
    assert names == {f"{end}.safetensors" for end in ends}


def test_the_file_states_how_it_was_made(folder: Path) -> None:
    change(folder, 0.5, 2.0, "--layers", "1", "--cap", 3, "--threshold", "global")
    made = load_multipliers(next(folder.glob("resuscitation*")))
    sha = hashlib.sha256(coefficients(folder).numpy().tobytes()).hexdigest()
    assert made.about == {
        "resuscitation_ratio": 0.5,
        "amplifying_factor": 2.0,
        "select": "lowest",
        "seed": 0,
        "threshold": "global",
        "layers": [1],
        "cap": 3.0,
        "checkpoint_fingerprint": checkpoint.fingerprint(uneven_model().state_dict()),
        "coefficients": str(folder / "mlp_average_coefficients.safetensors"),
        "coefficients_sha256": sha,
    }
    assert torch.equal(made.selected[1], coefficients(folder)[1] <= coefficients(folder)[1].quantile(0.5))
    assert not made.selected[0].any() and made.values[1].max() == 3.0 and (made.values[0] == 1).all()


def test_temperatures_divide_the_same_coefficients(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--format temperature` of q gives the entropy that rows multiplied by u give: a coefficient divided by 1 / u."""
    change(folder, 0.5, 2.0, "--format", "temperature")
    assert capsys.readouterr().out.endswith("safetensors: 48 of 96 memories get a temperature\n")
    change(folder, 0.5, 2.0)
    name = "resuscitation_ratio0.5_amplifying2.0.safetensors"
    divisors = load_file(folder / f"temperature_MLP_{name}")["temperature_MLP"]
    torch.testing.assert_close(1 / divisors, table_of(load_multipliers(folder / name).values))
    ids = torch.arange(2, 2 + LENGTH)[None]
    models = [
        checkpoint.load_model(folder, CPU, config=tiny_config(max_sequence_length=LENGTH, **edit))
        for edit in ({"temperature_MLP": f"temperature_MLP_{name}"}, {"resuscitation": name})
    ]
    with torch.no_grad():
        torch.testing.assert_close(models[0](ids), models[1](ids), rtol=1e-4, atol=1e-5)


def test_a_full_state_dict_of_half_precision_is_the_published_one(folder: Path) -> None:
    weights = {name: tensor.bfloat16() for name, tensor in read_tensors(folder / "model.safetensors").items()}
    write_olmo_safetensors(folder / "model.safetensors", weights)
    torch.save(coefficients(folder), folder / "mlp_average_coefficients.pt")
    (folder / "mlp_average_coefficients.safetensors").unlink()
    change(folder, 0.5, 2.0, "--format", "full")
    average = torch.load(folder / "mlp_average_coefficients.pt")
    wanted = dict(weights)
    for layer, row in enumerate(
        average
    ):  # `up[mask] *= u[mask]` of the published script: a product in float32, rounded
        weight = wanted[f"transformer.blocks.{layer}.ff_proj.weight"] = weights[
            f"transformer.blocks.{layer}.ff_proj.weight"
        ].clone()
        mask, u = row <= torch.quantile(row, 0.5), row.mean() / row * 2
        weight[:MEMORIES][mask] = (weight[:MEMORIES][mask].float() * u[mask, None]).bfloat16()
    same(torch.load(folder / "resuscitation_ratio0.5_amplifying2.0.pt", weights_only=True), wanted)


def test_the_full_state_dict_of_a_transformers_folder_has_olmos_names(folder: Path, tmp_path: Path) -> None:
    to_transformers(uneven_model()).save_pretrained(tmp_path / "hf")
    change(
        tmp_path / "hf", 0.5, 2.0, "--format", "full", "--coefficients", folder / "mlp_average_coefficients.safetensors"
    )
    change(folder, 0.5, 2.0, "--format", "full")
    name = "resuscitation_ratio0.5_amplifying2.0.pt"
    same(torch.load(tmp_path / "hf" / name, weights_only=True), torch.load(folder / name, weights_only=True))


@pytest.mark.parametrize("form", ["multipliers", "full", "temperature"])
def test_another_checkpoints_coefficients_leave_nothing(folder: Path, tmp_path: Path, form: str) -> None:
    other = write(tmp_path / "other", uneven_model(1))
    before = set(other.iterdir())
    with pytest.raises(ValueError, match=f"measured on another checkpoint than {other}"):
        given = folder / "mlp_average_coefficients.safetensors"
        change(other, 0.5, 2.0, "--coefficients", given, "--format", form)
    assert set(other.iterdir()) == before


def test_several_layers_in_any_order_are_one_edit(folder: Path) -> None:
    change(folder, 0.5, 2.0, "--layers", "1,0-1,0")
    [path] = folder.glob("resuscitation*")
    assert path.name == "resuscitation_ratio0.5_amplifying2.0_layers0-1.safetensors"
    assert load_multipliers(path).about["layers"] == [0, 1]


def _peak_of_multipliers(folder: Path, queue: Any) -> None:
    before = forget_peak()
    change(folder, 0.5, 2.0)
    queue.put(peak_bytes() - before)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").is_file(), reason="only Linux forgets a peak of memory")
def test_multipliers_take_little_memory(tmp_path: Path) -> None:
    """At most 0.35 of the weights, whose fingerprint is computed tensor by tensor."""
    config = tiny_config(n_layers=16, d_model=128, mlp_hidden_size=16384)
    save_model_config(tmp_path / "config.yaml", config)
    state = OLMo.empty(config).to_empty(device="cpu").state_dict()
    for tensor in state.values():
        tensor.fill_(0.5)
    torch.save(state, tmp_path / "model.pt")
    size = (tmp_path / "model.pt").stat().st_size
    torch.save(torch.rand(16, 8192) + 0.01, tmp_path / "mlp_average_coefficients.pt")
    assert size > 200e6 and run_in_subprocess(_peak_of_multipliers, tmp_path) < 0.35 * size
