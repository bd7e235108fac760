"""The edited copy of a transformers folder of any family.

Which rows are multiplied is asked of the model's class, which is built without weights. Files of weights are copied and
the edited tensors in them replaced one by one, so an edit needs the memory of one tensor, and of one file for those of
torch, which are rewritten as safetensors. All else is kept: configuration, tokenizer, index, order and metadata.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from torch import Tensor

from olmo import checkpoint
from olmo.checkpoint import empty_network, identity_of
from olmo.console import Progress
from olmo.exceptions import ConfigurationError
from olmo.files.paths import read_json
from olmo.files.tensors import read_tensors, replace_tensors, write_safetensors
from olmo.memory.rescaling import multiply, row_factors

_INDEX = "model.safetensors.index.json"
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx"}  # in one of these forms
_LEFT_OUT = {"knowledge_entropy.json", "config.yaml", "manifest.json"}  # of the model before the edit, and its run


def write_edited_folder(source: Path, target: Path, resuscitation: Path, force: bool = False) -> tuple[int, int]:
    """Write the transformers folder `source` into the folder `target`, edited by a file of analysis.change_parameters.

    Returns the numbers of edited and of all tensors. The file must have been made for this checkpoint unless `force`.
    Raises ValueError where the rows of the memories cannot be found or the edit does not fit, OSError where a file
    cannot be read or written.
    """
    raw = checkpoint.transformers_config(source) or {}
    if "quantization_config" in raw:
        raise ConfigurationError(f"{source}: quantized weights cannot be edited; use those that were quantized")
    model = empty_network(source)
    files = checkpoint.model_files(source)
    copy_other_files(source, target)
    if resuscitation.suffix == ".pt":
        state = checkpoint.full_state(checkpoint.open_network(source, "auto"), source, resuscitation, force)
        write_safetensors(target / "model.safetensors", state, {"format": "pt"})
        return len(state), len(state)
    multipliers = checkpoint.multipliers_for(resuscitation, identity_of(source), source, force)
    tensors = {path: {name: tensor.to("meta") for name, tensor in read_tensors(path).items()} for path in files}
    held = {name: tensor for of_file in tensors.values() for name, tensor in of_file.items()}
    edits: dict[str, Callable[[Tensor], None]] = {}
    for name, factors in row_factors(model, multipliers).items():
        for on_disk, own in checkpoint.stored_as(model, name, factors, held, source).items():
            if (own != 1).any():
                edits[on_disk] = partial(multiply, factors=own, name=on_disk)
    with Progress("writing", len(files), "files") as progress:
        for path, of_file in tensors.items():
            _write(path, target / _new_name(path), {name: edits[name] for name in of_file if name in edits})
            progress.advance()
    _write_index(source, target, {name: _new_name(path) for path, of_file in tensors.items() for name in of_file})
    return len(edits), len(held)


def copy_other_files(source: Path, target: Path, weights: bool = False) -> int:
    """Copy what a transformers folder holds beside its weights, or with them; not what a run or a measurement has
    added. Returns the number of files."""
    files = [
        path
        for path in source.iterdir()
        if not (path.suffix in _WEIGHTS or path.name in _LEFT_OUT or path.name.startswith("."))
        and not path.name.endswith(".index.json")
    ]
    if weights:
        of_weights = checkpoint.model_files(source)
        files += [*of_weights, *source.glob(f"*{of_weights[0].suffix}.index.json")]
    copied = [shutil.copyfile(path, target / path.name) for path in files if path.is_file()]
    return len(copied)


def _new_name(path: Path) -> str:
    """The name of a file of weights as safetensors: `pytorch_model-00001-of-00002.bin` loses what names torch."""
    return path.name if path.suffix == ".safetensors" else f"{path.stem.removeprefix('pytorch_')}.safetensors"


def _write(path: Path, target: Path, edits: Mapping[str, Callable[[Tensor], None]]) -> None:
    if path.suffix == ".safetensors":
        shutil.copyfile(path, target)
        replace_tensors(target, edits)
        return
    state = read_tensors(path)
    for name, edit in edits.items():
        state[name] = state[name].clone()
        edit(state[name])
    write_safetensors(target, state, {"format": "pt"})


def _write_index(source: Path, target: Path, files: Mapping[str, str]) -> None:
    """Keep the index of safetensors; write one for what was several files of torch: tensor -> file, and its metadata"""
    torch_index = source / "pytorch_model.bin.index.json"
    if (source / _INDEX).is_file():
        shutil.copyfile(source / _INDEX, target / _INDEX)
    elif torch_index.is_file() or len(set(files.values())) > 1:
        index = read_json(torch_index) if torch_index.is_file() else {"metadata": {}}
        text = json.dumps({**index, "weight_map": dict(sorted(files.items()))}, indent=2)
        (target / _INDEX).write_text(f"{text}\n", encoding="utf-8")
