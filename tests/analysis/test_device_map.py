"""Models that are spread over devices, on a machine that has a CPU and a disk: the numbers are those of one device."""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import knowledge_entropy
from analysis import entropy
from analysis.choices import EDITS
from analysis.models import open_model
from analysis.results import find_result
from olmo.checkpoint import identity_of, spread
from olmo.checkpoint.weights import identity_of_model
from olmo.exceptions import exit_status
from olmo.memory.rescaling import Multipliers
from olmo.model import OLMo
from olmo.model.placement import copied
from tests.analysis.measuring import LENGTH, coefficients_in, made_model, result_in, run, write
from tests.architectures import built
from tests.reference import tiny_config, to_transformers

CPU = torch.device("cpu")
ALL = ("--measures", "knowledge,attention,next_token")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("spread")
    for name in ("Llama", "Mixtral", "Qwen2-MoE", "GPT-OSS"):
        built(name).save_pretrained(place / name)
    built("Llama", tie_word_embeddings=True).save_pretrained(place / "tied")
    write(place / "OLMo", made_model(3))
    to_transformers(made_model(3)).save_pretrained(place / "OLMo of transformers")
    torch.manual_seed(1)
    learned = tiny_config(max_sequence_length=LENGTH, rope=False, embedding_layer_norm=True, weight_tying=False)
    write(place / "learned positions", OLMo(learned).eval())
    return {path.name: path for path in place.iterdir()}


def written(path: Path, device_map: Any) -> Path:
    path.write_text(json.dumps(device_map))
    return path


def same(one: Path, other: Path) -> None:
    """Whether two results differ in nothing but the map; all their numbers to the last bit."""
    first, second = result_in(one), result_in(other)
    assert second.pop("device_map")
    assert first == second
    assert torch.equal(coefficients_in(one), coefficients_in(other))


@pytest.mark.parametrize(
    ("name", "device_map", "flags"),
    [
        ("Llama", {"": "cpu"}, ALL),
        ("Llama", {"": "disk"}, ALL),
        ("Llama", {"": "cpu", "model.layers.0": "disk"}, ("--coefficient", "relu")),
        ("Llama", {"": "cpu", "model.layers.1.mlp.down_proj": "disk"}, ("--precision", "bf16")),
        ("tied", {"": "disk"}, ALL),
        ("Mixtral", {"": "cpu", "model.layers.1": "disk"}, ()),
        ("Qwen2-MoE", {"": "disk"}, ("--coefficient", "relu")),
        ("GPT-OSS", {"": "cpu", "model.layers.0": "disk"}, ()),
        ("OLMo", {"": "cpu", "transformer.blocks.0": "disk"}, ALL),
        ("OLMo", {"": "disk"}, ("--coefficient", "relu", "--precision", "bf16")),
        ("OLMo of transformers", {"": "cpu", "transformer.blocks.1": "disk"}, ("--precision", "bf16")),
        ("learned positions", {"": "disk"}, ALL),
        ("OLMo", {"": "disk"}, ("--temperature_attention", "1.5", "--tolerance", "10")),
    ],
)
def test_the_numbers_are_those_of_one_device(
    folders: dict[str, Path],
    tokens: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    device_map: Any,
    flags: tuple[str, ...],
) -> None:
    size = 64 if "--tolerance" in flags else 9  # where the first check is
    which = ("--checkpoint", folders[name], "--data", tokens, "--data_size", size, "--sequence_length", 12)
    run(*which, *flags, "--output", tmp_path / "one")
    where = written(tmp_path / "map.json", device_map)
    capsys.readouterr()
    run(*which, *flags, "--output", tmp_path / "two", "--device_map", where)
    assert ": device map: " in (error := capsys.readouterr().err) and "meta device" not in error
    same(tmp_path / "one", tmp_path / "two")
    places = set(result_in(tmp_path / "two")["device_map"].values())
    assert places == set(device_map.values())


def test_what_does_not_fit_is_on_the_disk(
    folders: dict[str, Path], tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OLMo", "Llama"):
        size = sum(file.stat().st_size for file in folders[name].glob("model.safetensors"))
        monkeypatch.setattr("accelerate.utils.get_max_memory", lambda size=size: {"cpu": size * 0.8})
        which = ("--checkpoint", folders[name], "--data", tokens, "--data_size", 6, "--sequence_length", 12)
        run(*which, "--output", tmp_path / "one")
        run(*which, "--output", tmp_path / "two", "--device_map", "auto")
        assert set(result_in(tmp_path / "two")["device_map"].values()) == {"cpu", "disk"}
        same(tmp_path / "one", tmp_path / "two")
        shutil.rmtree(tmp_path / "one"), shutil.rmtree(tmp_path / "two")


@pytest.mark.parametrize("name", ["OLMo", "Llama"])
def test_from_python(folders: dict[str, Path], name: str) -> None:
    rows = [list(range(2, 2 + n)) for n in (9, 4, 12)]
    one = knowledge_entropy.measure(folders[name], rows)
    two = knowledge_entropy.measure(folders[name], rows, device_map={"": "disk"})
    assert two.entropy == one.entropy and np.array_equal(one.coefficients[1], two.coefficients[1])
    # A model that a program has spread itself is known by its weights, wherever they are.
    model = open_model(folders[name], CPU, torch.float32, device_map={"": "disk"})
    assert all(parameter.is_meta for layer in list(model.modules())[-3:] for parameter in layer.parameters(False))
    three = knowledge_entropy.measure(model, rows)
    assert three.entropy == one.entropy and three.content["device_map"] == {"": "disk"}
    assert identity_of_model(model) == identity_of_model(open_model(folders[name], CPU, torch.float32))
    for arguments in ({"device": "cpu"}, {"device_map": "balanced"}, {"device_map": {}}, {"device_map": 0}):
        with pytest.raises(ValueError, match=r"^device(_map)?: [^\n]*$"):
            knowledge_entropy.measure(folders[name], rows, **{"device_map": "auto", **arguments})
    with pytest.raises(ValueError, match="device_map: only for a path"):
        knowledge_entropy.measure(model, rows, device_map="auto")


def test_edits(folders: dict[str, Path], tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    factors = {layer: torch.linspace(0.5, 4, 48) for layer in range(2)}
    where = written(tmp_path / "map.json", {"": "disk"})
    for name in ("OLMo", "Llama"):
        edit = tmp_path / f"{name}.safetensors"
        about = {"checkpoint_fingerprint": identity_of(folders[name])}
        Multipliers(factors, {layer: torch.ones(48, dtype=torch.bool) for layer in factors}, about).save(edit)
        which = ["--checkpoint", folders[name], "--data", tokens, "--data_size", 4, "--resuscitation", edit]
        which += ["--sequence_length", 12, "--output"]
        run(*which, tmp_path / "one")
        argv = [*map(str, which), str(tmp_path / "two"), "--device_map", str(where)]
        if name == "OLMo":
            run(*argv)
            same(tmp_path / "one", tmp_path / "two")
            shutil.rmtree(tmp_path / "one"), shutil.rmtree(tmp_path / "two")
            continue
        capsys.readouterr()
        assert exit_status(entropy.main, argv) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "cannot be edited" in error and "scripts.convert" in error
    model = open_model(folders["Llama"], CPU, torch.float32, device_map={"": "cpu", "model.layers.1": "disk"})
    result = knowledge_entropy.measure(model, [list(range(2, 14))])
    before = model.model.layers[0].mlp.up_proj.weight.clone()
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight: offloaded by a device map"):
        knowledge_entropy.resuscitate(model, result, 0.5, 2.0)
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, before)


def test_copies_leave_offloaded_weights_behind(folders: dict[str, Path]) -> None:
    model = open_model(folders["Llama"], CPU, torch.float32, device_map={"": "disk"})
    layer = model.model.layers[0]
    copy, down = copied((layer, layer.mlp.down_proj))
    assert down is copy.mlp.down_proj and down is not layer.mlp.down_proj
    assert hasattr(layer.mlp.down_proj, "_hf_hook")
    for module in copy.modules():
        assert "_hf_hook" not in vars(module) and module.forward.__func__ is type(module).forward


# --- errors ------------------------------------------------------------------------------------------------------


def refused(folders: dict[str, Path], tokens: Path, capsys: pytest.CaptureFixture[str], *argv: Any) -> str:
    """The one line of an error."""
    capsys.readouterr()
    which = ("--checkpoint", folders["OLMo"], "--data", tokens, "--data_size", 4, "--output", "nowhere")
    assert exit_status(entropy.main, [str(a) for a in (*which, *argv)]) in (1, 2)
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"": "cpu", "transformer.blocks.9": "disk"}, "OLMo has no module 'transformer.blocks.9'"),
        ({"transformer.blocks.0": "cpu"}, "has no device for transformer.wte.weight; name it, or '' for the rest"),
        ({"": "cpu", "transformer.blocks.0.ff_out": "disk"}, "a layer of OLMo is on one device; name the layer"),
        ({"": 7}, "'' is on 7, no device of this machine"),
        ({"": "gpu"}, "'' is on 'gpu', no device of this machine"),
        ({"": None}, "'' is on None, no device of this machine"),
        ({}, "expected auto, or modules and their devices"),
        (["cpu"], "expected auto, or modules and their devices"),
    ],
)
def test_maps_that_do_not_fit(
    folders: dict[str, Path],
    tokens: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    given: Any,
    error: str,
) -> None:
    assert error in refused(folders, tokens, capsys, "--device_map", written(tmp_path / "map.json", given))


def test_other_errors(
    folders: dict[str, Path],
    tokens: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def error_of(*argv: Any) -> str:
        return refused(folders, tokens, capsys, *argv)

    assert "--device: no effect with --device_map" in error_of("--device_map", "auto", "--device", "cpu")
    assert "--eager: no effect with --device_map" in error_of("--device_map", "auto", "--eager")
    assert "balanced: neither auto nor a JSON file" in error_of("--device_map", "balanced")
    (tmp_path / "broken.json").write_text("{")
    assert "broken.json: not JSON" in error_of("--device_map", tmp_path / "broken.json")
    with monkeypatch.context() as patched:
        patched.setenv("WORLD_SIZE", "2")
        patched.setenv("RANK", "0")
        assert "--device_map: one process only" in error_of("--device_map", "auto")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(folders["Llama"])}))
    (adapter / "adapter_model.safetensors").touch()
    with pytest.raises(ValueError, match=r"adapter is an adapter, .* merge it first"):
        open_model(adapter, CPU, torch.float32, device_map="auto")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    assert "pip install 'knowledge-entropy[big]'" in error_of("--device_map", "auto")


def test_a_full_disk_is_named_and_nothing_is_left(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model = open_model(folders["Mixtral"], CPU, torch.float32, device_map={"": "disk"})
    assert any(next(tmp_path.iterdir()).iterdir())  # experts, which its files do not have as one tensor
    del model
    gc.collect()
    assert not list(tmp_path.iterdir())

    def full(*_: Any, **__: Any) -> None:
        raise ValueError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("transformers.integrations.accelerate.save_file", full)
    with pytest.raises(OSError, match=r"no space left for weights that are offloaded.*TMPDIR"):
        spread.spread_network(folders["Mixtral"], torch.float32, {"": "disk"})
    assert not list(tmp_path.iterdir())


# --- precision ---------------------------------------------------------------------------------------------------


def test_auto_is_the_type_of_the_files(
    folders: dict[str, Path], tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "bf16"
    model = built("Llama").to(torch.bfloat16)
    model.save_pretrained(folder)
    which = ("--data", tokens, "--data_size", 4, "--sequence_length", 12)
    run("--checkpoint", folder, *which, "--precision", "auto")
    auto = result_in(folder)
    assert (auto.pop("precision_asked"), auto["precision"]) == ("auto", "bf16")
    changed = os.stat(folder / "knowledge_entropy.json").st_mtime_ns
    for asked in ("bf16", "auto"):  # the same measurement under another word
        run("--checkpoint", folder, *which, "--precision", asked)
        assert os.stat(folder / "knowledge_entropy.json").st_mtime_ns == changed
    # What the type of weights that are not downloaded yet will be is no difference; whether it was asked for is.
    wanted = {key: auto[key] for key in ("checkpoint", "data", "coefficient", "tolerance", *EDITS)}
    for asked, found in (({}, True), ({"precision_asked": "auto"}, True), ({"precision_asked": "other"}, False)):
        assert (find_result(folder, {**wanted, **asked}, "", ("knowledge",), False) is not None) == found
    run("--checkpoint", folder, *which, "--precision", "bf16", "--output", tmp_path / "named")
    assert result_in(tmp_path / "named") == auto
    run("--checkpoint", folders["OLMo"], *which, "--precision", "auto", "--output", tmp_path / "olmo")
    assert result_in(tmp_path / "olmo")["precision"] == "fp32"
    model.model.norm.to(torch.float32)
    model.save_pretrained(tmp_path / "mixed")
    argv = ["--checkpoint", str(tmp_path / "mixed"), *map(str, which), "--precision", "auto"]
    assert exit_status(entropy.main, argv) in (1, 2)
    error = capsys.readouterr().err.splitlines()[-1]
    assert "bfloat16 (20 tensors) and float32 (1 tensors); name one type" in error


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["Llama", "Mixtral", "OLMo"])
def test_two_devices(folders: dict[str, Path], name: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    rows = [list(range(2, 2 + n)) for n in (9, 4, 12)]
    layers = "transformer.blocks" if name == "OLMo" else "model.layers"
    measures = ("knowledge", "attention", "next_token")
    one = knowledge_entropy.measure(folders[name], rows, device="cuda:0", measures=measures)
    for places in ({"": 0, f"{layers}.1": 1}, {"": 1, f"{layers}.0": "cpu"}, {"": 0, f"{layers}.1": "disk"}):
        two = knowledge_entropy.measure(folders[name], rows, device_map=places, measures=measures)
        np.testing.assert_allclose(two.layers, one.layers, rtol=0, atol=1e-6)
