"""Checkpoints: read, write and restart from them."""

# ruff: noqa: F401 (what is imported here is what the package exports)
from typing import TYPE_CHECKING, Any

from .. import on_use

if TYPE_CHECKING:
    from .completion import complete
    from .edits import full_state, resuscitate, stored_as
    from .families import empty_network, open_network
    from .folder import is_olmo, model_files, read_config, resuscitation_file, transformers_config
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
        load_model,
        multipliers_for,
        read_state,
        resuscitated,
    )
    from .writing import save, save_sharded
else:
    __getattr__, __dir__ = on_use(
        __name__,
        completion="complete",
        edits="full_state resuscitate stored_as",
        families="empty_network open_network",
        folder="is_olmo model_files read_config resuscitation_file transformers_config",
        hub="download downloaded downloaded_refs fetch_base is_hub_id known_refs refs resolve size_of",
        optimizer="load_optimizer_state named_weights optimizer_state read_optimizer_state",
        spread="spread_model spread_network",
        weights="MODEL Fingerprint StateOnDisk check_behaviour check_fit check_layers file_dtype fingerprint "
        "identity_of identity_of_model load_model multipliers_for read_state resuscitated",
        writing="save save_sharded",
    )

    def save(*arguments: Any, **settings: Any) -> None:
        """`writing.save`. Defined here because nnsight adds a method of this name to every object, this module
        included, and Python finds that before a name which is imported on use."""
        from .writing import save

        save(*arguments, **settings)
