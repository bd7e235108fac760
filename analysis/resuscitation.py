"""Resuscitation of inactive memories (paper, algorithm 1; method section 2) as a function of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SELECTIONS = ("lowest", "random", "highest")
THRESHOLDS = ("layer", "global")


@dataclass(frozen=True)
class Resuscitation:
    """Which rows of the up projections change, and by how much. L layers, M memories of a layer."""

    selected: Tensor  # bool (L, M)
    multipliers: Tensor  # (L, M), in the precision of the coefficients; 1 where nothing changes
    dead: Tensor  # bool (L, M): selected, but of coefficient 0 and therefore unchanged
    capped: Tensor  # bool (L, M): selected, and u cut to the cap


def resuscitate(
    average: Tensor,
    ratio: float,
    factor: float,
    select: str = "lowest",
    seed: int = 0,
    threshold: str = "layer",
    layers: Sequence[int] | None = None,
    cap: float | None = None,
) -> Resuscitation:
    """Algorithm 1 on average coefficients (L, M).

    lowest: rows whose coefficient is at most the `ratio` quantile (linear interpolation) of their layer, or, with
    the threshold `global`, of all `layers` together. The controls take as many rows of each layer: `highest` the most
    active ones, `random` a draw seeded by `seed`. A selected row is multiplied by u_i = mean(Cbar) / Cbar_i * factor,
    of the mean of its own layer, or by `cap` where u_i exceeds it. A dead memory, whose coefficient is 0, would need
    an infinite u, and no multiplier of its row would revive it: it keeps its row (multiplier 1), with any cap, and is
    reported in `dead`; so is one so close to 0 that u overflows, unless there is a cap. Only `layers` change (default:
    all).

    Raises ValueError for a ratio outside (0, 1], a factor or cap that is not positive, a layer that does not exist, or
    coefficients that are negative, not finite, or all 0 in one of `layers`.
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"resuscitation ratio {ratio} is not in (0, 1]")
    for name, value in (("amplifying factor", factor), ("cap", cap)):
        if value is not None and (not value > 0 or value == float("inf")):
            raise ValueError(f"{name} {value} is not a positive number")
    for name, word, known in (("selection", select, SELECTIONS), ("threshold", threshold, THRESHOLDS)):
        if word not in known:
            raise ValueError(f"{name} {word!r} is none of {', '.join(known)}")
    # The mean, because that of huge values overflows, which would make every memory look dead.
    if average.ndim != 2 or not torch.isfinite(average.mean(-1)).all() or (average < 0).any():
        raise ValueError("average coefficients must be finite and not negative, one row per layer")
    chosen = sorted(set(range(len(average)) if layers is None else layers))
    unknown = [layer for layer in chosen if not 0 <= layer < len(average)]
    if unknown or not chosen:
        raise ValueError(f"layers {', '.join(map(str, unknown)) or 'none'}: the model has 0 to {len(average) - 1}")
    for layer in chosen:
        if not average[layer].any():
            raise ValueError(f"layer {layer}: a layer without a single active memory cannot be resuscitated")
    edited = torch.zeros(len(average), 1, dtype=torch.bool)
    edited[chosen] = True
    if threshold == "global":
        limits = torch.quantile(average[chosen], ratio).expand(len(average))
    else:
        limits = torch.stack([torch.quantile(layer, ratio) for layer in average])
    selected = (average <= limits[:, None]) & edited
    if select != "lowest":
        counts = selected.sum(1)
        generator = torch.Generator().manual_seed(seed)
        score = torch.rand(average.shape, generator=generator) if select == "random" else -average
        ranks = score.argsort(dim=1, stable=True).argsort(dim=1, stable=True)
        selected = ranks < counts[:, None]
    multipliers = average.mean(1, keepdim=True) / average * factor
    capped = torch.zeros_like(selected)
    if cap is not None:
        capped = selected & (average > 0) & (multipliers > cap)
        multipliers = torch.where(capped, torch.full_like(multipliers, cap), multipliers)
    dead = selected & ~torch.isfinite(multipliers)
    multipliers = torch.where(selected & ~dead, multipliers, torch.ones_like(multipliers))
    return Resuscitation(selected, multipliers, dead, capped)
