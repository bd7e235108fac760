"""Models to analyse: open the checkpoint of any family, with or without an edit or temperatures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from analysis import choices
from analysis.device_map import DeviceMap
from olmo import checkpoint
from olmo.exceptions import ConfigurationError
from olmo.files.adapters import MERGE, is_adapter

PRECISIONS = dict(zip(choices.PRECISIONS, (torch.float32, torch.bfloat16, torch.float16), strict=True))


def precision_for(folder: Path, precision: str) -> str:
    """A key of PRECISIONS; "auto" is the type of the files of weights. Raises ConfigurationError where these have
    several, or another."""
    if precision != "auto":
        return precision
    if is_adapter(folder):
        raise ConfigurationError(f"--precision auto: {folder} is an adapter, whose base model may have another type")
    dtype = checkpoint.file_dtype(folder)
    for name, known in PRECISIONS.items():
        if dtype == known:
            return name
    raise ConfigurationError(
        f"--precision auto: the weights of {folder} are {str(dtype).removeprefix('torch.')}, which is none of "
        f"{', '.join(PRECISIONS)}; name one of these"
    )


def open_model(
    folder: Path,
    device: torch.device,
    dtype: torch.dtype | str,
    resuscitation: Path | None = None,
    force: bool = False,
    temperature_attention: float | None = None,
    temperature_MLP: str | None = None,
    device_map: DeviceMap | None = None,
) -> nn.Module:
    """The model of a checkpoint folder, in evaluation mode: our own class for OLMo's layouts, transformers' class for
    any other family, for which `dtype` may be "auto".

    `resuscitation`: a file of analysis.change_parameters to apply; it must have been made for this checkpoint unless
    `force`. The temperatures are those of a run's configuration at its first step (`olmo/memory/temperature.py`), in
    place of the checkpoint's own; only OLMo's layouts have them. `device_map` replaces `device`.
    Raises ValueError where the weights or the edit do not fit, OSError where a file cannot be read.
    """
    given: dict[str, Any] = {"temperature_attention": temperature_attention, "temperature_MLP": temperature_MLP}
    temperatures = {name: value for name, value in given.items() if value is not None}
    if checkpoint.is_olmo(folder):
        assert isinstance(dtype, torch.dtype)
        name = None if resuscitation is None else str(resuscitation)
        config = replace(checkpoint.read_config(folder), resuscitation=name, resuscitation_force=force, **temperatures)
        if device_map is not None:
            return checkpoint.spread_model(folder, config, dtype, device_map)
        return checkpoint.load_model(folder, device, dtype, config).eval()
    for name in temperatures:
        raise ConfigurationError(f"--{name}: only OLMo models have temperatures; {folder} is of another family")
    if resuscitation is not None and is_adapter(folder):
        raise ConfigurationError(f"{folder}: an adapter, which has no weights to edit; merge it first: {MERGE}")
    if device_map is not None and is_adapter(folder):
        raise ConfigurationError(f"--device_map: {folder} is an adapter, opened on one device; merge it first: {MERGE}")
    if device_map is None:
        model = checkpoint.open_network(folder, dtype)
    else:
        assert isinstance(dtype, torch.dtype)
        model = checkpoint.spread_network(folder, dtype, device_map)
    if resuscitation is not None:
        checkpoint.resuscitate(model, folder, resuscitation, force)
    return (model if device_map is not None else model.to(device)).eval()


def state_of_files(folder: Path) -> str:
    """What changes when a checkpoint is replaced: identity, size and times of its weight files."""
    found = ((path.name, path.stat()) for path in checkpoint.model_files(folder))
    return str([(name, s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for name, s in found])
