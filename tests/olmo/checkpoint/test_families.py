"""Checkpoints of models of other families: what transformers reads from them, and what they hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import SafetensorError
from torch.distributed.fsdp import fully_shard

from olmo import checkpoint
from olmo.checkpoint import families, sharded
from olmo.config import ModelConfig, TrainConfig
from olmo.distributed import Ranks
from olmo.exceptions import ConfigurationError
from olmo.files.tensors import tensor_names
from olmo.model.causal_lm import CausalLM
from olmo.train.optim import build_optimizer
from tests.architectures import built
from tests.reference import tiny_tokenizer
from tests.running import CPU, same

SETTINGS = {"OLMoE": {}, "GPT-2": {}, "Gemma 2": {}, "Llama": {"tie_word_embeddings": True}}
GENERATION = {"do_sample": False, "temperature": 0.5}  # which transformers reads, and refuses to write
IDS = torch.arange(2, 34).view(2, 16)


def opened(name: str, folder: Path) -> tuple[CausalLM, torch.optim.Optimizer, TrainConfig]:
    """A bfloat16 folder of a family as a run opens it, after one step of its optimizer."""
    built(name, **SETTINGS[name]).to(torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer(folder / "tokenizer.json")
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    config = TrainConfig(model=ModelConfig(transformers=str(folder), max_sequence_length=16))
    config.optimizer.name = "adamw"  # type: ignore[assignment]
    model = families.load_model(folder, CPU, config.model)
    assert isinstance(model, CausalLM)
    optimizer = build_optimizer(config.optimizer, model)
    model(IDS).square().mean().backward()
    optimizer.step()
    return model, optimizer, config


@pytest.mark.parametrize("name", SETTINGS)
def test_transformers_reads_the_saved_weights_bit_for_bit(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model, optimizer, config = opened(name, tmp_path / "model")
    capfd.readouterr()
    folder, reference = tmp_path / "step1-unsharded", tmp_path / "reference"
    checkpoint.save(folder, model, config, optimizer, {"global_step": 1})
    assert capfd.readouterr() == ("", "")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert type(loaded) is type(model.network) and same(loaded.state_dict(), model.network.state_dict())
    assert transformers.AutoTokenizer.from_pretrained(folder).encode("the") == [
        *transformers.AutoTokenizer.from_pretrained(tmp_path / "model").encode("the")
    ]
    model.network.generation_config = transformers.GenerationConfig()
    model.network.save_pretrained(reference)
    assert set(tensor_names(folder / "model.safetensors")) == set(tensor_names(reference / "model.safetensors"))
    described = json.loads((folder / "config.json").read_text())
    assert described == json.loads((reference / "config.json").read_text())
    assert described["dtype"] == "float32" and described["transformers_version"] == transformers.__version__
    assert str(tmp_path) not in (folder / "config.json").read_text()
    assert json.loads((folder / "generation_config.json").read_text()) == GENERATION
    assert {path.name for path in folder.iterdir()} == {
        *("config.json", "config.yaml", "generation_config.json", "manifest.json", "model.safetensors"),
        *("optim.pt", "tokenizer.json", "train.pt"),
    }
    assert (folder / "model.safetensors").stat().st_mode == (folder / "config.json").stat().st_mode


@pytest.mark.parametrize("name", SETTINGS)
def test_a_restart_checkpoint_is_read_by_all(name: str, tmp_path: Path) -> None:
    model, optimizer, config = opened(name, tmp_path / "model")
    folder = tmp_path / "step1"
    tensors = sharded.snapshot(model, checkpoint.optimizer_state(optimizer)["state"], Ranks())
    checkpoint.save_sharded(folder, tensors, model, config, {"global_step": 1}, None, False, Ranks())
    held = sharded.Reader(folder).shapes(sharded.WEIGHTS)
    assert sum(t.numel() for t in held.values()) == sum(p.numel() for p in model.parameters())  # tied ones once
    for other in (tmp_path / "model").iterdir():
        other.unlink()
    assert same(checkpoint.open_network(folder, torch.float32).state_dict(), model.network.state_dict())
    again = families.load_model(folder, CPU, config.model)
    assert isinstance(again, CausalLM)
    wanted = {**model.network.state_dict(), **dict(model.network.named_buffers())}
    assert same({**again.network.state_dict(), **dict(again.network.named_buffers())}, wanted)
    assert again.files == model.files
    assert {name for name, _ in again.named_parameters()} == {name for name, _ in model.named_parameters()}
    narrow = checkpoint.open_network(folder, torch.bfloat16)
    model.network.generation_config = transformers.GenerationConfig()
    model.network.save_pretrained(tmp_path / "reference")
    direct = checkpoint.open_network(tmp_path / "reference", torch.bfloat16)
    assert same(dict(narrow.named_buffers()), dict(direct.named_buffers()))  # such as frequencies, float32
    assert same(narrow.state_dict(), direct.state_dict())


def test_weights_that_a_restart_checkpoint_lacks_are_named(tmp_path: Path) -> None:
    model, _, config = opened("Llama", tmp_path / "model")
    tensors = sharded.snapshot(model, {}, Ranks())
    name = "network.model.layers.1.mlp.up_proj.weight"
    del tensors[f"{sharded.WEIGHTS}{name}"]
    checkpoint.save_sharded(tmp_path / "step1", tensors, model, config, {}, None, False, Ranks())
    with pytest.raises(ValueError, match=f"step1: weights and config disagree: missing {name}$"):
        families.load_model(tmp_path / "step1", CPU, config.model)


def test_the_trained_weights_have_memory_of_their_own(tmp_path: Path) -> None:
    built("Llama").save_pretrained(tmp_path)
    config = ModelConfig(transformers=str(tmp_path), max_sequence_length=16)
    before, file = checkpoint.open_network(tmp_path, torch.float32).state_dict(), tmp_path / "model.safetensors"
    wanted = {name: tensor.clone() for name, tensor in before.items()}
    mine = families.load_model(tmp_path, CPU, config, mapped=False)
    assert isinstance(mine, CausalLM)
    with file.open("r+b") as target:
        target.seek(-4096, 2)
        target.write(bytes(4096))
    assert same(mine.network.state_dict(), wanted) and not same(before, wanted)


def test_what_a_failed_save_has_written_is_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer, config = opened("Llama", tmp_path / "model")

    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("No space left on device (os error 28)")

    monkeypatch.setattr("olmo.files.tensors.save_file", full)
    with pytest.raises(OSError, match=r"step1-unsharded: cannot be saved \(.*No space left on device"):
        checkpoint.save(tmp_path / "run/step1-unsharded", model, config, optimizer, {})
    assert list((tmp_path / "run").iterdir()) == []


OF_A_RUN = {
    "model:\n  transformers: x/y\n": True,
    "run_name: a\nmodel: {max_sequence_length: 8, transformers: 'x/y'}\n": True,
    "model:\n    # of its folder\n    transformers: &name x/y\n": True,
    '"model":\n  "transformers": x/y\n': True,
    "model:\n  transformers: null\n": False,
    "model:\n  transformers: ~  # transformers: x/y\n": False,
    "model:\n  transformers: ''\n": False,
    "model:\n  d_model: 8\n# transformers: x/y\n": False,
    "wandb:\n  transformers: x/y\nmodel:\n  d_model: 8\n": False,
    "note: |\n  model:\n  transformers: x/y\nmodel:\n  d_model: 8\n": False,
    "run_name: |\n  transformers: x/y\n": False,
    "model: transformers\n": False,
}


@pytest.mark.parametrize("text", OF_A_RUN)
def test_the_section_model_of_config_yaml_decides_whether_config_json_counts(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "config.yaml").write_text(text)
    assert (checkpoint.transformers_config(tmp_path) is not None) == OF_A_RUN[text]


def test_a_config_yaml_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "config.yaml").write_text("model: [transformers\n")
    with pytest.raises(ConfigurationError, match=r"config\.yaml: not YAML"):
        checkpoint.transformers_config(tmp_path)


def test_what_a_run_warns_of_does_not_depend_on_sharding(tmp_path: Path) -> None:
    """A shared expert cannot be placed by computing with weights that FSDP has sharded."""
    built("DeepSeek-V3").save_pretrained(tmp_path / "model")
    tiny_tokenizer(tmp_path / "model/tokenizer.json")
    config = ModelConfig(transformers=str(tmp_path / "model"), max_sequence_length=16)
    model = families.load_model(tmp_path / "model", CPU, config)
    assert isinstance(model, CausalLM)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        fully_shard(model)
        assert list(families.remarks(model, 8)) == [
            "DeepseekV3ForCausalLM has no loss that balances its experts; they train without one"
        ]
    finally:
        torch.distributed.destroy_process_group()


def test_a_model_without_memories_is_refused_with_its_folder(tmp_path: Path) -> None:
    shape = {"vocab_size": 128, "hidden_size": 16, "num_hidden_layers": 2, "eos_token_id": 0, "pad_token_id": 1}
    transformers.MambaForCausalLM(transformers.MambaConfig(**shape)).save_pretrained(tmp_path / "model")
    tiny_tokenizer(tmp_path / "model/tokenizer.json")
    config = ModelConfig(transformers=str(tmp_path / "model"), max_sequence_length=16)
    with pytest.raises(ValueError) as caught:
        families.load_model(tmp_path / "model", CPU, config)
    assert str(caught.value) == (
        f"{tmp_path}/model: MambaForCausalLM: none of its 2 layers (backbone.layers) has a feed-forward part"
    )


def test_experts_whose_rows_torch_cannot_group_compute_one_after_another(tmp_path: Path) -> None:
    """12 numbers of 2 bytes are no multiple of 16, 12 of 4 bytes are."""
    built("OLMoE", intermediate_size=12).bfloat16().save_pretrained(tmp_path)
    how = {"dtype": torch.bfloat16, "experts_implementation": "eager"}
    wanted = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, **how)
    found: Any = families.open_network(tmp_path, torch.bfloat16)
    assert torch.equal(found(input_ids=IDS).logits, wanted(input_ids=IDS).logits)
    kept: Any = families.open_network(tmp_path, torch.float32)
    assert kept.config._experts_implementation == built("OLMoE").config._experts_implementation != "eager"
    config = ModelConfig(transformers=str(tmp_path), max_sequence_length=16)
    trained = families.load_model(tmp_path, CPU, config).bfloat16()  # as FSDP gathers it
    assert torch.equal(trained.eval()(IDS), wanted.bfloat16()(input_ids=IDS).logits)
    assert isinstance(trained, CausalLM) and trained.is_mixture
    evaluated = trained.empty()  # what FSDP's weights are gathered in
    assert evaluated.is_mixture and evaluated.network.config._experts_implementation == "eager"
