"""Numbers of the memories of each layer, by the number of the layer in the model, and how files hold them.

Layers may have different numbers of memories, and some none. Shapes: L layers, M memories of a layer, M_l of layer l.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeAlias

import torch
from torch import Tensor

ByLayer: TypeAlias = dict[int, Tensor]  # (M_l,) each, in increasing order of the layers


def tensors_of(name: str, layers: ByLayer) -> dict[str, Tensor]:
    """The tensors of a file: one (L, M) under `name` where layers 0 to L - 1 are alike, else `name.l` (M_l,) each."""
    if list(layers) == list(range(len(layers))) and len({len(values) for values in layers.values()}) == 1:
        return {name: torch.stack(list(layers.values()))}
    return {f"{name}.{number}": values for number, values in layers.items()}


def layers_of(name: str, tensors: Mapping[str, Tensor]) -> ByLayer:
    """The layers among the tensors of a file, in either form. Raises ValueError where they have another shape or none
    has the name."""
    if name in tensors:
        if tensors[name].ndim != 2 or not tensors[name].numel():
            raise ValueError(f"{name}: expected layers x memories, not shape {tuple(tensors[name].shape)}")
        return dict(enumerate(tensors[name]))
    layers = {}
    for key, values in tensors.items():
        if re.fullmatch(rf"{name}\.(0|[1-9][0-9]{{0,5}})", key):
            if values.ndim != 1 or not values.numel():
                raise ValueError(f"{key}: expected the memories of a layer, not shape {tuple(values.shape)}")
            layers[int(key.rpartition(".")[2])] = values
    if not layers:
        raise ValueError(f"no tensor {name}, nor {name}.0 and further layers")
    return dict(sorted(layers.items()))


def count(layers: ByLayer) -> int:
    """How many memories are marked in a bool (M_l,) of each layer."""
    return sum(int(marked.sum()) for marked in layers.values())
