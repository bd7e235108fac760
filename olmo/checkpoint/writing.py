"""Checkpoint folders written complete or not at all, unsharded (OLMo's layout) or sharded (every process its part)."""

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
from ..distributed import Ranks, full_tensor, is_of_collective
from ..exceptions import FailedEverywhere, short_message
from ..files.tensors import write_tensors
from ..memory.temperature import Temperatures
from ..model import OLMo
from . import folder as saves
from . import manifest
from .optimizer import optimizer_state


def save(
    folder: Path,
    model: OLMo,
    config: TrainConfig,
    optimizer: torch.optim.Optimizer,
    trainer: dict[str, Any],
    temperatures: Temperatures | None = None,
    ephemeral: bool = False,
    first: bool = True,
) -> None:
    """Write an unsharded checkpoint, whole or not at all; an older one of that name is replaced.

    `temperatures`, those of this moment, are written with it: what is loaded computes what was saved. An `ephemeral`
    one is marked as such. All of it is on the disk before it gets its name. Raises OSError.
    What FSDP has cut is gathered, a collective; then only the `first` process writes.
    """

    def gathered(value: Any) -> Any:
        """A tensor whole, in main memory where it will be written."""
        if not isinstance(value, Tensor):
            return value
        value = full_tensor(value.detach())
        return value.cpu().contiguous() if first else None

    weights = {name: gathered(tensor) for name, tensor in model.state_dict().items()}
    saved = optimizer_state(optimizer)
    saved["state"] = {name: {e: gathered(v) for e, v in entries.items()} for name, entries in saved["state"].items()}
    if not first:
        return
    with _failing(folder):
        _begin(folder, config, trainer, temperatures)
        write_tensors(_partial(folder) / "model.safetensors", weights)
        for group in saved["param_groups"]:  # what OLMo's optimizer clips by
            limits = {"max_grad_norm": config.max_grad_norm, "max_grad_norm_ratio": config.max_grad_norm_ratio}
            group.update(sharded=False, **limits)
        _torch_save(saved, _partial(folder) / "optim.pt")
        _complete(folder, ephemeral)


def save_sharded(
    folder: Path,
    tensors: Mapping[str, Tensor],
    config: TrainConfig,
    trainer: dict[str, Any],
    temperatures: Temperatures | None,
    ephemeral: bool,
    ranks: Ranks,
) -> None:
    """Write what `sharded.snapshot` has made on every process, whole or not at all, as `save` does.

    A collective of the thread that saves; OSError on all processes where one fails.
    """
    from . import sharded

    with _failing(folder, FailedEverywhere):
        sharded.first_does(ranks, partial(_begin, folder, config, trainer, temperatures))
        sharded.write(_partial(folder), tensors, ranks)
        sharded.first_does(ranks, partial(sharded.check_parts, _partial(folder)))
        sharded.first_does(ranks, partial(_complete, folder, ephemeral))


def _partial(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.partial")


@contextmanager
def _failing(folder: Path, kind: type[OSError] = OSError) -> Iterator[None]:
    """Leave nothing half-written behind where a save fails; raise OSError, of this kind, that says why."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # on a full disk torch speaks of its own streams
        if is_of_collective(error):
            raise
        shutil.rmtree(_partial(folder), ignore_errors=True)
        cause = error.__cause__ or error.__context__ or error  # torch wraps it, write_tensors names a file that is gone
        raise kind(
            f"{folder}: cannot be saved ({short_message(cause)}); the checkpoints before it are intact"
        ) from error


def _begin(folder: Path, config: TrainConfig, trainer: dict[str, Any], temperatures: Temperatures | None) -> None:
    """Make the folder to write to, with all that is no weight and no optimizer's."""
    written = _partial(folder)
    shutil.rmtree(written, ignore_errors=True)
    written.mkdir(parents=True)
    if temperatures:
        file = None
        if temperatures.memories is not None:
            file = "temperature_MLP.safetensors"
            write_tensors(written / file, {"temperature_MLP": temperatures.memories.cpu()})
        config = replace(
            config,
            model=replace(
                config.model,
                temperature_attention=temperatures.attention,
                temperature_MLP=file,
                temperature_decay=False,
            ),
        )
    elif config.model.temperature_attention or config.model.temperature_MLP:  # they have come down to 1
        config = replace(config, model=replace(config.model, temperature_attention=None, temperature_MLP=None))
    config.save(written / "config.yaml")
    _torch_save(trainer, written / "train.pt")


def _torch_save(state: Any, path: Path) -> None:
    with path.open("wb") as target:  # torch does not tell why its own streams fail
        torch.save(state, target)


def _complete(folder: Path, ephemeral: bool) -> None:
    manifest.write(_partial(folder), ephemeral)
    saves.remove(folder, successor=_partial(folder))
