"""Folders of adapters (PEFT): weights that are added to those of a base model, which adapter_config.json names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .paths import is_hub_id, read_json

CONFIGURATION = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
MERGE = "peft's merge_and_unload, then save_pretrained into a new folder"
_MODELS = ("model*.safetensors", "model.pt", "pytorch_model*.bin", "model_and_optim")


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter that names its base model, and no model."""
    if not (folder / CONFIGURATION).is_file() or any(path for name in _MODELS for path in folder.glob(name)):
        return False
    return bool(_configuration(folder).get("base_model_name_or_path"))


def _configuration(folder: Path) -> dict[str, Any]:
    raw = read_json(folder / CONFIGURATION)
    return raw if isinstance(raw, dict) else {}


def base_name(folder: Path) -> str:
    """The base model of an adapter's folder: a folder, seen from here or from the adapter's folder, or
    `owner/name[@revision]` on the hub. Raises FileNotFoundError for anything else."""
    found = _configuration(folder)
    name, revision = str(found["base_model_name_or_path"]), found.get("revision")
    for place in (Path(name), folder / name):
        if place.is_dir():
            return str(place)
    if not is_hub_id(name):
        raise FileNotFoundError(f"{folder / CONFIGURATION}: base_model_name_or_path: {name}: no such folder")
    return f"{name}@{revision}" if isinstance(revision, str) and revision else name


def base_folder(folder: Path) -> Path:
    """The folder of an adapter's base model, of the hub's from its cache; any other folder itself. Raises as
    `base_name` does, and FileNotFoundError for a model of the hub that is not downloaded."""
    if not is_adapter(folder):
        return folder
    name, _, revision = base_name(folder).partition("@")
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(name, "config.json", revision=revision or None)
    if not isinstance(cached, str):
        raise FileNotFoundError(f"{folder / CONFIGURATION}: base_model_name_or_path: {name} is not downloaded")
    return Path(cached).parent
