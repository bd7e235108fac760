"""What an optimizer keeps, by the names of the weights: read from a checkpoint and loaded into an optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..distributed.devices import shard_like
from ..files.tensors import read_training_state
from .saves import is_sharded
from .transformers_layout import plain_names


def read_optimizer_state(folder: Path, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What an optimizer like this one kept when a run wrote a checkpoint folder, for `load_optimizer_state`.

    Of weights that FSDP has sharded, from a sharded checkpoint, only what belongs to this process; of other checkpoints
    what is mapped from the file. A collective.
    """
    if not is_sharded(folder):
        sharded_weights = any(hasattr(weight, "full_tensor") for weight in named_weights(optimizer).values())
        return read_training_state(folder, "optim", mapped=sharded_weights)
    from . import sharded

    return {"state": sharded.read_moments(folder, named_weights(optimizer))}


def named_weights(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The weights that an optimizer trains, by name."""
    return {n: w for group in optimizer.param_groups for n, w in zip(group["param_names"], group["params"])}


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's state keyed by parameter name, as OLMo's unsharded optim.pt holds it."""
    state = optimizer.state_dict()
    names = [name for group in state["param_groups"] for name in group["param_names"]]
    groups = [{**group, "params": group["param_names"]} for group in state["param_groups"]]
    return {"state": {names[i]: value for i, value in state["state"].items()}, "param_groups": groups}


def load_optimizer_state(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any], where: str) -> None:
    """Fill the moments of every parameter; learning rate and decay stay those of the run's config.

    OLMo's trainer saves them by name, and under DDP by number, with the names (prefixed) in the groups.
    """
    state = optimizer.state_dict()
    weights = named_weights(optimizer)
    try:
        numbered = {
            number: name
            for group in saved.get("param_groups", [])
            for number, name in zip(group["params"], group.get("param_names", group["params"]))
        }
        found = {
            str(numbered.get(key, key)).removeprefix("module."): dict(value) for key, value in saved["state"].items()
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{where}: holds no optimizer state ({error!r}); set reset_optimizer_state") from error
    found = plain_names(found)
    kept: tuple[str, ...] = getattr(
        optimizer, "state_entries", ("exp_avg", "exp_avg_sq", "step")
    )  # torch's AdamW has none to ask
    for name in sorted(weights):
        if name not in found:
            raise ValueError(f"{where}: no optimizer state for {name}; set reset_optimizer_state")
        entries = found[name].keys() - {"grad_norm_exp_avg"}
        if entries != set(kept) or not all(isinstance(value, Tensor) for value in found[name].values()):
            raise ValueError(
                f"{where}: holds {', '.join(sorted(map(str, entries))) or 'nothing'} of {name}, the optimizer keeps "
                f"{', '.join(kept)}; set reset_optimizer_state"
            )
        for entry, value in found[name].items():
            is_moment = entry.startswith("exp_avg")
            shape = weights[name].shape if is_moment else torch.Size()
            if value.shape != shape or not value.is_floating_point():
                raise ValueError(
                    f"{where}: {entry} of {name} has shape {tuple(value.shape)} and {value.dtype}, "
                    f"not {tuple(shape)} and floating point; set reset_optimizer_state"
                )
            if is_moment:
                found[name][entry] = shard_like(value, weights[name])
    state["state"] = dict(enumerate(found[name] for name in weights))
    optimizer.load_state_dict(state)
