"""Models to analyse: open the checkpoint of any family, with or without an edit or temperatures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from olmo import checkpoint
from olmo.exceptions import ConfigurationError
from olmo.files.adapters import MERGE, is_adapter

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def open_model(
    folder: Path,
    device: torch.device,
    dtype: torch.dtype | str,
    resuscitation: Path | None = None,
    force: bool = False,
    temperature_attention: float | None = None,
    temperature_MLP: str | None = None,
) -> nn.Module:
    """The model of a checkpoint folder, in evaluation mode: our own class for OLMo's layouts, transformers' class for
    any other family, for which `dtype` may be "auto".

    `resuscitation`: a file of analysis.change_parameters to apply; it must have been made for this checkpoint unless
    `force`. The temperatures are those of a run's configuration at its first step (`olmo/memory/temperature.py`), in
    place of the checkpoint's own; only OLMo's layouts have them.
    Raises ValueError where the weights or the edit do not fit, OSError where a file cannot be read.
    """
    given: dict[str, Any] = {"temperature_attention": temperature_attention, "temperature_MLP": temperature_MLP}
    temperatures = {name: value for name, value in given.items() if value is not None}
    if checkpoint.is_olmo(folder):
        assert isinstance(dtype, torch.dtype)
        name = None if resuscitation is None else str(resuscitation)
        config = replace(checkpoint.read_config(folder), resuscitation=name, resuscitation_force=force, **temperatures)
        return checkpoint.load_model(folder, device, dtype, config).eval()
    for name in temperatures:
        raise ConfigurationError(f"--{name}: only OLMo models have temperatures; {folder} is of another family")
    if resuscitation is not None and is_adapter(folder):
        raise ConfigurationError(f"{folder}: an adapter, which has no weights to edit; merge it first: {MERGE}")
    model = checkpoint.open_network(folder, dtype)
    if resuscitation is not None:
        checkpoint.resuscitate(model, folder, resuscitation, force)
    return model.to(device).eval()


def state_of_files(folder: Path) -> str:
    """What changes when a checkpoint is replaced: identity, size and times of its weight files."""
    found = ((path.name, path.stat()) for path in checkpoint.model_files(folder))
    return str([(name, s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for name, s in found])
