"""What a run's configuration gets from the folder of its model: the keys of `model` that the folder decides, and the
tokenizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from ..config.model import ModelConfig
from ..config.schema import TrainConfig
from ..config.setting import setting_of
from ..exceptions import ConfigurationError
from ..tokenizer import document_end
from . import hub, saves
from .folder import is_olmo, read_config, transformers_config
from .formats import explain


def complete(raw: DictConfig) -> None:
    """Fill in the section `model`, and the tokenizer, of a run from the folder of its `load_path` or
    `model.transformers`, if the section has no key that describes a model of ours; all else is left as it is.

    Raises ConfigurationError for keys of the section that do not apply to another family, or contradict its folder;
    ValueError or OSError where the folder cannot be read, or holds no model that can be trained.
    """
    model = raw.get("model")
    given = dict(model) if OmegaConf.is_dict(model) else {}
    ours = [f.name for f in fields(ModelConfig) if f.name in given and not setting_of(f).any_family]
    given = {name: value for name, value in given.items() if value is not None or name in ours}
    named, start = given.get("transformers"), raw.get("load_path")
    if not (named or start) or OmegaConf.is_config(named) or OmegaConf.is_config(start):
        return
    name, key = str(named or start), "model.transformers" if named else "load_path"
    if named and start and named != start:
        raise ConfigurationError(
            f"model.transformers: {named}, but load_path is {start}, which decides the family; leave one of the two "
            "out (--model.transformers=null)"
        )
    folder = _folder(raw, name, key, required=not ours)
    if folder is None:
        return
    found = transformers_config(folder)
    if found is None and named:
        raise FileNotFoundError(f"{folder}: no config.json of a model of transformers' (model.transformers)")
    if found is None or is_olmo(folder):
        if named:
            raise ConfigurationError(
                f"model.transformers: {named} is an OLMo model, which this program has itself; for its weights give "
                "load_path, for new ones the keys of the section model"
            )
        if ours:
            return
        about = {**vars(read_config(folder)), "resuscitation": None}
        if about["transformers"]:  # the configuration of a run, without a model
            raise FileNotFoundError(f"{folder}: {explain(folder)} ({key})")
    else:
        if ours:
            raise ConfigurationError(
                f"model.{ours[0]}: does not apply to a {found.get('model_type')} model, which its config.json "
                f"describes; leave out {', '.join(ours)} ({key}: {name})"
            )
        about = {**described(folder, found, given), "transformers": name}
    with open_dict(raw):
        raw.model = {**about, **given}
        tokenizer = raw.get("tokenizer")
        if not (OmegaConf.is_dict(tokenizer) and tokenizer.get("identifier")):
            raw.tokenizer = {**(tokenizer or {}), "identifier": name}


def described(folder: Path, found: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of ModelConfig that a transformers folder, with `found` in its config.json, decides: vocabulary, EOS and
    padding.

    Raises ConfigurationError where a key that is `given` contradicts it, and for a folder that names no EOS;
    ValueError for a folder that holds no causal language model.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    from .families import NO_CODE, named_errors  # torch, which OLMo's folders do not need

    kind = found.get("model_type")
    if not isinstance(kind, str):
        raise ValueError(f"{folder / 'config.json'}: has no model_type, the family of the model")
    if (folder / "adapter_config.json").is_file():
        raise ValueError(f"{folder}: {explain(folder)}")
    with named_errors(folder):
        own = AutoConfig.from_pretrained(folder, local_files_only=True, **NO_CODE)
    config, length = own.get_text_config(), given.get("max_sequence_length")
    rows, longest = getattr(config, "vocab_size", None), getattr(config, "max_position_embeddings", None)
    longest = longest or getattr(config, "max_seq_len", None)  # of MPT
    if type(own) not in MODEL_FOR_CAUSAL_LM_MAPPING or not isinstance(rows, int):
        raise ValueError(f"{folder}: transformers has no causal language model of the type {kind}")
    if isinstance(quantized := found.get("quantization_config"), Mapping):
        raise ConfigurationError(
            f"{folder}: its weights are quantized ({quantized.get('quant_method')}) and cannot be trained; use a "
            "folder of float weights, whose config.json has no quantization_config"
        )
    for key in ("vocab_size", "embedding_size"):
        if given.get(key) not in (None, rows):
            raise ConfigurationError(f"model.{key}: {given[key]}, but {folder} has {rows} rows; leave it out")
    if length is None:
        raise ConfigurationError("model.max_sequence_length: missing; it is the number of tokens of an instance")
    if isinstance(length, int) and isinstance(longest, int) and 0 < longest < length:
        raise ConfigurationError(
            f"model.max_sequence_length: {length}, but {folder} was made for {longest} tokens; use at most that"
        )
    eos = given.get("eos_token_id")
    if eos is None:
        eos = document_end(folder)
    if eos is None:
        raise ConfigurationError(
            f"model.eos_token_id: missing; neither the tokenizer nor the config.json of {folder} names a token that "
            "ends a document"
        )
    padding = getattr(config, "pad_token_id", None)
    padding = padding if isinstance(padding, int) and 0 <= padding < rows else eos
    return {"vocab_size": rows, "embedding_size": rows, "eos_token_id": eos, "pad_token_id": padding}


def _folder(raw: DictConfig, name: str, key: str, required: bool) -> Path | None:
    """The folder of a path or hub id, of which only JSON files are fetched; if it does not exist and the run is to be
    resumed, the newest checkpoint of the run. None if nothing is found nor `required`."""
    if Path(name).is_dir():
        folder = Path(name)
        if required and not any((folder / file).is_file() for file in ("config.json", "config.yaml")):
            raise FileNotFoundError(f"{folder}: {explain(folder) or 'no config.json or config.yaml here'} ({key})")
        return folder
    try:
        return hub.download(name, weights=False) if hub.is_hub_id(name) else hub.resolve(name, key)
    except (OSError, ValueError):
        saved = Path(str(raw.get("save_folder") or TrainConfig.save_folder))
        own = saves.newest(saved) if raw.get("try_load_latest_save") else None
        if required and own is None:
            raise
        return own
