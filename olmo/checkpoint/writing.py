"""Checkpoint folders written complete or not at all: unsharded (OLMo's or transformers' layout), or sharded (every
process its part)."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config.schema import TrainConfig
from ..distributed.devices import full_tensor
from ..distributed.ranks import Ranks, is_collective_error
from ..exceptions import FailedOnAllRanks, short_message
from ..files.tensors import write_olmo_safetensors
from ..memory.temperature import Temperatures
from ..model.causal_lm import CausalLM, Model, distinct_state
from . import families, manifest, saves
from .optimizer import optimizer_state


def save(
    folder: Path,
    model: Model,
    config: TrainConfig,
    optimizer: torch.optim.Optimizer | None,
    trainer: dict[str, Any],
    temperatures: Temperatures | None = None,
    first: bool = True,
) -> None:
    """Write an unsharded checkpoint atomically, replacing an older one of that name.

    Without an optimizer it holds the weights alone, and neither optim.pt nor train.pt. The current `temperatures` are
    part of it, so that the loaded model computes the same. It is on the disk before it gets its name. Tensors that FSDP
    has sharded are gathered (a collective); only the `first` process writes. Raises OSError.
    """

    def gathered(value: Any) -> Any:
        """A full tensor; in main memory on the process that writes it."""
        if not isinstance(value, Tensor):
            return value
        value = full_tensor(value.detach())
        return value.cpu().contiguous() if first else None

    weights = {name: gathered(tensor) for name, tensor in distinct_state(model).items()}
    saved = {"state": {}} if optimizer is None else optimizer_state(optimizer)
    saved["state"] = {name: {e: gathered(v) for e, v in entries.items()} for name, entries in saved["state"].items()}
    if not first:
        return
    with _failing(folder):
        _begin(folder, model, config, None if optimizer is None else trainer, temperatures)
        if isinstance(model, CausalLM):
            families.write_weights(_partial(folder), model, weights)
        else:
            write_olmo_safetensors(_partial(folder) / "model.safetensors", weights)
        if optimizer is not None:
            for group in saved["param_groups"]:  # what OLMo's optimizer clips by
                limits = {"max_grad_norm": config.max_grad_norm, "max_grad_norm_ratio": config.max_grad_norm_ratio}
                group.update(sharded=False, **limits)
            _torch_save(saved, _partial(folder) / "optim.pt")
        _complete(folder)


def save_sharded(
    folder: Path,
    tensors: Mapping[str, Tensor],
    model: Model,
    config: TrainConfig,
    trainer: dict[str, Any],
    temperatures: Temperatures | None,
    ephemeral: bool,
    ranks: Ranks,
) -> None:
    """Write what `sharded.snapshot` has copied on every process, atomically, as `save` does.

    A collective of the thread that saves; OSError on all processes where one fails.
    """
    from . import sharded

    with _failing(folder, FailedOnAllRanks):
        ranks.run_on_first(partial(_begin, folder, model, config, trainer, temperatures), saving=True)
        sharded.write(_partial(folder), tensors, ranks)
        ranks.run_on_first(partial(sharded.check_parts, _partial(folder)), saving=True)
        ranks.run_on_first(partial(_complete, folder, ephemeral), saving=True)


def _partial(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.partial")


@contextmanager
def _failing(folder: Path, kind: type[OSError] = OSError) -> Iterator[None]:
    """If a save fails, delete what it has written and raise an OSError of this kind with the reason."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch's errors about a full disk name its own streams
        if is_collective_error(error):
            raise
        shutil.rmtree(_partial(folder), ignore_errors=True)
        cause = error.__cause__ or error.__context__ or error  # torch wraps it
        raise kind(
            f"{folder}: cannot be saved ({short_message(cause)}); the checkpoints before it are intact"
        ) from error


def _begin(
    folder: Path,
    model: Model,
    config: TrainConfig,
    trainer: dict[str, Any] | None,
    temperatures: Temperatures | None,
) -> None:
    """Create the temporary folder with everything but weights and optimizer state."""
    written = _partial(folder)
    shutil.rmtree(written, ignore_errors=True)
    written.mkdir(parents=True)
    for name, content in model.files.items() if isinstance(model, CausalLM) else ():
        (written / name).write_bytes(content)
    if temperatures:
        file = None
        if temperatures.memories is not None:
            file = "temperature_MLP.safetensors"
            write_olmo_safetensors(written / file, {"temperature_MLP": temperatures.memories.cpu()})
        config = replace(
            config,
            model=replace(
                config.model,
                temperature_attention=temperatures.attention,
                temperature_MLP=file,
                temperature_decay=False,
            ),
        )
    elif config.model.temperature_attention or config.model.temperature_MLP:  # they have decayed to 1
        config = replace(config, model=replace(config.model, temperature_attention=None, temperature_MLP=None))
    config.save(written / "config.yaml")
    if trainer is not None:
        _torch_save(trainer, written / "train.pt")


def _torch_save(state: Any, path: Path) -> None:
    with path.open("wb") as target:  # errors of torch's own streams give no reason
        torch.save(state, target)


def _complete(folder: Path, ephemeral: bool = False) -> None:
    manifest.write(_partial(folder), ephemeral)
    saves.delete(folder, successor=_partial(folder))
