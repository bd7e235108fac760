"""Initial weights that a seed determines whatever the release of PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


@torch.no_grad()
def truncated_normal_(weight: Tensor, deviation: float, cutoff: float) -> None:
    """Fill `weight`, of any shape, with normals of a standard deviation; those beyond `cutoff` of it are drawn again.

    The numbers are those of `nn.init.trunc_normal_` of PyTorch 2.13, which did not draw again in 2.11. With a cutoff
    below 0.4, which accepts less than three of ten draws, both releases have another method each.
    """
    bound = cutoff * deviation
    if weight.is_meta or math.erf(cutoff / math.sqrt(2)) <= 0.3:
        nn.init.trunc_normal_(weight, std=deviation, a=-bound, b=bound)
        return
    bound = torch.tensor(bound, dtype=weight.dtype).item()  # as the elements are rounded
    weight.normal_(0, deviation)
    while (beyond := weight.abs() > bound).any():
        weight.copy_(torch.where(beyond, torch.empty_like(weight).normal_(0, deviation), weight))
