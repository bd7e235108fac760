"""Rescaling rows of up projections: the multipliers of a resuscitation, their file, and what they make of weights.

Method section 2 (paper, algorithm 1). L layers, M memories of a layer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..files.atomic import atomic_path
from ..files.paths import check_readable
from ..files.tensors import save_tensors
from .locate import find_memories, is_conv1d, up_projection


@dataclass(frozen=True)
class Multipliers:
    """What resuscitation does to a model: factor u (L, M) float32 of every row of the up projections, 1 where nothing
    changes; which rows it selected, bool (L, M); `about` says how they were made, for which checkpoint, from which
    coefficients."""

    values: Tensor
    selected: Tensor
    about: dict[str, Any]

    def save(self, path: Path) -> None:
        """Write as safetensors, whole or not at all."""
        metadata = {"resuscitation": json.dumps(self.about, sort_keys=True)}
        with atomic_path(path) as partial:
            save_tensors(partial, {"multipliers": self.values, "selected": self.selected}, metadata)


def load_multipliers(path: Path) -> Multipliers:
    """Read a multiplier file; raises OSError where it cannot be read, ValueError where it is none."""
    check_readable(path)
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get("resuscitation", "null"))
            values, selected = file.get_tensor("multipliers"), file.get_tensor("selected")
    except Exception as error:  # safetensors raises its own error type for files it cannot read
        raise ValueError(f"{path}: no multiplier file of analysis.change_parameters: {error}") from error
    if not isinstance(about, dict):
        raise ValueError(
            f"{path}: no multiplier file of analysis.change_parameters: it says nothing of how it was made"
        )
    if values.ndim != 2 or values.shape != selected.shape or not torch.isfinite(values).all():
        raise ValueError(f"{path}: multipliers must be finite, one row a layer")
    return Multipliers(values.float(), selected.bool(), about)


def up_projection_name(layer: int) -> str:
    """The parameter of an OLMo state dict whose first M rows are the up projection of a layer."""
    return f"transformer.blocks.{layer}.ff_proj.weight"


def rescale(state: Mapping[str, Tensor], multipliers: Tensor) -> dict[str, Tensor]:
    """A state dict of OLMo whose up projections have row i of layer l multiplied by multipliers[l, i] (algorithm 1).

    Only the edited tensors are copied. Rows of a bias of ff_proj are multiplied too, so that the whole up
    projection scales. Raises ValueError when the shapes do not fit.
    """
    check_shapes({name: tensor.shape for name, tensor in state.items()}, multipliers)
    return {name: rescaled(name, tensor, multipliers) for name, tensor in state.items()}


def check_shapes(shapes: Mapping[str, torch.Size], multipliers: Tensor) -> None:
    """Raise ValueError where multipliers (L, M) do not fit a state dict of OLMo with tensors of these shapes."""
    layers, memories = multipliers.shape
    depth = sum(1 for name in shapes if name.endswith(".ff_proj.weight"))
    if depth != layers:
        raise ValueError(f"multipliers for {layers} layers, the model has {depth}")
    for layer in range(layers):
        down = f"transformer.blocks.{layer}.ff_out.weight"
        if not {up_projection_name(layer), down} <= shapes.keys():
            raise ValueError(f"{up_projection_name(layer)} or {down}: missing among the weights")
        inner = shapes[down][1]
        if inner != memories:
            raise ValueError(f"{up_projection_name(layer)}: multipliers for {memories} memories, the layer has {inner}")


def rescaled(name: str, tensor: Tensor, multipliers: Tensor) -> Tensor:
    """One tensor of `rescale`: itself where it belongs to no up projection or no row changes, else an edited copy."""
    match = re.fullmatch(r"transformer\.blocks\.(\d+)\.ff_proj\.(?:weight|bias)", name)
    if match is None or (multipliers[int(match[1])] == 1).all():
        return tensor
    edited = tensor.clone()
    multiply_rows(edited[: multipliers.shape[1]], multipliers[int(match[1])])
    return edited


def multiply_rows(rows: Tensor, factors: Tensor) -> None:
    """Multiply rows (M, ...) in place, those alone whose factor (M,) float32 is not 1; rounded once, to their type."""
    changed = factors != 1
    factor = factors[changed].to(rows.device)
    rows[changed] = (rows[changed] * factor.view(-1, *[1] * (rows.ndim - 1))).to(rows.dtype)


@torch.no_grad()
def rescale_model(model: nn.Module, multipliers: Tensor) -> None:
    """Multiply the rows of the up projections of any architecture in place, with their biases.

    Of a gated layer the rows of the up projection, so that coefficients scale by just these factors; of a plain one
    those of its first projection, before the activation. Raises ValueError where `up_projection` does, or where the
    shapes do not fit.
    """
    layers = find_memories(model)
    counts = [sum(part.count for part in parts) for parts in layers]
    if multipliers.shape != (len(layers), counts[0]):
        raise ValueError(f"multipliers of shape {tuple(multipliers.shape)}, memories of shape {len(layers), counts[0]}")
    places = [up_projection(model, parts) for parts in layers]  # of all, before any row changes
    for (module, rows), factors in zip(places, multipliers):
        for name, parameter in module.named_parameters(recurse=False):
            by_row = parameter.T if name == "weight" and is_conv1d(module) else parameter
            multiply_rows(by_row[rows], factors)
