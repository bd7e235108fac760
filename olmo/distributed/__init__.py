"""Processes and devices: this process, the others that a launcher started, and what they exchange."""

# ruff: noqa: F401 (what is imported here is what the package exports)
from typing import TYPE_CHECKING

from .. import on_use

if TYPE_CHECKING:
    from .devices import full_tensor, pick_device, shard_like, to_device
    from .launcher import ABANDONABLE, adopt_launcher, disable_malloc_trim, exit_process
    from .ranks import Ranks, current_ranks, is_collective_error, process_group
else:
    __getattr__, __dir__ = on_use(
        __name__,
        devices="full_tensor pick_device shard_like to_device",
        launcher="ABANDONABLE adopt_launcher disable_malloc_trim exit_process",
        ranks="Ranks current_ranks is_collective_error process_group",
    )
