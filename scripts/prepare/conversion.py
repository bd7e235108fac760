"""A checkpoint written in another layout, as a folder that is complete or absent."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import torch

from analysis.edited_folder import copy_other_files, write_edited_folder
from olmo import checkpoint
from olmo.checkpoint import families
from olmo.checkpoint.config_json import has_original_keys, to_transformers_config
from olmo.checkpoint.saves import is_sharded
from olmo.checkpoint.transformers_layout import to_transformers_state
from olmo.config import ModelConfig, load_model_config, save_model_config
from olmo.exceptions import ConfigurationError
from olmo.files.digests import file_digest
from olmo.files.tensors import shapes_of, write_olmo_safetensors, write_safetensors
from olmo.memory.rescaling import load_multipliers
from olmo.memory.temperature import Temperatures
from olmo.model import OLMo
from olmo.model.causal_lm import CausalLM, distinct_state
from olmo.tokenizer import load_tokenizer, tokenizer_of_folder
from scripts.prepare.model_card import NAME as CARD
from scripts.prepare.model_card import Origin, model_card
from scripts.prepare.new_folder import new_folder

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def write_tokenizer(source: Path, target: Path, identifier: str | None, model: ModelConfig) -> str | None:
    """Copy the tokenizer's files, or write those of `identifier`; returns its origin, None without one.

    An unreadable tokenizer is an error only if `identifier` is given; one named by a config.yaml may be missing here.
    """
    if identifier is None and (source / "tokenizer.json").is_file():
        for name in TOKENIZER_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, target / name)
        return str(source / "tokenizer.json")
    asked = identifier is not None
    identifier = identifier or tokenizer_of_folder(source)
    if identifier is None:
        return None
    try:
        tokenizer = load_tokenizer(identifier)
    except (OSError, ValueError):
        if asked:
            raise
        return None
    from transformers import PreTrainedTokenizerFast  # takes a second

    if tokenizer.get_vocab_size() > (model.embedding_size or model.vocab_size):
        raise ConfigurationError(
            f"{identifier}: {tokenizer.get_vocab_size()} tokens, the model has {model.embedding_size} rows"
        )
    special = {"eos_token": model.eos_token_id, "pad_token": model.pad_token_id}
    known = {name: token for name, number in special.items() if (token := tokenizer.id_to_token(number)) is not None}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **known).save_pretrained(target)
    return identifier


def convert(origin: Origin, target: Path, to: str, force: bool = False, copy: bool = False) -> str:
    """Write the checkpoint `origin` as the folder `target`, completely or not at all; returns a line that describes it.

    copy: a folder that is in transformers' layout already is copied. Raises ConfigurationError where the layout cannot
    hold the model, ValueError for weights that do not fit.
    """
    source, edit, identifier = origin.folder, origin.edit, origin.tokenizer
    is_olmo = checkpoint.is_olmo(source)
    if not is_olmo and to == "olmo":
        raise ConfigurationError(f"{source}: not an OLMo model; --to olmo writes OLMo and OLMo 2 only")
    if not is_olmo and identifier is not None:
        raise ConfigurationError("--tokenizer: models of other families keep the tokenizer of their folder")
    restarts = not is_olmo and is_sharded(source)
    if not is_olmo and not restarts and edit is None and not copy:
        raise ConfigurationError(
            f"{source}: already in transformers' layout; --resuscitation names an edit to apply, --push uploads it"
        )
    # Weights under OLMo's names are no edit of files with transformers' names.
    by_file = edit is not None and to == "hf" and is_transformers(source) and not (is_olmo and edit.suffix == ".pt")
    with new_folder(target) as partial:
        if restarts:
            result = _write_family(source, partial, edit, force)
        elif edit is not None and by_file:
            edited, tensors = write_edited_folder(source, partial, edit, force)
            result = f"{edited} of {tensors} tensors edited"
        elif is_olmo:
            result = _convert_olmo(source, partial, to, edit, force)
        else:
            result = f"{copy_other_files(source, partial, weights=True)} files copied"
        if is_olmo and (not by_file or identifier is not None):
            tokenizer = write_tokenizer(source, partial, identifier, checkpoint.read_config(source))
            result += f", tokenizer {tokenizer or 'unknown; name it with --tokenizer'}"
        if edit is not None:
            _record(partial / "resuscitation.json", source, edit, force)
        if to == "hf":
            (partial / CARD).write_text(model_card(origin, partial), encoding="utf-8")
    return f"{target}: {result}"


def was_written(origin: Origin, target: Path) -> bool:
    """Whether `target` is what the conversion of `origin` writes: by its card, which names the weights, and by the
    weights where it is a card of their own, which need not."""
    if not (target / CARD).is_file() or not (target / "config.json").is_file():
        return False
    if (target / CARD).read_text(encoding="utf-8") != model_card(origin, target):
        return False
    return not origin.keeps_card() or checkpoint.identity_of(target) == checkpoint.identity_of(origin.folder)


def is_transformers(folder: Path) -> bool:
    """Whether a folder has the config.json and the names of tensors of a class of transformers."""
    raw = checkpoint.transformers_config(folder)
    return raw is not None and not has_original_keys(raw)


def _convert_olmo(source: Path, folder: Path, to: str, edit: Path | None, force: bool) -> str:
    config = replace(checkpoint.read_config(source), resuscitation=None)
    state = checkpoint.read_state(source)
    if edit is not None:
        state = checkpoint.resuscitated(state, str(edit), source, key="--resuscitation", force=force)
    checkpoint.check_fit(OLMo.empty(config), state, str(source))
    if to == "hf":
        described = to_transformers_config(config, shapes_of(state)["transformer.wte.weight"].dtype)
        (folder / "config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
        write_safetensors(folder / "model.safetensors", to_transformers_state(state, config), {"format": "pt"})
    else:
        divisors = Temperatures.from_config(config, source).memories
        if divisors is not None:
            config = replace(config, temperature_MLP="temperature_MLP.safetensors")
            write_olmo_safetensors(folder / "temperature_MLP.safetensors", {"temperature_MLP": divisors})
        save_model_config(folder / "config.yaml", config)
        write_olmo_safetensors(folder / "model.safetensors", state)
    return f"{sum(tensor.numel() for tensor in shapes_of(state).values()):,} weights"


def _write_family(source: Path, folder: Path, edit: Path | None, force: bool) -> str:
    """Write the restart checkpoint of a model of another family as the transformers folder that its run saves."""
    config = load_model_config(source / "config.yaml")
    config = replace(config, resuscitation=None if edit is None else str(edit), resuscitation_force=force)
    model = families.load_model(source, torch.device("cpu"), config)
    assert isinstance(model, CausalLM)
    for name, content in model.files.items():
        (folder / name).write_bytes(content)
    state = distinct_state(model)
    families.write_weights(folder, model, state)
    return f"{sum(tensor.numel() for tensor in state.values()):,} weights"


def _record(path: Path, source: Path, edit: Path, force: bool) -> None:
    """Write what was edited by which file; of multipliers, how they were made."""
    about = load_multipliers(edit).about if edit.suffix == ".safetensors" else None
    made = {"checkpoint": str(source), "resuscitation": str(edit), "sha256": file_digest(edit), "settings": about}
    path.write_text(json.dumps({**made, "forced": force}, indent=2) + "\n", encoding="utf-8")
