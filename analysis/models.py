"""Models to analyse: open the checkpoint of any family, with or without an edit, and identify its weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from olmo import checkpoint
from olmo.console import log
from olmo.files.digests import file_digest
from olmo.files.tensors import read_tensors
from olmo.memory.rescaling import rescale_model

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
_MOST_LAYERS = 10_000  # an empty model of more takes minutes to build
_NO_CODE = {"trust_remote_code": False}  # without it, transformers asks on a terminal whether to run it


def open_model(
    folder: Path,
    device: torch.device,
    dtype: torch.dtype | str,
    resuscitation: Path | None = None,
    force: bool = False,
) -> nn.Module:
    """The model of a checkpoint folder, in evaluation mode: our own class for OLMo's layouts, transformers' class for
    any other family, for which `dtype` may be "auto".

    `resuscitation`: a file of analysis.change_parameters to apply; it must have been made for this checkpoint unless
    `force`. Raises ValueError where the weights or the edit do not fit, OSError where a file cannot be read.
    """
    if checkpoint.is_olmo(folder):
        assert isinstance(dtype, torch.dtype)
        name = None if resuscitation is None else str(resuscitation)
        config = replace(checkpoint.read_config(folder), resuscitation=name, resuscitation_force=force)
        return checkpoint.load_model(folder, device, dtype, config).eval()
    from transformers import AutoModelForCausalLM

    checkpoint.check_layers(folder)
    with _named_errors(folder):
        model, found = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, output_loading_info=True, **_NO_CODE
        )
    # Transformers fills them with random numbers. The memories do not depend on the head, which some checkpoints lack.
    head = model.get_output_embeddings()
    names = {
        f"{name}.{part}" for name, module in model.named_modules() if module is head for part in ("weight", "bias")
    }
    if missing := sorted(set(found["missing_keys"]) - names):
        raise ValueError(f"{folder}: the weights lack {len(missing)} tensors of the model: {', '.join(missing[:3])}")
    if unused := sorted(found["unexpected_keys"]):
        log.warning("%s: %s tensors are no part of the model: %s", folder, len(unused), ", ".join(unused[:3]))
    if resuscitation is not None and resuscitation.suffix == ".pt":
        try:
            model.load_state_dict(read_tensors(resuscitation))
        except RuntimeError as error:  # torch lists every tensor
            raise ValueError(f"{resuscitation}: no state dict of the model in {folder}") from error
    elif resuscitation is not None:
        rescale_model(model, checkpoint.multipliers_for(resuscitation, identity_of(folder), folder, force))
    return model.to(device).eval()


def empty_model(folder: Path, has_weights: bool = True) -> nn.Module:
    """The model of a transformers folder on the meta device, without weights. Raises ValueError if it has no class.

    has_weights: whether the folder has them, so that the layers of its config.json can be compared with theirs.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if has_weights:
        checkpoint.check_layers(folder)
    with _named_errors(folder), torch.device("meta"):
        config = AutoConfig.from_pretrained(folder, local_files_only=True, **_NO_CODE)
        if (layers := getattr(config.get_text_config(), "num_hidden_layers", 0)) > _MOST_LAYERS:
            raise ValueError(f"config.json has {layers:,} layers")
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32, **_NO_CODE).eval()


@contextmanager
def _named_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # each library below has its own errors for damaged files
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        if "trust_remote_code" in str(error):
            reason = "config.json wants code of its own to be run (auto_map), and no downloaded code is"
        raise ValueError(f"{folder}: transformers cannot load this model: {reason}") from error


def identity_of(folder: Path) -> str:
    """SHA-256 that identifies the weights of a folder: `fingerprint` of an OLMo model, else of the weight files.

    Reads all of them; the system keeps what fits in its page cache.
    """
    if checkpoint.is_olmo(folder):
        return checkpoint.fingerprint(checkpoint.read_state(folder))
    return hashlib.sha256(" ".join(map(file_digest, checkpoint.model_files(folder))).encode()).hexdigest()


def state_of_files(folder: Path) -> str:
    """What changes when a checkpoint is replaced: identity, size and times of its weight files."""
    found = ((path.name, path.stat()) for path in checkpoint.model_files(folder))
    return str([(name, s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for name, s in found])
