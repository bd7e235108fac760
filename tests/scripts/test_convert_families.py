"""Edited folders of other families: transformers reads from them the model that hooks make of the unedited one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from analysis.change_parameters import main as change_parameters
from olmo.checkpoint import identity_of
from olmo.exceptions import exit_status
from olmo.files.lock import Lock
from olmo.memory.locate import find_memories
from olmo.memory.rescaling import Multipliers
from scripts.convert import main
from tests.architectures import LAYERS, built
from tests.reference import by_layer

IDS = torch.randint(2, 128, (2, 11), generator=torch.Generator().manual_seed(0))
GATED = dict.fromkeys(("Llama", "Qwen2", "Gemma 2", "Phi-3", "OLMo 2"), "model.layers.{}.mlp.down_proj")
PLAIN = {"Pythia": "gpt_neox.layers.{}.mlp.dense_h_to_4h", "GPT-2": "transformer.h.{}.mlp.c_fc"}  # first projections
MIXTURES = dict.fromkeys(("OLMoE", "Mixtral", "Qwen2-MoE"), "model.layers.{}.mlp")
FAMILIES = {**GATED, **PLAIN, **MIXTURES}


def folder_of(name: str, folder: Path) -> transformers.PreTrainedModel:
    """A tiny random model as its family's folder: many shards, and files that a copy has to keep."""
    model = built(name)
    model.save_pretrained(folder, max_shard_size="20KB")
    assert (folder / "generation_config.json").is_file() and (folder / "model.safetensors.index.json").is_file()
    for other in ("tokenizer.json", "merges.txt", "chat_template.jinja", "tokenizer.model"):
        (folder / other).write_text(f"that of {other}")
    (folder / "knowledge_entropy.json").write_text("{}")
    return model


def edit_of(model: nn.Module, folder: Path, file: Path) -> Tensor:
    """Write multipliers for the folder of a model, some of which are 1; returns them, (L, M)."""
    count = sum(part.count for part in find_memories(model)[0])
    values = 0.25 + 4 * torch.rand(LAYERS, count, generator=torch.Generator().manual_seed(1))
    values[:, ::3] = 1
    Multipliers(by_layer(values), by_layer(values != 1), {"checkpoint_fingerprint": identity_of(folder)}).save(file)
    return values


def routed(experts: Any, hidden: Tensor, chosen: Tensor, weights: Tensor, scale: Tensor) -> Tensor:
    """What routed experts write when coefficient i of expert e is multiplied by scale[e, i]."""
    written = torch.zeros_like(hidden)
    for token in range(len(hidden)):
        for expert, weight in zip(chosen[token].tolist(), weights[token]):
            gate, up = (experts.gate_up_proj[expert] @ hidden[token]).chunk(2)
            written[token] += experts.down_proj[expert] @ (weight * F.silu(gate) * up * scale[expert])
    return written


@torch.no_grad()
def reference(name: str, model: nn.Module, scales: Tensor) -> list[Tensor]:
    """Hidden states and logits of the unedited model whose coefficients are multiplied on their way to `down`."""
    handles = []
    for layer, scale in enumerate(scales):
        module: Any = model.get_submodule(FAMILIES[name].format(layer))
        if name in PLAIN:  # before the activation
            handles.append(module.register_forward_hook(lambda _, args, output, scale=scale: output * scale))
        elif name in GATED:
            handles.append(module.register_forward_pre_hook(lambda _, args, scale=scale: (args[0] * scale,)))
        else:
            experts = module.experts
            rows = experts.down_proj.shape[0] * experts.down_proj.shape[2]
            own = scale[:rows].view(experts.down_proj.shape[0], -1)
            handles.append(experts.register_forward_hook(lambda m, args, _, own=own: routed(m, *args, own)))
            if rows < len(scale):
                down = module.shared_expert.down_proj
                handles.append(down.register_forward_pre_hook(lambda _, args, scale=scale[rows:]: (args[0] * scale,)))
    found = activations(model)
    for handle in handles:
        handle.remove()
    return found


@torch.no_grad()
def activations(model: Any) -> list[Tensor]:
    result = model(IDS, output_hidden_states=True)
    return [*result.hidden_states, result.logits]


def loaded(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def check(name: str, model: nn.Module, scales: Tensor, written: Path) -> None:
    found, wanted, before = activations(loaded(written)), reference(name, model, scales), activations(model)
    assert (wanted[-1] - before[-1]).abs().max() > 0.01
    for one, other in zip(found, wanted):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=2e-6 * float(other.abs().max()))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_written_folder_holds_the_model_that_hooks_make(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = folder_of(name, tmp_path / "model")
    scales = edit_of(model, tmp_path / "model", tmp_path / "edit.safetensors")
    flags = ["--to", "hf", "--resuscitation", str(tmp_path / "edit.safetensors")]
    main([str(tmp_path / "model"), str(tmp_path / "new"), *flags])
    check(name, model, scales, tmp_path / "new")
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert {path.name for path in (tmp_path / "new").iterdir()} - names == {"resuscitation.json", "README.md"}
    assert names - {path.name for path in (tmp_path / "new").iterdir()} == {"knowledge_entropy.json"}
    edited = 0
    for path in (tmp_path / "model").iterdir():
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as old, safe_open(tmp_path / "new" / path.name, "pt") as new:
                assert old.metadata() == new.metadata() and list(old.keys()) == list(new.keys())
                edited += sum(not torch.equal(old.get_tensor(key), new.get_tensor(key)) for key in old.keys())  # noqa: SIM118
        elif path.name != "knowledge_entropy.json":
            assert path.read_bytes() == (tmp_path / "new" / path.name).read_bytes()
    record = json.loads((tmp_path / "new/resuscitation.json").read_text())
    assert record["checkpoint"] == str(tmp_path / "model")
    assert record["settings"] == {"checkpoint_fingerprint": identity_of(tmp_path / "model")}
    # One matrix a layer, or each expert's, and the biases of plain layers.
    assert edited == LAYERS * {"OLMoE": 5, "Mixtral": 5, "Qwen2-MoE": 6}.get(name, 2 if name in PLAIN else 1)
    assert f"{tmp_path / 'new'}: {edited} of " in capsys.readouterr().out


def as_torch_files(model: nn.Module, folder: Path, prefix: str) -> None:
    """The weights in two files of torch with their index, names without `prefix`, as gpt2 on the hub has them."""
    state = {name.removeprefix(prefix): tensor for name, tensor in model.state_dict().items()}
    names = sorted(state)
    index = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"pytorch_model-0000{number}-of-00002.bin"
        torch.save({name: state[name] for name in part}, folder / file)
        index.update(dict.fromkeys(part, file))
    text = json.dumps({"metadata": {"total_size": 1}, "weight_map": index})
    (folder / "pytorch_model.bin.index.json").write_text(text)


def stacked(model: nn.Module, folder: Path, prefix: str) -> None:
    """Experts in one tensor, under the names of the model in memory."""
    save_file(
        {name: t.clone() for name, t in model.state_dict().items()}, folder / "model.safetensors", {"format": "pt"}
    )


@pytest.mark.parametrize(
    "name, layout, prefix",
    [
        ("GPT-2", as_torch_files, "transformer."),
        ("Pythia", as_torch_files, ""),
        ("OLMoE", stacked, ""),
    ],
)
def test_other_layouts_of_the_same_weights(
    name: str, layout: Callable[[nn.Module, Path, str], None], prefix: str, tmp_path: Path
) -> None:
    model = built(name)
    (tmp_path / "model").mkdir()
    model.config.save_pretrained(tmp_path / "model")
    layout(model, tmp_path / "model", prefix)
    scales = edit_of(model, tmp_path / "model", tmp_path / "edit.safetensors")
    flags = ["--to", "hf", "--resuscitation", str(tmp_path / "edit.safetensors")]
    (tmp_path / "model/.env").write_text("a secret")
    main([str(tmp_path / "model"), str(tmp_path / "new"), *flags])
    assert not list((tmp_path / "new").glob("*.bin*")) and not list((tmp_path / "new").glob(".*"))
    if layout is as_torch_files:
        index = json.loads((tmp_path / "new/model.safetensors.index.json").read_text())
        assert index["metadata"] == {"total_size": 1} and len(set(index["weight_map"].values())) == 2
        for key, file in index["weight_map"].items():
            assert key in load_file(tmp_path / "new" / file)
    check(name, model, scales, tmp_path / "new")


def test_what_change_parameters_writes_is_applied(tmp_path: Path) -> None:
    """Multipliers and the full state dict give the same folder; the edit is beside the checkpoint."""
    folder = tmp_path / "model"
    folder_of("Llama", folder)
    average = torch.rand(LAYERS, 48) + 0.1
    save_file({"mlp_average_coefficients": average}, folder / "mlp_average_coefficients.safetensors")
    flags = ["--checkpoint", str(folder), "--resuscitation_ratio", "0.5", "--amplifying_factor", "2"]
    for form, suffix in (("multipliers", "safetensors"), ("full", "pt")):
        change_parameters([*flags, "--format", form])
        edit = f"resuscitation_ratio0.5_amplifying2.0.{suffix}"
        main([str(folder), str(tmp_path / form), "--to", "hf", "--resuscitation", edit])
        assert not list((tmp_path / form).glob("resuscitation_*")) and not list((tmp_path / form).glob("mlp_*"))
    for one, other in zip(*(activations(loaded(tmp_path / form)) for form in ("multipliers", "full"))):
        assert torch.equal(one, other)
    settings = json.loads((tmp_path / "multipliers/resuscitation.json").read_text())["settings"]
    assert settings["amplifying_factor"] == 2 and settings["coefficients"].startswith(str(folder))


def test_what_cannot_be_edited_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, edit = tmp_path / "model", tmp_path / "edit.safetensors"
    model = folder_of("Llama", folder)
    edit_of(model, folder, edit)
    built("GPT-OSS").save_pretrained(tmp_path / "gpt-oss")
    edit_of(built("GPT-OSS"), tmp_path / "gpt-oss", tmp_path / "oss.safetensors")
    shutil.copytree(folder, tmp_path / "quantized")
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "quantized/config.json").write_text(json.dumps({**config, "quantization_config": {}}))
    shutil.copytree(folder, tmp_path / "renamed")
    for path in (tmp_path / "renamed").glob("model-*"):
        save_file({key.replace("up_proj", "w3"): tensor for key, tensor in load_file(path).items()}, path)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/config.json").write_text(json.dumps(config))
    torch.save({"model.norm.weight": print}, tmp_path / "bin/pytorch_model.bin")
    torch.save({"foreign": torch.ones(1)}, tmp_path / "foreign.pt")
    before = sorted(path.name for path in tmp_path.iterdir())
    oss, foreign = str(tmp_path / "oss.safetensors"), str(tmp_path / "foreign.pt")
    for source, flags, status, said in (
        ("model", ["--to", "hf"], 2, "already in transformers' layout; --resuscitation names an edit to apply"),
        ("model", ["--to", "olmo"], 2, "not an OLMo model; --to olmo writes OLMo and OLMo 2 only"),
        ("model", ["--to", "hf", "--resuscitation", str(edit), "--tokenizer", "x"], 2, "error: --tokenizer: models of"),
        ("model", ["--to", "hf", "--resuscitation", "none.pt"], 1, "none.pt is not a file, here or in"),
        ("model", ["--to", "hf", "--resuscitation", oss], 1, "oss.safetensors: made for a different checkpoint than"),
        ("model", ["--to", "hf", "--resuscitation", foreign], 1, "foreign.pt: no state dict of the model in"),
        ("gpt-oss", ["--to", "hf", "--resuscitation", oss], 1, "cannot tell the up projection of these experts"),
        ("quantized", ["--to", "hf", "--resuscitation", str(edit)], 2, "quantized: quantized weights cannot be edited"),
        (
            "renamed",
            ["--to", "hf", "--resuscitation", str(edit), "--resuscitation_force"],
            1,
            "renamed: the weights lack model.layers.0.mlp.up_proj.weight of shape (48, 32)",
        ),
        (
            "bin",
            ["--to", "hf", "--resuscitation", str(edit), "--resuscitation_force"],
            1,
            "pytorch_model.bin: damaged or not a file of tensors",
        ),
    ):
        capsys.readouterr()
        assert exit_status(main, [str(tmp_path / source), str(tmp_path / "new"), *flags]) == status
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ") and said in error
        assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_two_at_once_do_not_mix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, edit = tmp_path / "model", tmp_path / "edit.safetensors"
    edit_of(folder_of("Llama", folder), folder, edit)
    with Lock(tmp_path / ".new.lock"):
        assert exit_status(main, [str(folder), str(tmp_path / "new"), "--to", "hf", "--resuscitation", str(edit)]) == 1
    assert capsys.readouterr().err.endswith("new.lock: another process holds this lock\n")
    assert not (tmp_path / "new").exists()
