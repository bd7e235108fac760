"""Weights and configurations of transformers' folders."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from olmo import checkpoint
from olmo.model import OLMo
from tests.checkpoints import CPU, IDS, made_model, same_weights, write_olmo
from tests.reference import tiny_config, tiny_olmo2_config, to_transformers


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"weight_tying": False},
        {"n_kv_heads": 2},
        {"n_kv_heads": 1, "clip_qkv": 0.2},
        {"rope_theta": 500, "weight_tying": False},
    ],
    ids=repr,
)
@pytest.mark.parametrize("sharded", [False, True])
def test_a_transformers_folder_gives_transformers_logits(tmp_path: Path, shape: dict[str, Any], sharded: bool) -> None:
    model = made_model(**shape)
    theirs = to_transformers(model)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB" if sharded else "1GB")
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) is sharded
    loaded = checkpoint.load_model(tmp_path, CPU).eval()
    same_weights(loaded, model)
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS), theirs(IDS).logits, rtol=1e-5, atol=1e-5)
    assert checkpoint.is_olmo(tmp_path)
    assert loaded.config.max_sequence_length == 64
    assert loaded.config.residual_dropout == loaded.config.attention_dropout == loaded.config.embedding_dropout == 0


def test_the_eps_of_a_transformers_folder_is_olmos(tmp_path: Path) -> None:
    """The weights are made so small that another eps would change the logits."""
    model = made_model()
    with torch.no_grad():
        model.transformer["wte"].weight.mul_(1e-2)
    theirs = to_transformers(model)
    theirs.save_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(
            checkpoint.load_model(tmp_path, CPU).eval()(IDS), theirs(IDS).logits, rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention_bias", True),
        ("hidden_act", "gelu"),
        ("rope_parameters", {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}),
        ("rope_scaling", {"type": "dynamic", "factor": 2.0}),
    ],
)
def test_what_a_transformers_folder_asks_for_and_we_lack_is_named(tmp_path: Path, key: str, value: Any) -> None:
    to_transformers(made_model()).save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**raw, key: value}))
    with pytest.raises(ValueError, match=key):
        checkpoint.load_model(tmp_path, CPU)


def test_a_transformers_folder_with_a_tensor_missing_or_left_over_is_named(tmp_path: Path) -> None:
    to_transformers(made_model()).save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.gate_proj.weight"
    save_file({**state, "model.layers.1.mlp.gate_proj.bias": torch.ones(48)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.gate_proj\.bias"):
        checkpoint.load_model(tmp_path, CPU)
    del state[name]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=rf"the weights lack {name}"):
        checkpoint.load_model(tmp_path, CPU)


def write_hf_olmo(folder: Path, model: OLMo, **overrides: Any) -> Path:
    """The layout of allenai/OLMo-1B: OLMo's keys prefixed `model.`, OLMo's settings in config.json."""
    folder.mkdir(exist_ok=True)
    raw = {key: getattr(value, "value", value) for key, value in asdict(model.config).items()}
    raw = {key: value for key, value in raw.items() if key not in ("resuscitation", "save_grad_")}
    raw |= {"model_type": "hf_olmo", "architectures": ["OLMoForCausalLM"], "use_cache": True, "flash_attention": True}
    (folder / "config.json").write_text(json.dumps({**raw, "transformers_version": "4.36.2", **overrides}))
    state = {f"model.{name}": t.detach().contiguous() for name, t in model.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("make", [tiny_config, tiny_olmo2_config])
@pytest.mark.parametrize("tied", [True, False])
def test_the_first_transformers_layout_loads(tmp_path: Path, make: Any, tied: bool) -> None:
    torch.manual_seed(0)
    model = OLMo(make(weight_tying=tied)).eval()
    folder = write_hf_olmo(tmp_path / "OLMo-1B", model)
    assert checkpoint.is_olmo(folder)
    loaded = checkpoint.load_model(folder, CPU).eval()
    same_weights(loaded, model)
    assert torch.equal(loaded(IDS), model(IDS))


@pytest.mark.parametrize("model_type", ["hf_olmo", "olmo"])
def test_its_revisions_call_it_by_two_names_and_have_files_of_two_kinds(tmp_path: Path, model_type: str) -> None:
    model = made_model()
    folder = write_hf_olmo(tmp_path / "OLMo-1B", model, model_type=model_type)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert checkpoint.is_olmo(folder)
    same_weights(checkpoint.load_model(folder, CPU), model)


@pytest.mark.parametrize(
    ("key", "value"),
    [("alibi", True), ("block_type", "llama"), ("save_grad_", True)],
)
def test_what_the_first_transformers_layout_asks_for_and_we_lack_is_named(tmp_path: Path, key: str, value: Any) -> None:
    folder = write_hf_olmo(tmp_path / "OLMo-1B", made_model(), **{key: value})
    with pytest.raises(ValueError, match=key):
        checkpoint.load_model(folder, CPU)


def test_another_family_is_no_olmo(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt_neox"}))
    assert not checkpoint.is_olmo(tmp_path)
    with pytest.raises(ValueError, match="a gpt_neox model, not OLMo or OLMo 2; name it in load_path"):
        checkpoint.read_config(tmp_path)


def test_a_config_json_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: not JSON"):
        checkpoint.read_config(tmp_path)


def test_the_saved_frequencies_of_old_transformers_are_passed_over(tmp_path: Path) -> None:
    model = made_model()
    to_transformers(model).save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(state, tmp_path / "model.safetensors")
    same_weights(checkpoint.load_model(tmp_path, CPU), model)


@pytest.mark.parametrize("part", [torch.ones(32, 31), torch.ones(())], ids=["width", "number"])
def test_parts_that_do_not_stack_are_named(tmp_path: Path, part: Tensor) -> None:
    to_transformers(made_model()).save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["model.layers.1.self_attn.k_proj.weight"] = part
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=rf"do not stack: .*k_proj\.weight {re.escape(str(tuple(part.shape)))}"):
        checkpoint.load_model(tmp_path, CPU)


@pytest.mark.parametrize(
    "weight, told",
    [
        (torch.ones(128, 32, dtype=torch.int8), r"transformer\.wte\.weight holds torch\.int8 numbers"),
        (torch.ones(128, 32, dtype=torch.complex64), r"transformer\.wte\.weight: a tensor of complex64 is not read"),
        (torch.ones(128, 32).to_sparse(), r"transformer\.wte\.weight: a sparse tensor is not read"),
    ],
    ids=["int8", "complex", "sparse"],
)
def test_weights_that_are_no_dense_floats_are_named(tmp_path: Path, weight: Tensor, told: str) -> None:
    folder = write_olmo(tmp_path / "checkpoint", made_model(), "model.pt")
    state = dict(made_model().state_dict())
    state["transformer.wte.weight"] = weight
    torch.save(state, folder / "model.pt")
    with pytest.raises(ValueError, match=told):
        checkpoint.load_model(folder, CPU)


HF = {
    "model_type": "olmo",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "vocab_size": 128,
}


def test_what_a_config_json_tells_is_kept(tmp_path: Path) -> None:
    told = {"eos_token_id": [7, 8], "pad_token_id": 9, "attention_dropout": 0.25, "rope_theta": 500000.0}
    (tmp_path / "config.json").write_text(json.dumps({**HF, **told}))
    config = checkpoint.read_config(tmp_path)
    assert (config.eos_token_id, config.pad_token_id, config.attention_dropout, config.rope_theta) == (
        7,
        9,
        0.25,
        500000,
    )


@pytest.mark.parametrize(
    "changed, told",
    [
        ({"hidden_size": None}, "model.d_model"),
        ({"hidden_size": "thirty-two"}, "model.d_model"),
        ({"num_attention_heads": 0}, "model.n_heads: 0 must be at least 1"),
        ({"intermediate_size": None}, "no intermediate_size"),
        ({"intermediate_size": "48"}, "model."),
        ({"rope_theta": 1.9}, "model.rope_theta"),
        ({"rope_parameters": "x"}, "rope_parameters: expected keys and values"),
        ({"clip_qkv": -1}, "model.clip_qkv: -1.0 must be more than 0"),
        ({"attention_dropout": "x"}, "model.attention_dropout"),
        ({"olmo_config": 3}, "olmo_config: expected keys and values"),
    ],
    ids=str,
)
def test_a_config_json_that_makes_no_model_is_named(tmp_path: Path, changed: dict[str, Any], told: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**HF, **changed}))
    if told == "model.":  # a number as text is still a number
        assert checkpoint.read_config(tmp_path).projection_size in (48, 96)
        return
    with pytest.raises(ValueError) as caught:
        checkpoint.read_config(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'config.json'}: {told}") and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["[]", '"x"', "3"])
def test_a_config_json_of_something_else_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json: expected keys and values"):
        checkpoint.read_config(tmp_path)


@pytest.mark.parametrize(
    "key, value", [("clip_qkv", 3.0), ("scale_logits", True), ("rope_theta", 500), ("layer_norm_eps", 1e-6)]
)
def test_a_run_may_not_change_what_the_weights_mean(tmp_path: Path, key: str, value: Any) -> None:
    folder = write_olmo(tmp_path / "checkpoint", made_model())
    with pytest.raises(ValueError, match=f"model.{key}: {value}, but the checkpoint"):
        checkpoint.load_model(folder, CPU, config=tiny_config(**{key: value}))
