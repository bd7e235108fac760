"""Resuscitation of inactive memories (paper, algorithm 1) as a function of tensors.

M_l memories of layer l.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from analysis.choices import SELECTIONS, THRESHOLDS
from olmo.memory.by_layer import ByLayer
from olmo.memory.locate import numbered

MOST_SORTED = 2**24  # numbers, by torch.quantile


@dataclass(frozen=True)
class Resuscitation:
    """Which rows of the up projections change, and by how much; of each layer of the coefficients, (M_l,)."""

    selected: ByLayer  # bool
    multipliers: ByLayer  # in the precision of the coefficients; 1 where nothing changes
    dead: ByLayer  # bool: selected, but of coefficient 0 and therefore unchanged
    capped: ByLayer  # bool: selected, and u cut to the cap


def resuscitate(
    average: ByLayer,
    ratio: float,
    factor: float,
    select: str = "lowest",
    seed: int = 0,
    threshold: str = "layer",
    layers: Sequence[int] | None = None,
    cap: float | None = None,
) -> Resuscitation:
    """Algorithm 1 on average coefficients (M_l,) of each layer.

    lowest: rows whose coefficient is at most the `ratio` quantile (linear interpolation) of their layer, or, with
    the threshold `global`, of all `layers` together. The controls take as many rows of each layer: `highest` the most
    active ones, `random` a draw seeded by `seed`. A selected row is multiplied by u_i = mean(Cbar) / Cbar_i * factor,
    of the mean of its own layer, or by `cap` where u_i exceeds it. A dead memory, whose coefficient is 0, would need
    an infinite u, and no multiplier of its row would revive it: it keeps its row (multiplier 1), with any cap, and is
    reported in `dead`; so is one so close to 0 that u overflows, unless there is a cap. Only `layers`, numbers of
    layers in the model, change (default: all).

    Raises ValueError for a ratio outside (0, 1], a factor or cap that is not positive, a layer that has no
    coefficients, or coefficients that are negative, not finite, or all 0 in one of `layers`.
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"resuscitation ratio {ratio} is not in (0, 1]")
    for name, value in (("amplifying factor", factor), ("cap", cap)):
        if value is not None and (not value > 0 or value == float("inf")):
            raise ValueError(f"{name} {value} is not a positive number")
    for name, word, known in (("selection", select, SELECTIONS), ("threshold", threshold, THRESHOLDS)):
        if word not in known:
            raise ValueError(f"{name} {word!r} is none of {', '.join(known)}")
    # Of two equal rows: the sum of a single long one depends on the number of threads that share it.
    means = {number: values.expand(2, -1).mean(1)[0] for number, values in average.items()}
    # The mean, because that of huge values overflows, which would make every memory look dead.
    if not all(torch.isfinite(means[number]) and (values >= 0).all() for number, values in average.items()):
        raise ValueError("average coefficients must be finite and not negative")
    chosen = sorted(set(average if layers is None else layers))
    unknown = [number for number in chosen if number not in average]
    if unknown or not chosen:
        held = numbered(list(average))
        raise ValueError(f"layers {', '.join(map(str, unknown)) or 'none'}: the model has memories in {held}")
    for number in chosen:
        if not average[number].any():
            raise ValueError(f"layer {number}: a layer without a single active memory cannot be resuscitated")
    together = _quantile(torch.cat([average[number] for number in chosen]), ratio) if threshold == "global" else None
    generator = torch.Generator().manual_seed(seed)
    result = Resuscitation({}, {}, {}, {})
    for number, values in average.items():
        limit = _quantile(values, ratio) if together is None else together
        selected = (values <= limit) & (number in chosen)
        if select != "lowest":
            score = torch.rand(values.shape, generator=generator) if select == "random" else -values
            selected = score.argsort(stable=True).argsort(stable=True) < selected.sum()
        multipliers = means[number] / values * factor
        capped = torch.zeros_like(selected)
        if cap is not None:
            capped = selected & (values > 0) & (multipliers > cap)
            multipliers = torch.where(capped, torch.full_like(multipliers, cap), multipliers)
        dead = selected & ~torch.isfinite(multipliers)
        result.selected[number], result.dead[number], result.capped[number] = selected, dead, capped
        result.multipliers[number] = torch.where(selected & ~dead, multipliers, torch.ones_like(multipliers))
    return result


def _quantile(values: Tensor, ratio: float) -> Tensor:
    """As torch.quantile of all `values`, which it computes of 2^24 at most."""
    if len(values) <= MOST_SORTED:
        return torch.quantile(values, ratio)
    place = ratio * (len(values) - 1)
    below = int(place)
    low, high = (values.kthvalue(min(rank, len(values))).values for rank in (below + 1, below + 2))
    return torch.lerp(low, high, place - below)
