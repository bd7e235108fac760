"""Models to analyse: open the checkpoint of any family, with or without an edit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from olmo import checkpoint

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def open_model(
    folder: Path,
    device: torch.device,
    dtype: torch.dtype | str,
    resuscitation: Path | None = None,
    force: bool = False,
) -> nn.Module:
    """The model of a checkpoint folder, in evaluation mode: our own class for OLMo's layouts, transformers' class for
    any other family, for which `dtype` may be "auto".

    `resuscitation`: a file of analysis.change_parameters to apply; it must have been made for this checkpoint unless
    `force`. Raises ValueError where the weights or the edit do not fit, OSError where a file cannot be read.
    """
    if checkpoint.is_olmo(folder):
        assert isinstance(dtype, torch.dtype)
        name = None if resuscitation is None else str(resuscitation)
        config = replace(checkpoint.read_config(folder), resuscitation=name, resuscitation_force=force)
        return checkpoint.load_model(folder, device, dtype, config).eval()
    model = checkpoint.open_network(folder, dtype)
    if resuscitation is not None:
        checkpoint.resuscitate(model, folder, resuscitation, force)
    return model.to(device).eval()


def state_of_files(folder: Path) -> str:
    """What changes when a checkpoint is replaced: identity, size and times of its weight files."""
    found = ((path.name, path.stat()) for path in checkpoint.model_files(folder))
    return str([(name, s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for name, s in found])
