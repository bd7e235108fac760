"""Resuscitation of inactive memories (paper, algorithm 1; method section 2) as a function of tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SELECTIONS = ("lowest", "random", "highest")


@dataclass(frozen=True)
class Resuscitation:
    """Which rows of the up projections change, and by how much. L layers, M memories."""

    selected: Tensor  # bool (L, M)
    multipliers: Tensor  # (L, M), in the precision of the coefficients; 1 where nothing changes
    dead: Tensor  # bool (L, M): selected, but of coefficient 0 and therefore left as they are


def resuscitate(average: Tensor, ratio: float, factor: float, select: str = "lowest", seed: int = 0) -> Resuscitation:
    """Algorithm 1 on average coefficients (L, M).

    lowest: per layer, rows whose coefficient is at most the `ratio` quantile (linear interpolation). The controls
    take as many rows of each layer: `highest` the most active ones, `random` a draw seeded by `seed`. A selected
    row is multiplied by u_i = mean(Cbar) / Cbar_i * factor. A dead memory, whose coefficient is 0, would need an
    infinite u: it keeps its row (multiplier 1) and is reported in `dead`; so is one so close to 0 that u overflows.

    Raises ValueError for a ratio outside (0, 1], a factor that is not positive, or coefficients that are negative,
    not finite, or all 0 in a layer.
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"resuscitation ratio {ratio} is not in (0, 1]")
    if not factor > 0 or factor == float("inf"):
        raise ValueError(f"amplifying factor {factor} is not a positive number")
    if select not in SELECTIONS:
        raise ValueError(f"selection {select!r} is none of {', '.join(SELECTIONS)}")
    # The mean too, because that of huge values overflows and would make every memory look dead.
    if average.ndim != 2 or not torch.isfinite(average.mean(-1)).all() or (average < 0).any():
        raise ValueError("average coefficients must be finite and not negative, one row a layer")
    if (average.amax(1) == 0).any():
        raise ValueError("a layer without a single active memory cannot be resuscitated")
    thresholds = torch.stack([torch.quantile(layer, ratio) for layer in average])
    selected = average <= thresholds[:, None]
    if select != "lowest":
        counts = selected.sum(1)
        generator = torch.Generator().manual_seed(seed)
        score = torch.rand(average.shape, generator=generator) if select == "random" else -average
        ranks = score.argsort(dim=1, stable=True).argsort(dim=1, stable=True)
        selected = ranks < counts[:, None]
    multipliers = average.mean(1, keepdim=True) / average * factor
    dead = selected & ~torch.isfinite(multipliers)
    multipliers = torch.where(selected & ~dead, multipliers, torch.ones_like(multipliers))
    return Resuscitation(selected, multipliers, dead)
