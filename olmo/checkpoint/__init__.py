"""Checkpoints: read, write and restart from them."""

# ruff: noqa: F401 (what is imported here is what the package exports)
from .families import as_saved, complete, empty_network, identity_of, open_network, resuscitate
from .hub import download, downloaded, is_hub_id, resolve
from .optimizer import load_optimizer_state, named_weights, optimizer_state, read_optimizer_state
from .weights import (
    Fingerprint,
    StateOnDisk,
    check_behaviour,
    check_fit,
    check_layers,
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
