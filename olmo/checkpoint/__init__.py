"""Checkpoints: read, write and restart from them."""

from .hub import download, downloaded, is_hub_id, resolve
from .optimizer import load_optimizer_state, named_weights, optimizer_state, read_optimizer_state
from .weights import (
    Fingerprint,
    StateOnDisk,
    check_behaviour,
    check_fit,
    fingerprint,
    is_olmo,
    load_model,
    model_files,
    multipliers_for,
    read_config,
    read_state,
    resuscitated,
    resuscitation_file,
    transformers_config,
)
from .writing import save, save_sharded

__all__ = [
    "Fingerprint",
    "StateOnDisk",
    "check_behaviour",
    "check_fit",
    "download",
    "downloaded",
    "fingerprint",
    "is_hub_id",
    "is_olmo",
    "load_model",
    "load_optimizer_state",
    "model_files",
    "multipliers_for",
    "named_weights",
    "optimizer_state",
    "read_config",
    "read_optimizer_state",
    "read_state",
    "resolve",
    "resuscitated",
    "resuscitation_file",
    "save",
    "save_sharded",
    "transformers_config",
]
