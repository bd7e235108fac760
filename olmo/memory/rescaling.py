"""Rescale rows of up projections: the multipliers of a resuscitation, their file, and the weights after it.

Method section 2 (paper, algorithm 1). M_l memories of layer l.
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
from ..files.tensors import LazyTensors, shapes_of, write_safetensors
from .by_layer import ByLayer, layers_of, tensors_of
from .locate import find_layers, numbered
from .unwrap import is_sharded, kind_of, unwrapped
from .up_projection import parameters_of, up_projection


@dataclass(frozen=True)
class Multipliers:
    """The edit of a resuscitation."""

    values: ByLayer  # factor u (M_l,) float32 of every row of the up projections, 1 where nothing changes
    selected: ByLayer  # (M_l,) bool
    about: dict[str, Any]  # how they were made, for which checkpoint, from which coefficients

    def save(self, path: Path) -> None:
        """Write as safetensors, atomically."""
        metadata = {"resuscitation": json.dumps(self.about, sort_keys=True)}
        with atomic_path(path) as partial:
            tensors = {**tensors_of("multipliers", self.values), **tensors_of("selected", self.selected)}
            write_safetensors(partial, tensors, metadata)


def load_multipliers(path: Path) -> Multipliers:
    """Read a multiplier file. Raises OSError if it cannot be read, ValueError if it is not a multiplier file."""
    check_readable(path)
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get("resuscitation", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        values, selected = layers_of("multipliers", tensors), layers_of("selected", tensors)
        if not isinstance(about, dict):
            raise ValueError("no 'resuscitation' in its header")
    except Exception as error:  # safetensors raises its own error type for files it cannot read
        raise ValueError(f"{path}: not a multiplier file of analysis.change_parameters: {error}") from error
    of_one_shape = _sizes(values) == _sizes(selected)
    if not of_one_shape or not all(torch.isfinite(layer).all() for layer in values.values()):
        raise ValueError(f"{path}: multipliers must be finite, and `selected` of the same layers")
    as_float = {number: layer.float() for number, layer in values.items()}
    return Multipliers(as_float, {number: layer.bool() for number, layer in selected.items()}, about)


def _sizes(layers: ByLayer) -> dict[int, int]:
    return {number: len(values) for number, values in layers.items()}


class OtherLayers(ValueError):
    """Multipliers for other layers, or other numbers of memories, than the model has."""


def _check_sizes(multipliers: ByLayer, sizes: Mapping[int, int]) -> None:
    """Raise OtherLayers if multipliers do not fit layers that have these numbers of memories."""
    if multipliers.keys() != sizes.keys():
        given, wanted = numbered(list(multipliers)), numbered(list(sizes))
        raise OtherLayers(f"multipliers for {given}, the model has memories in {wanted}")
    for number, size in _sizes(multipliers).items():
        if size != sizes[number]:
            raise OtherLayers(f"layer {number}: multipliers for {size} memories, the layer has {sizes[number]}")


def up_projection_name(layer: int) -> str:
    """The name in an OLMo state dict of the matrix whose first M rows are the up projection of a layer."""
    return f"transformer.blocks.{layer}.ff_proj.weight"


def rescale(state: Mapping[str, Tensor], multipliers: ByLayer) -> LazyTensors:
    """A state dict of OLMo with row i of the up projection of layer l multiplied by multipliers[l][i] (algorithm 1).

    Only the edited tensors are copied, at every access. A bias of ff_proj is multiplied too, so that the output of the
    up projection scales. Raises ValueError if the shapes do not fit; an access raises it as `multiply` does.
    """
    shapes = shapes_of(state)
    check_shapes({name: tensor.shape for name, tensor in shapes.items()}, multipliers)
    return LazyTensors(shapes, lambda name: rescaled(name, state[name], multipliers))


def check_shapes(shapes: Mapping[str, torch.Size], multipliers: ByLayer) -> None:
    """Raise OtherLayers if multipliers do not fit a state dict of OLMo with tensors of these shapes."""
    sizes = {}
    for layer in range(sum(1 for name in shapes if name.endswith(".ff_proj.weight"))):
        down = f"transformer.blocks.{layer}.ff_out.weight"
        if not {up_projection_name(layer), down} <= shapes.keys():
            raise ValueError(f"{up_projection_name(layer)} or {down}: missing among the weights")
        sizes[layer] = shapes[down][1]
    _check_sizes(multipliers, sizes)


def rescaled(name: str, tensor: Tensor, multipliers: ByLayer) -> Tensor:
    """One tensor of `rescale`: an edited copy, or the tensor itself if none of its rows changes."""
    match = re.fullmatch(r"transformer\.blocks\.(\d+)\.ff_proj\.(?:weight|bias)", name)
    if match is None or (multipliers[int(match[1])] == 1).all():
        return tensor
    edited, factors = tensor.clone(), multipliers[int(match[1])]
    rows = edited[: len(factors)]
    multiply(rows, factors.view(-1, *[1] * (rows.ndim - 1)), name)
    return edited


def multiply(tensor: Tensor, factors: Tensor, name: str, dtype: torch.dtype | None = None) -> None:
    """Multiply a tensor in place by float32 factors that broadcast to it; rounded once, to its dtype or to `dtype`,
    where a factor is not 1.

    Raises ValueError with the `name` of the tensor if the result is not finite.
    """
    check_held(name, tensor)
    product = (tensor * factors.to(tensor.device)).to(dtype or tensor.dtype)
    if not product.isfinite().all():
        check_finite(name, tensor)
        raise ValueError(f"{name}: multiplied by up to {factors.max():.3g} it exceeds {product.dtype}; use a --cap")
    tensor.copy_(product if dtype is None else torch.where(factors.to(tensor.device) == 1, tensor, product))


def check_held(name: str, tensor: Tensor) -> None:
    """Raise ValueError for a tensor of weights that is offloaded."""
    if tensor.is_meta:
        raise ValueError(f"{name}: offloaded by a device map, and cannot be edited; open the model without one")


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise ValueError if a tensor of weights holds NaN or infinity."""
    if not tensor.isfinite().all():
        raise ValueError(f"{name}: holds {int((~tensor.isfinite()).sum())} numbers that are NaN or infinite")


@torch.no_grad()
def rescale_model(model: nn.Module, multipliers: ByLayer) -> None:
    """Multiply the rows of the up projections of any architecture in place, with their biases.

    Coefficients of a gated layer or expert scale by exactly these factors; in a plain one the first projection is
    multiplied, before the activation. The model may be wrapped (`unwrapped`). Raises ValueError as `row_factors` does,
    before any row changes, or as `multiply` does.
    """
    model = unwrapped(model)
    for name, factors in row_factors(model, multipliers).items():
        multiply(model.get_parameter(name), factors, name)


def row_factors(model: nn.Module, multipliers: ByLayer) -> dict[str, Tensor]:
    """By name of a parameter of the `unwrapped` model, which may be on the meta device: the float32 factors that
    multipliers make of it, with size 1 where they do not depend on the column.

    The M_l of a layer are in the order of its coefficients: those of each expert, then of a shared one. Raises
    ValueError if `find_layers` or `up_projection` does, if the shapes do not fit, if two layers share their weights, or
    if the weights are quantized, sharded, or behind an adapter that has no rows of its own.
    """
    model = unwrapped(model)
    if is_sharded(model):
        raise ValueError(f"{kind_of(model)}: FSDP has sharded its weights; edit the model before it does")
    layers = [layer for layer in find_layers(model) if layer.parts]
    _check_sizes(multipliers, {layer.number: sum(part.count for part in layer.parts) for layer in layers})
    names = {parameter: name for name, parameter in model.named_parameters()}
    result: dict[str, Tensor] = {}
    for layer in layers:
        of_parts = multipliers[layer.number].float().split([part.count for part in layer.parts])
        for part, own in zip(layer.parts, of_parts):
            module, rows = up_projection(model, part)
            for parameter, factors in parameters_of(module, part, rows, own):
                if names[parameter] in result:
                    raise ValueError(f"{names[parameter]}: belongs to two layers, which cannot be rescaled apart")
                result[names[parameter]] = factors
    return result
