"""Runs of other families from edited weights: those of the folder that scripts.convert writes, bit for bit."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from analysis.change_parameters import main as change_parameters
from analysis.entropy import main as entropy
from olmo.distributed import Ranks
from olmo.train import Trainer
from scripts.convert import main as convert
from tests.running import CPU, configure, same, write_family, write_world

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
        ("OLMoE", "all", "multipliers"),
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
