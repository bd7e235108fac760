"""Checkpoints: read, write and restart from them."""

# ruff: noqa: F401 (what is imported here is what the package exports)
from .completion import complete
from .edits import full_state, resuscitate, stored_as
from .families import empty_network, open_network
from .hub import download, downloaded, downloaded_refs, fetch_base, is_hub_id, known_refs, refs, resolve, size_of
from .optimizer import load_optimizer_state, named_weights, optimizer_state, read_optimizer_state
from .spread import spread_model, spread_network
from .weights import (
    MODEL,
    Fingerprint,
    StateOnDisk,
    check_behaviour,
    check_fit,
    check_layers,
    file_dtype,
    fingerprint,
    identity_of,
    identity_of_model,
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
