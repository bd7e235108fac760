"""Folders that are no checkpoints for this program: named in one line with what converts them, by every command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from analysis import change_parameters, entropy
from olmo import checkpoint
from olmo.checkpoint.formats import explain
from olmo.config import TokenizerConfig, TrainConfig
from olmo.exceptions import exit_status
from olmo.tokenizer import load_tokenizer
from scripts import convert, train
from tests.checkpoints import made_model, write_olmo
from tests.reference import tiny_config, tiny_tokenizer

CORE = json.dumps({"_CLASS_": "ExperimentConfig", "model": {"_CLASS_": "TransformerConfig", "d_model": 64}})
LLAMA = json.dumps({"model_type": "llama", "hidden_size": 32})
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4700000000\n"
FORMATS: dict[str, tuple[dict[str, str], str]] = {
    "OLMo-core": (
        {
            "config.json": CORE,
            "model_and_optim/.metadata": "",
            "model_and_optim/__0_0.distcp": "",
            "train/rank0.pt": "",
        },
        "an OLMo-core checkpoint; convert it with OLMo-core's src/examples/huggingface/convert_checkpoint_to_hf.py",
    ),
    "OLMo-core without configuration": ({"model_and_optim/.metadata": ""}, "an OLMo-core checkpoint; convert it"),
    "adapter": (
        {"adapter_config.json": "{}", "adapter_model.safetensors": "x" * 2000, "trainer_state.json": "{}"},
        "an adapter (PEFT), not a model; merge it into its base model with peft's merge_and_unload",
    ),
    "GGUF": ({"llama-Q4_K_M.gguf": "GGUF", "config.json": LLAMA}, "a model of llama.cpp (GGUF); name the transformers"),
    "Megatron": (
        {"latest_checkpointed_iteration.txt": "10", "iter_0000010/mp_rank_00/model_optim_rng.pt": ""},
        "a Megatron-LM checkpoint; export it as a transformers folder",
    ),
    "DeepSpeed": (
        {"config.json": LLAMA, "global_step500/mp_rank_00_model_states.pt": "", "zero_to_fp32.py": "", "latest": "x"},
        "a DeepSpeed checkpoint; collect its weights with the zero_to_fp32.py that DeepSpeed saved with it",
    ),
    "FSDP": ({"pytorch_model_fsdp_0/__0_0.distcp": ""}, "shards of torch.distributed.checkpoint (FSDP); merge them"),
    "Meta": ({"consolidated.00.pth": "", "params.json": "{}"}, "a checkpoint in Meta's layout; convert it with"),
    "Flax": ({"config.json": LLAMA, "flax_model.msgpack": ""}, "weights of TensorFlow, Flax or ONNX; name the"),
    "run": ({"step5-unsharded/config.yaml": ""}, "a folder that contains checkpoints; name one of them"),
    "without weights": ({"config.json": LLAMA}, "no weights here, only a configuration; download or copy them"),
    "without configuration": ({"model.safetensors": "x" * 2000}, "weights without config.json or config.yaml; copy"),
    "tokenizer": ({"tokenizer.json": "{}", "vocab.json": "{}"}, "a tokenizer without a model; name the folder of the"),
    "LFS": (
        {"config.json": LLAMA, "model.safetensors": POINTER},
        "a pointer of Git LFS, not the file itself; get it with: git lfs pull",
    ),
}


def made(folder: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return folder


@pytest.mark.parametrize("name", FORMATS)
def test_each_format_is_named(name: str, tmp_path: Path) -> None:
    files, said = FORMATS[name]
    folder = made(tmp_path / "model", files)
    open_: Callable[[Path], object] = checkpoint.read_config if "config.json" not in files else checkpoint.model_files
    if name == "OLMo-core":
        open_ = checkpoint.is_olmo
    with pytest.raises((ValueError, FileNotFoundError)) as raised:
        open_(folder)
    assert str(raised.value).startswith(str(folder)) and said in str(raised.value) and "{" not in str(raised.value)
    if name != "LFS":
        assert (explain(folder) or "").startswith(said)


@pytest.mark.parametrize("name", ["OLMo-core", "adapter", "without weights", "LFS", "model.safetensors", "model.gguf"])
def test_every_command_that_opens_a_checkpoint_says_so(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if name in FORMATS:
        files, said = FORMATS[name]
        place = made(tmp_path / "model", files)
    else:
        place = made(tmp_path, {name: "x" * 2000}) / name
        said = (
            "a model of llama.cpp" if name.endswith("gguf") else f"a file; name the folder that contains it, {tmp_path}"
        )
    np.random.default_rng(0).integers(2, 128, 4096).astype("<u2").tofile(tmp_path / "tokens.npy")
    config = tmp_path / "run.yaml"
    settings = TrainConfig(model=tiny_config(), save_folder=str(tmp_path / "run"), load_path=str(place))
    settings.data.paths = [str(tmp_path / "tokens.npy")]
    settings.optimizer.name = "adamw"  # type: ignore[assignment]
    settings.save(config)
    commands = [
        (
            entropy.main,
            ["--checkpoint", place, "--data", tmp_path / "tokens.npy", "--data_size", 2, "--output", tmp_path / "out"],
        ),
    ]
    if name not in ("without weights", "LFS"):  # of Llama, which is neither trained nor converted
        commands.append((convert.main, [place, tmp_path / "new", "--to", "hf"]))
        commands.append((train.main, [config, "--device_train_microbatch_size=1", "--global_train_batch_size=1"]))
    save_file({"mlp_average_coefficients": torch.ones(2, 48)}, tmp_path / "c.safetensors")
    edit = ["--coefficients", tmp_path / "c.safetensors", "--resuscitation_ratio", 0.5, "--amplifying_factor", 1]
    commands.append((change_parameters.main, ["--checkpoint", place, *edit]))
    for main, argv in commands:
        capsys.readouterr()
        assert exit_status(main, [str(a) for a in argv]) in (1, 2)
        shown = capsys.readouterr()
        *warnings, line = shown.err.splitlines()
        assert str(place) in line and said in line and line.startswith("error: "), (main.__module__, shown)
        assert all(warning.startswith("warning: ") for warning in warnings)


def test_a_tokenizer_of_a_folder(tmp_path: Path) -> None:
    """A transformers folder, a checkpoint folder that names one, and what is neither."""
    tiny_tokenizer(made(tmp_path / "hf", {"tokenizer_config.json": "{}"}) / "tokenizer.json")
    folder = write_olmo(tmp_path / "olmo", made_model())
    TrainConfig(tokenizer=TokenizerConfig(identifier=str(tmp_path / "hf/tokenizer.json"))).save(folder / "config.yaml")
    for place in (tmp_path / "hf", folder):
        assert load_tokenizer(str(place)).get_vocab_size() == 128
    with pytest.raises(
        FileNotFoundError, match=r"slow: no tokenizer\.json in this folder.* make one of its vocab\.json"
    ):
        load_tokenizer(str(made(tmp_path / "slow", {"vocab.json": "{}", "merges.txt": ""})))
    with pytest.raises(ValueError, match="a pointer of Git LFS"):
        load_tokenizer(str(made(tmp_path / "lfs", {"tokenizer.json": POINTER})))
