"""Runs of other families from edited weights: those of the folder that scripts.convert writes, bit for bit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from analysis.change_parameters import main as change_parameters
from analysis.entropy import main as entropy
from olmo.distributed import Ranks
from olmo.eval.evaluators import Evaluators
from olmo.train import Trainer
from scripts.convert import main as convert
from tests.running import CPU, configure, metrics, same, train, weights, write_family, write_world

NAME = "resuscitation_ratio0.5_amplifying2.0"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


def edited(folder: Path, data: Path, form: str) -> Path:
    """The file that the analysis writes for a folder."""
    entropy(["--checkpoint", str(folder), "--data", str(data), "--data_size=4", "--sequence_length=32"])
    change_parameters(
        ["--checkpoint", str(folder), "--resuscitation_ratio=0.5", "--amplifying_factor=2", f"--format={form}"]
    )
    return folder / f"{NAME}{'.pt' if form == 'full' else '.safetensors'}"


@pytest.mark.parametrize(
    "name, narrow, form",
    [
        ("GPT-2", "all", "multipliers"),
        ("OLMoE", "mixed", "multipliers"),
        ("Llama", "none", "multipliers"),
        ("Llama", "all", "full"),
    ],
)
def test_a_run_begins_with_the_weights_that_convert_writes(
    name: str, narrow: str, form: str, world: Path, tmp_path: Path
) -> None:
    shutil.copytree(world, tmp_path, dirs_exist_ok=True)
    write_family(tmp_path, name)
    model = tmp_path / "model"
    state = load_file(model / "model.safetensors")
    narrowed = {"all": "", "mixed": "up_proj", "none": "-"}[narrow]
    state = {n: t.to(torch.bfloat16) if narrowed in n else t for n, t in state.items()}
    save_file(state, model / "model.safetensors", {"format": "pt"})
    edit = edited(model, tmp_path / "heldout32.npy", form)
    convert([str(model), str(tmp_path / "converted"), "--to", "hf", "--resuscitation", str(edit)])
    wanted = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "converted", dtype=torch.float32)
    config = configure(tmp_path / "family-plain.yaml", tmp_path / "run", f"--model.resuscitation={edit.name}")
    network = Trainer(config, CPU, Ranks()).model.network
    assert same(network.state_dict(), wanted.state_dict())
    assert same(dict(network.named_buffers()), dict(wanted.named_buffers()))
    before = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    assert not same(network.state_dict(), before.state_dict())


@pytest.fixture(scope="module")
def llama(world: Path) -> Path:
    write_family(world, "Llama")
    return world


@pytest.mark.parametrize("form", ["multipliers", "full"])
def test_a_file_of_another_checkpoint_is_refused_unless_forced(form: str, llama: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(llama / "model", model)
    edit = edited(model, llama / "heldout32.npy", form)
    state = load_file(model / "model.safetensors")
    state["model.layers.1.mlp.gate_proj.weight"][3, 3] += 1  # beside the row that is edited
    save_file(state, model / "model.safetensors", {"format": "pt"})
    command = [str(model), str(tmp_path / "new"), "--to", "hf", "--resuscitation", str(edit)]
    run = (llama / "family-plain.yaml", tmp_path / "run", f"--load_path={model}", f"--model.resuscitation={edit}")
    refused = rf"^{edit}: made for a different checkpoint than {model}.*; set resuscitation_force \("
    with pytest.raises(ValueError, match=refused):
        Trainer(configure(*run), CPU, Ranks())
    with pytest.raises(ValueError, match=refused):
        convert(command)
    convert([*command, "--resuscitation_force"])
    network = Trainer(configure(*run, "--model.resuscitation_force"), CPU, Ranks()).model.network
    wanted = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    assert same(network.state_dict(), wanted.state_dict())


def test_a_run_evaluates_the_original_weights_and_is_not_edited_again(llama: Path, tmp_path: Path) -> None:
    edit = edited(llama / "model", llama / "heldout32.npy", "multipliers")
    held = f"--evaluators=[{{label: walk, data: {{paths: ['{llama}/heldout256.npy']}}}}]"
    settings = ("--eval_on_load", "--save_interval=1", "--stop_at=1", "--injection=null", held)
    train(llama / "family.yaml", tmp_path / "plain", *settings)
    mine = (llama / "family.yaml", tmp_path / "run", *settings, f"--model.resuscitation={edit}")
    trained = train(*mine)
    (plain, *_), (original, start, *_) = metrics(tmp_path / "plain"), metrics(tmp_path / "run")
    assert original == {name if name == "step" else f"original/{name}": value for name, value in plain.items()}
    assert start["step"] == 0 and start.keys() == plain.keys() and start != plain
    saved = OmegaConf.load(tmp_path / "run/step1/config.yaml").model
    assert not saved.get("resuscitation") and saved.transformers == str(llama / "model")
    resumed = Trainer(configure(*mine, "--try_load_latest_save", "--stop_at=2"), CPU, Ranks())
    assert same(weights(resumed), weights(trained))
    another = (f"--load_path={tmp_path / 'run/step1'}", "--model.resuscitation=null")
    assert same(weights(Trainer(configure(mine[0], tmp_path / "c", *another), CPU, Ranks())), weights(trained))


def test_original_weights_are_evaluated_in_the_type_that_fsdp_gathers_and_with_the_same_buffers(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rotary frequencies in bfloat16 would be those of other positions."""
    edit, run = edited(llama / "model", llama / "heldout32.npy", "multipliers"), Evaluators.run
    evaluated: list[Any] = []
    monkeypatch.setattr(Evaluators, "run", lambda self, model, *due: evaluated.append(model) or run(self, model, *due))
    monkeypatch.setattr("olmo.train.trainer.gathered_dtype", lambda *_: torch.bfloat16)
    settings = ("--eval_on_load", "--stop_at=1", "--injection=null", f"--model.resuscitation={edit}")
    held = f"--evaluators=[{{label: walk, data: {{paths: ['{llama}/heldout256.npy']}}}}]"
    train(llama / "family.yaml", tmp_path / "run", *settings, held)
    original, trained, *_ = evaluated
    assert {weight.dtype for weight in original.parameters()} == {torch.bfloat16}
    buffers = dict(trained.named_buffers())
    assert buffers and same(dict(original.named_buffers()), buffers)
