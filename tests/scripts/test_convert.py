"""Conversion to transformers' layout and back, by the command line, against transformers itself."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from analysis.change_parameters import main as change_parameters
from olmo import checkpoint
from olmo.config import ModelConfig, TokenizerConfig, TrainConfig, save_model_config
from olmo.exceptions import exit_status
from olmo.files.tensors import write_olmo_safetensors
from olmo.memory.rescaling import rescale
from olmo.model import OLMo
from olmo.train.optim import build_optimizer
from scripts.convert import main
from tests.reference import by_layer, tiny_config, tiny_olmo2_config

CPU = torch.device("cpu")
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [100, 50, 25, 12, 6, 3, 1, 0]])
SHAPES = {
    "olmo": tiny_config(),
    "untied, vocabulary padded": tiny_config(weight_tying=False, vocab_size=120),
    "grouped queries, clipped": tiny_config(n_kv_heads=2, clip_qkv=0.5),
    "one key head": tiny_config(multi_query_attention=True, rope_theta=500_000),
    "olmo 2": tiny_olmo2_config(layer_norm_eps=1e-6, rope_theta=500_000),
    "olmo 2, grouped, tied": tiny_olmo2_config(n_kv_heads=2, weight_tying=True),
}


def saved(folder: Path, config: ModelConfig, dtype: torch.dtype = torch.float32) -> OLMo:
    """A model of random weights, norms included, saved by our own code with a tokenizer of OLMo's named."""
    torch.manual_seed(0)
    model = OLMo(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=0.1, std=0.3)
    run = TrainConfig(model=config, tokenizer=TokenizerConfig("tokenizers/none.json"))
    checkpoint.save(folder, model.to(dtype), run, build_optimizer(run.optimizer, model), {})
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_there_and_back_is_bit_exact(tmp_path: Path, shape: str, dtype: torch.dtype) -> None:
    config = SHAPES[shape]
    model = saved(tmp_path / "ours", config, dtype)
    identifier = ["--tokenizer", str(tokenizer(tmp_path))]
    main([str(tmp_path / "ours"), str(tmp_path / "hf"), "--to", "hf", *identifier])
    main([str(tmp_path / "hf"), str(tmp_path / "back"), "--to", "olmo"])
    ours, back = checkpoint.read_state(tmp_path / "ours"), checkpoint.read_state(tmp_path / "back")
    assert ours.keys() == back.keys()
    assert all(torch.equal(ours[name], back[name]) and back[name].dtype == dtype for name in ours)
    assert checkpoint.read_config(tmp_path / "back") == config

    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto").eval()
    assert theirs.dtype == dtype
    if dtype == torch.float32:
        with torch.no_grad():
            torch.testing.assert_close(model(IDS), theirs(IDS).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_what_transformers_saves_becomes_ours(tmp_path: Path, shape: str) -> None:
    """The other way round: no file of ours beside, the folder written by transformers alone."""
    saved(tmp_path / "ours", SHAPES[shape])
    main([str(tmp_path / "ours"), str(tmp_path / "first"), "--to", "hf", "--tokenizer", str(tokenizer(tmp_path))])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "first").eval()
    del theirs.config.olmo_config
    theirs.save_pretrained(tmp_path / "theirs")
    assert "olmo_config" not in json.loads((tmp_path / "theirs/config.json").read_text())
    main([str(tmp_path / "theirs"), str(tmp_path / "back"), "--to", "olmo"])
    with torch.no_grad():
        loaded = checkpoint.load_model(tmp_path / "back", CPU).eval()
        torch.testing.assert_close(loaded(IDS), theirs(IDS).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("to", ["olmo", "hf"])
def test_weights_have_the_mode_that_the_umask_gives(tmp_path: Path, to: str) -> None:
    saved(tmp_path / "ours", tiny_config())
    before = os.umask(0o022)
    try:
        main([str(tmp_path / "ours"), str(tmp_path / "new"), "--to", to, "--tokenizer", str(tokenizer(tmp_path))])
    finally:
        os.umask(before)
    assert (tmp_path / "new/model.safetensors").stat().st_mode & 0o777 == 0o644


def tokenizer(folder: Path) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"<eos>": 0, "<pad>": 1, "water": 2, "boils": 3}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    words.save(str(folder / "words.json"))
    return folder / "words.json"


def test_the_tokenizer_comes_along(tmp_path: Path) -> None:
    saved(tmp_path / "ours", tiny_config())
    config = (tmp_path / "ours/config.yaml").read_text().replace("tokenizers/none.json", str(tokenizer(tmp_path)))
    (tmp_path / "ours/config.yaml").write_text(config)
    main([str(tmp_path / "ours"), str(tmp_path / "hf"), "--to", "hf"])
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert theirs("water boils").input_ids == [2, 3]
    assert (theirs.eos_token_id, theirs.pad_token_id) == (0, 1)


def test_a_resuscitation_of_another_checkpoint_must_be_forced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(tmp_path / "ours", tiny_config())
    other = saved(tmp_path / "other", tiny_config())
    with torch.no_grad():
        other.transformer.wte.weight += 1
    write_olmo_safetensors(tmp_path / "other/model.safetensors", other.state_dict())
    torch.save(torch.rand(2, 48), tmp_path / "ours/mlp_average_coefficients.pt")
    flags = ["--resuscitation_ratio", "0.5", "--amplifying_factor", "2"]
    change_parameters(["--checkpoint", str(tmp_path / "ours"), *flags])
    edit = tmp_path / "ours/resuscitation_ratio0.5_amplifying2.0.safetensors"
    argv = [str(tmp_path / "other"), str(tmp_path / "new"), "--to", "olmo"]
    capsys.readouterr()
    assert exit_status(main, [*argv, "--resuscitation", str(edit)]) == 1
    assert f"{edit}: made for a different checkpoint than {tmp_path / 'other'}; " in capsys.readouterr().err
    assert exit_status(main, [*argv, "--resuscitation_force"]) == 2
    assert capsys.readouterr().err == "error: --resuscitation_force: needs --resuscitation\n"
    assert exit_status(main, [*argv, "--resuscitation", "none.pt"]) == 1
    assert (
        f"error: --resuscitation: none.pt is not a file, here or in {tmp_path / 'other'}; analysis."
        in capsys.readouterr().err
    )
    assert sorted(os.listdir(tmp_path)) == ["other", "ours"]
    main([*argv, "--resuscitation", str(edit), "--resuscitation_force"])
    wanted = rescale(other.state_dict(), by_layer(load_file(edit)["multipliers"]))
    found = checkpoint.read_state(tmp_path / "new")
    assert wanted.keys() == found.keys() and all(torch.equal(wanted[name], found[name]) for name in wanted)


def test_resuscitation_is_applied_on_the_way(tmp_path: Path) -> None:
    saved(tmp_path / "ours", tiny_config())
    coefficients = torch.rand(2, 48)
    torch.save(coefficients, tmp_path / "ours/mlp_average_coefficients.pt")
    flags = ["--resuscitation_ratio", "0.5", "--amplifying_factor", "2"]
    change_parameters(["--checkpoint", str(tmp_path / "ours"), *flags])
    name = "resuscitation_ratio0.5_amplifying2.0.safetensors"
    words = ["--tokenizer", str(tokenizer(tmp_path))]
    main([str(tmp_path / "ours"), str(tmp_path / "hf"), "--to", "hf", "--resuscitation", name, *words])
    multipliers = load_file(tmp_path / "ours" / name)["multipliers"]
    edited = rescale(checkpoint.read_state(tmp_path / "ours"), by_layer(multipliers))
    found = load_file(tmp_path / "hf/model.safetensors")
    for layer in range(2):
        up, gate = edited[f"transformer.blocks.{layer}.ff_proj.weight"].chunk(2)
        assert torch.equal(found[f"model.layers.{layer}.mlp.up_proj.weight"], up)
        assert torch.equal(found[f"model.layers.{layer}.mlp.gate_proj.weight"], gate)
    record = json.loads((tmp_path / "hf/resuscitation.json").read_text())
    assert record["resuscitation"] == str(tmp_path / "ours" / name) and record["settings"]["amplifying_factor"] == 2.0


@pytest.mark.parametrize(
    "changed, told",
    [
        ({"include_bias": True}, "model.include_bias: transformers' OlmoForCausalLM has no True (only False)"),
        ({"rope": False}, "model.rope: transformers' OlmoForCausalLM has no False (only True)"),
        ({"activation_type": "gelu"}, "model.activation_type: "),
        ({"layer_norm_with_affine": True}, "model.layer_norm_with_affine: "),
        ({"layer_norm_eps": 1e-6}, "model.layer_norm_eps: "),
        ({"layer_norm_type": "rms"}, "model.layer_norm_type: "),
        ({"scale_logits": True}, "model.scale_logits: "),
    ],
    ids=str,
)
def test_what_transformers_has_not_is_named(
    tmp_path: Path, changed: dict[str, Any], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(tmp_path / "ours", tiny_config(**changed))
    assert exit_status(main, [str(tmp_path / "ours"), str(tmp_path / "hf"), "--to", "hf"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {told}")
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_a_folder_in_use_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tmp_path / "ours", tiny_config())
    assert exit_status(main, [str(tmp_path / "ours"), str(tmp_path / "ours"), "--to", "hf"]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'ours'}: already exists; name a new folder\n"


def test_nothing_half_written_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tmp_path / "ours", tiny_config())
    arguments = [str(tmp_path / "ours"), str(tmp_path / "hf"), "--to", "hf", "--tokenizer", "nowhere.json"]
    assert exit_status(main, arguments) == 1
    assert "nowhere.json: no such tokenizer file" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_a_config_that_contradicts_itself_is_named(tmp_path: Path) -> None:
    saved(tmp_path / "ours", tiny_config())
    main([str(tmp_path / "ours"), str(tmp_path / "hf"), "--to", "hf", "--tokenizer", str(tokenizer(tmp_path))])
    raw = json.loads((tmp_path / "hf/config.json").read_text())
    raw["rope_theta"] = 500000.0
    (tmp_path / "hf/config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=r"olmo_config\.rope_theta is 10000, beside 500000"):
        checkpoint.read_config(tmp_path / "hf")


def test_divisors_come_along(tmp_path: Path) -> None:
    torch.save(torch.rand(2, 48) + 0.5, tmp_path / "divisors.pt")
    config = tiny_config(temperature_MLP=str(tmp_path / "divisors.pt"), temperature_attention=2.0)
    saved(tmp_path / "ours", tiny_config())
    save_model_config(tmp_path / "ours/config.yaml", config)
    main([str(tmp_path / "ours"), str(tmp_path / "again"), "--to", "olmo"])
    (tmp_path / "divisors.pt").unlink()
    loaded = checkpoint.load_model(tmp_path / "again", CPU)
    assert loaded.blocks[0].memory_temperature is not None and loaded.config.temperature_attention == 2.0


def test_views_and_shared_memory_are_written_apart(tmp_path: Path) -> None:
    model = saved(tmp_path / "ours", tiny_config(weight_tying=False))
    state = dict(model.state_dict())
    name, head = "transformer.blocks.0.ff_out.weight", "transformer.ff_out.weight"
    state[name] = state[name].T.contiguous().T  # not contiguous
    state[head] = state["transformer.wte.weight"]  # one memory, two names
    (tmp_path / "ours/model.safetensors").unlink()
    torch.save(state, tmp_path / "ours/model.pt")
    main([str(tmp_path / "ours"), str(tmp_path / "again"), "--to", "olmo"])
    again = checkpoint.read_state(tmp_path / "again")
    assert all(torch.equal(again[key], tensor) for key, tensor in state.items())


def test_a_tokenizer_that_lies_elsewhere_is_no_obstacle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tmp_path / "ours", tiny_config())  # its config.yaml names tokenizers/none.json
    main([str(tmp_path / "ours"), str(tmp_path / "hf"), "--to", "hf"])
    assert capsys.readouterr().out.endswith("tokenizer unknown; name it with --tokenizer\n")


def test_into_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path / "ours", tiny_config())
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    main([str(tmp_path / "ours"), ".", "--to", "hf"])
    assert (tmp_path / "empty/model.safetensors").is_file()
