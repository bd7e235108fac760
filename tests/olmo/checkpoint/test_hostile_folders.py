"""Checkpoint folders whose files lie about one another: indexes, configurations, manifests."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from analysis.models import open_model
from olmo import checkpoint
from olmo.checkpoint import empty_network, manifest
from olmo.files.digests import file_digest
from olmo.files.paths import check_readable, read_json
from tests.checkpoints import CPU, made_model, write_olmo
from tests.reference import to_transformers

INDEX = "model.safetensors.index.json"


@pytest.fixture
def split(tmp_path: Path) -> Path:
    """An OLMo model as transformers saves a large one: two files and their index."""
    folder = tmp_path / "split"
    to_transformers(made_model()).save_pretrained(folder, max_shard_size="40KB")
    assert (folder / INDEX).is_file()
    return folder


def index_with(name: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        raw = json.loads((folder / INDEX).read_text())
        raw["weight_map"][next(iter(raw["weight_map"]))] = name
        (folder / INDEX).write_text(json.dumps(raw))

    return write


def two_files(folder: Path) -> None:
    first, second, *_ = sorted(folder.glob("model-*"))
    save_file({**load_file(first), **load_file(second)}, second, {"format": "pt"})


INDEXES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a parent": (
        index_with("../secret.safetensors"),
        r"index\.json: names '../secret.safetensors', which is no file of",
    ),
    "absolute": (index_with("/etc/passwd"), r"index\.json: names '/etc/passwd', which is no file of its folder"),
    "a folder": (index_with(".."), r"index\.json: names '\.\.', which is no file"),
    "backslashes": (index_with("..\\secret"), r"index\.json: names .*, which is no file"),
    "a number": (index_with(3), r"index\.json: not an index of weights"),
    "missing": (index_with("model-9.safetensors"), r"model-9\.safetensors: no such file"),
    "no weight_map": (lambda folder: (folder / INDEX).write_text("{}"), r"index\.json: not an index of weights"),
    "a list": (lambda folder: (folder / INDEX).write_text("[1]"), r"index\.json: not an index of weights"),
    "no JSON": (lambda folder: (folder / INDEX).write_text("{"), r"index\.json: not JSON"),
    "nested": (lambda folder: (folder / INDEX).write_text("[" * 10**5), r"index\.json: not JSON"),
    "one tensor in two files": (two_files, r"model-0000.-of-.*: model\.\S+ is in another file of the folder too"),
}


@pytest.mark.parametrize("kind", INDEXES)
def test_an_index_that_lies_is_refused(split: Path, kind: str) -> None:
    checkpoint.load_model(split, CPU)
    lie, expected = INDEXES[kind]
    lie(split)
    with pytest.raises((ValueError, OSError), match=expected):
        checkpoint.load_model(split, CPU)


def test_a_huge_index_is_not_parsed(split: Path) -> None:
    os.truncate(split / INDEX, 10**9)
    before = time.monotonic()
    with pytest.raises(
        ValueError, match=r"index\.json: 1,000,000,000 bytes; JSON files of more than 134,217,728 are not"
    ):
        checkpoint.load_model(split, CPU)
    assert time.monotonic() - before < 1


@pytest.mark.parametrize("kind", ["fifo", "/dev/zero", "a loop", "a folder", "a long name"])
def test_what_is_no_file_is_one_line_at_once(tmp_path: Path, kind: str) -> None:
    path = tmp_path / ("x" * 300 if kind == "a long name" else "f.json")
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "/dev/zero":
        path = Path(kind)
    elif kind == "a loop":
        path.symlink_to(path)
    elif kind == "a folder":
        path.mkdir()
    expected = {"a loop": "symbolic links", "a folder": "is a directory", "a long name": "too long"}
    for read in (check_readable, read_json, file_digest):
        with pytest.raises(OSError, match=expected.get(kind, "a pipe or a device, not a file")):
            read(path)


# --- configurations ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"n_layers": 10**9}, "the config has 1,000,000,000 layers, the weights have 9 tensors"),
        ({"d_model": 10**9}, "no model has the sizes of its config: .*overflow"),
        ({"mlp_hidden_size": 10**15}, r"ff_proj\.weight has shape \(96, 32\), the config asks for \(10{15}, 32\)"),
    ],
    ids=str,
)
def test_a_config_of_absurd_sizes_is_compared_with_the_weights(tmp_path: Path, keys: Any, expected: str) -> None:
    folder = write_olmo(tmp_path / "checkpoint", made_model())
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["model"] |= keys
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    before = time.monotonic()
    with pytest.raises(ValueError, match=expected) as caught:
        checkpoint.load_model(folder, CPU)
    assert str(folder) in str(caught.value) and time.monotonic() - before < 5


def test_a_transformers_folder_of_a_billion_layers(split: Path) -> None:
    config = json.loads((split / "config.json").read_text())
    (split / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 10**9}))
    with pytest.raises(ValueError, match=r"split: num_hidden_layers is 1,000,000,000, the weights have"):
        checkpoint.read_state(split)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    sizes = {"vocab_size": 100, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)).save_pretrained(folder)
    return folder


def changed(source: Path, folder: Path, **keys: Any) -> Path:
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **keys}))
    return folder


def test_a_foreign_model_of_a_billion_layers_is_not_built(llama: Path, tmp_path: Path) -> None:
    folder = changed(llama, tmp_path / "folder", num_hidden_layers=10**9)
    for make in (lambda: open_model(folder, CPU, torch.float32), lambda: empty_network(folder)):
        with pytest.raises(ValueError, match=r"config\.json: num_hidden_layers is 1,000,000,000, the weights have 21"):
            make()


def test_code_that_a_model_brings_is_never_run(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    folder = changed(llama, tmp_path / "folder", model_type="own", auto_map=code)
    (folder / "code.py").write_text(f"open({str(tmp_path / 'touched')!r}, 'w')")
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # what a user may type if asked
    with pytest.raises(ValueError, match=r"config\.json requires code of its own \(auto_map\)"):
        open_model(folder, CPU, torch.float32)
    assert not (tmp_path / "touched").exists()


def test_weights_that_a_foreign_model_lacks_are_not_made_up(
    llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = changed(llama, tmp_path / "folder")
    state = load_file(folder / "model.safetensors")
    lost = state.pop("model.layers.1.mlp.up_proj.weight")
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lack 1 tensors of the model: model\.layers\.1\.mlp\.up_proj\.weight"):
        open_model(folder, CPU, torch.float32)
    state |= {"model.layers.1.mlp.up_proj.weight": lost, "model.extra": torch.zeros(3)}
    save_file({n: t for n, t in state.items() if n != "lm_head.weight"}, folder / "model.safetensors", {"format": "pt"})
    open_model(folder, CPU, torch.float32)  # no memory depends on the head
    assert "1 tensors are no part of the model: model.extra" in caplog.text


# --- manifests ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"../../etc/passwd": {"size": 1, "crc32": "0"}}, "a path outside of the checkpoint"),
        ({"/etc/passwd": {"size": 1, "crc32": "0"}}, "a path outside of the checkpoint"),
        ({"a": {"size": "1", "crc32": "0"}}, "not a checkpoint manifest"),
        ({"a": 3}, "not a checkpoint manifest"),
        ([], "not a checkpoint manifest"),
        ({}, "not a checkpoint manifest"),  # it would vouch for an empty folder
    ],
    ids=str,
)
def test_a_manifest_that_lies_is_no_manifest(tmp_path: Path, files: Any, expected: str) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"ephemeral": False, "files": files}))
    assert expected in str(manifest.problem(tmp_path))
    with pytest.raises(ValueError, match=expected):
        manifest.sizes(tmp_path)


def test_a_manifest_of_many_files_takes_few_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {f"file{number}": {"size": 0, "crc32": "00000000"} for number in range(2000)}
    for name in files:
        (tmp_path / name).touch()
    (tmp_path / "manifest.json").write_text(json.dumps({"ephemeral": False, "files": files}))
    seen: list[int] = []
    real = manifest.ThreadPoolExecutor
    monkeypatch.setattr(manifest, "ThreadPoolExecutor", lambda count: seen.append(count) or real(count))
    assert manifest.problem(tmp_path) is None and max(seen) <= 32
