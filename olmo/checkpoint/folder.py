"""The files of a checkpoint folder of any layout, and the configuration of its model, read without torch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ..config.load import load_model_config, read_yaml
from ..config.model import ModelConfig
from ..files import adapters
from ..files.paths import check_not_lfs, read_json
from . import saves
from .config_json import from_transformers_config, is_known
from .formats import OLMO_CORE, explain, is_olmo_core


def model_files(folder: Path) -> list[Path]:
    """The weight files of a checkpoint folder of any layout; where they are several, those that its index names.

    Raises FileNotFoundError where there are none, ValueError where they are not downloaded; both name what is there.
    """
    own = [folder / adapters.WEIGHTS] if adapters.is_adapter(folder) else []
    if own and not own[0].is_file():
        raise FileNotFoundError(
            f"{folder}: an adapter without {adapters.WEIGHTS}; adapter_model.bin, which can hold code, is not read: "
            "save it with safe_serialization=True"
        )
    files = own + _model_files(adapters.base_folder(folder))
    for path in files:
        check_not_lfs(path)
    return files


def _model_files(folder: Path) -> list[Path]:
    for single in ("model.safetensors", "model.pt"):
        if (folder / single).is_file():
            return [folder / single]
    if saves.is_sharded(folder):
        return sorted((folder / saves.SHARDS).iterdir())
    for index, pattern in (
        ("model.safetensors.index.json", "model-*.safetensors"),
        ("pytorch_model.bin.index.json", "pytorch_model*.bin"),
    ):
        if (folder / index).is_file():
            return _indexed(folder / index)
        files = sorted(folder.glob(pattern))
        if files:
            return files
    meant = f"; did you mean {folder / 'latest'}?" if (folder / "latest").is_dir() else ""
    if not meant and (found := explain(folder)):
        raise FileNotFoundError(f"{folder}: {found}")
    raise FileNotFoundError(
        f"{folder}: no weights here (expected model.safetensors, model.pt, model_and_optim, or the files of a "
        f"transformers folder){meant}"
    )


def _indexed(index: Path) -> list[Path]:
    """The files that an index of weights names. Raises ValueError where it is none, or names a file elsewhere."""
    raw = read_json(index)
    named = raw.get("weight_map") if isinstance(raw, dict) else None
    if not isinstance(named, dict) or not named or not all(isinstance(name, str) for name in named.values()):
        raise ValueError(f"{index}: not an index of weights: no weight_map of tensors and their files")
    files = sorted(set(named.values()))
    if elsewhere := [name for name in files if name in ("", ".", "..") or re.search(r"[/\\\0]", name)]:
        raise ValueError(f"{index}: names {elsewhere[0]!r}, which is no file of its folder")
    return [index.parent / name for name in files]


def transformers_config(folder: Path) -> dict[str, Any] | None:
    """config.json of a transformers folder, of an adapter its base model's; None for another layout. Our checkpoints of
    other families are such folders too, whose config.yaml names the family."""
    folder = adapters.base_folder(folder)
    path, ours = folder / "config.json", folder / "config.yaml"
    if not path.is_file() or (ours.is_file() and not _names_family(ours)):
        return None
    raw = read_json(path)
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: expected keys and values")
    if is_olmo_core(raw):
        raise ValueError(f"{folder}: {OLMO_CORE.format(folder=folder)}")
    return raw


def _names_family(ours: Path) -> bool:
    """Whether a config.yaml is that of a run on another family."""
    if "transformers" not in ours.read_text("utf-8", errors="replace"):  # most have not, and YAML is read slowly
        return False
    model = OmegaConf.to_container(read_yaml(ours)).get("model")  # type: ignore[union-attr]
    return isinstance(model, dict) and bool(model.get("transformers"))


def is_olmo(folder: Path) -> bool:
    """Whether the folder's weights fit our own model: OLMo's layout, or transformers' OLMo and OLMo 2. Those with an
    adapter fit transformers' class alone."""
    if adapters.is_adapter(folder):
        return False
    raw = transformers_config(folder)
    return raw is None or is_known(raw)


def read_config(folder: Path) -> ModelConfig:
    """The model's shape from any of the layouts."""
    raw = transformers_config(folder)
    if raw is None:
        if not (folder / "config.yaml").exists() and (found := explain(folder)):
            raise FileNotFoundError(f"{folder}: {found}")
        return load_model_config(folder / "config.yaml")
    return from_transformers_config(raw, str(folder / "config.json"))


def resuscitation_file(name: str, folder: Path, key: str) -> Path:
    """Path of a resuscitation file: `name` itself, or a file inside the checkpoint folder."""
    path = Path(name) if Path(name).is_file() else folder / name
    if not path.is_file():
        raise FileNotFoundError(
            f"{key}: {name} is not a file, here or in {folder}; analysis.change_parameters writes one"
        )
    return path
