"""Further measures of how broadly a model uses its memories, with their standard errors.

Of the average coefficients Cbar (M_l,) of a layer:

    effective   exp(H^l) / M_l: equally used, this share of the memories would have the same entropy
    gini        Gini coefficient: 0 where all are used equally, 1 - 1 / M_l where a single one is used
    dead        share of the memories whose coefficient is below DEAD times the layer's mean

A model's number is the mean over its layers, weighted by their memories. The most active memories of a layer are
the MOST_ACTIVE share with the largest coefficients; their overlap is the share that two checkpoints have in common.

Two of these count memories on one side of a threshold. Where noise moves independent memories across it, the variance
of such a count is proportional to the noise, not to its square, and the jackknife that leaves out one of 64 groups of
instances gives 64 ** (1 / 4) = 2.8 times its error. A jackknife that leaves out half of the groups (Shao and Wu, 1989)
gives 2 ** (-1 / 4) = 0.84 times, so all errors here are those of balanced half-samples (McCarthy, 1969): of two
neighbouring groups, each of 32 splits puts one into either half, and the error is the root mean square of half the
difference between the halves. That of an overlap, which is nothing but such a count, is divided by 0.84.

Shapes: L layers that have memories, M memories of all layers, S splits, B = ceil(M / 8) bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analysis.estimates import finite
from olmo.memory import CoefficientAverages, layer_entropy

BREADTHS = {
    "effective": "effective share of memories, exp(H) / m",
    "gini": "Gini coefficient of the coefficients",
    "dead": "share of dead memories",
}
DEAD = 0.1
MOST_ACTIVE = 0.1
POINTS = 201  # of a curve of sorted shares


def half_sample_error(differences: NDArray[np.float64]) -> NDArray[np.float64]:
    """Standard errors (...) from half the differences between the two halves of each split, (S, ...); NaN without."""
    if not len(differences):
        return np.full(differences.shape[1:], np.nan)
    return np.sqrt(np.square(differences).mean(0))


@dataclass(frozen=True)
class Breadth:
    """The measures of one model.

    values: by layer (3, L), in the order of BREADTHS. differences: half of that between the halves of each split,
    (S, 3, L). most_active: a bit for each memory, of all instances, then of the two halves of each split,
    uint8 (1 + 2 S, B). sizes: memories of each layer.
    """

    sizes: list[int]
    values: NDArray[np.float64]
    differences: NDArray[np.float64]
    most_active: NDArray[np.uint8]

    @classmethod
    def of(cls, averages: CoefficientAverages) -> Breadth:
        """From the averages of each group of instances."""
        found = [_of_layers(averages.split(half)) for half in _halves(averages)]
        return cls._of(list(averages.layers.values()), found)

    @classmethod
    def without_errors(cls, layers: Sequence[NDArray[np.float64]]) -> Breadth:
        """From average coefficients alone, as files of earlier versions have them."""
        return cls._of(layers, [])

    @classmethod
    def _of(cls, layers: Sequence[NDArray[np.float64]], of_halves: Sequence[Any]) -> Breadth:
        values, bits = _of_layers(layers)
        pairs = np.array([value for value, _ in of_halves]).reshape(-1, 2, *values.shape)
        most_active = np.stack([bits, *(bits for _, bits in of_halves)])
        return cls([len(layer) for layer in layers], values, (pairs[:, 0] - pairs[:, 1]) / 2, most_active)

    def to_dict(self) -> dict[str, Any]:
        """`breadth` of `knowledge_entropy.json`: of each measure `value` and `layers`, their standard errors (None of a
        single instance), and half the difference of the value between the halves of each split."""
        weights = np.array(self.sizes) / sum(self.sizes)
        errors, differences = half_sample_error(self.differences), self.differences @ weights  # (3, L), (S, 3)
        numbers: dict[str, Any] = {"dead_below": DEAD, "most_active": MOST_ACTIVE}
        for place, name in enumerate(BREADTHS):
            numbers[name] = {
                "value": float(self.values[place] @ weights),
                "standard_error": finite(float(half_sample_error(differences)[place])),
                "layers": self.values[place].tolist(),
                "layer_standard_errors": [finite(float(error)) for error in errors[place]],
                "half_differences": differences[:, place].tolist(),
            }
        return numbers


def _halves(averages: CoefficientAverages) -> Iterator[NDArray[np.float64]]:
    """The averages (M,) of the first and of the second half of each split; none of a single group."""
    filled = np.flatnonzero(averages.counts)
    sums, counts = averages.sums[filled], averages.counts[filled]  # (G, M), (G,) of the groups that hold instances
    # Rows of a Hadamard matrix of order 64: the odd ones part groups 2 k and 2 k + 1.
    rows = [[bin(row & place).count("1") % 2 for place in range(len(filled))] for row in range(1, 64, 2)]
    for first in np.array(rows, float) if len(filled) > 1 else ():
        halves = np.stack([1 - first, first])
        yield from halves @ sums / (halves @ counts)[:, None]


def _of_layers(layers: Sequence[NDArray[np.float64]]) -> tuple[NDArray[np.float64], NDArray[np.uint8]]:
    """The measures (3, L) of average coefficients (M_l,), and the most active memories, a bit each (B,)."""
    values, active = [], []
    for layer, entropy in zip(layers, layer_entropy(layers)):
        ascending = np.sort(layer)
        dead = (layer < DEAD * layer.mean()).mean()
        values.append((np.exp(entropy) / len(layer), _gini(ascending), dead))
        chosen = max(round(MOST_ACTIVE * len(layer)), 1)
        marked = layer > ascending[-chosen]
        marked[np.flatnonzero(layer == ascending[-chosen])[: chosen - marked.sum()]] = True  # of equal ones the first
        active.append(marked)
    return np.array(values).T, np.packbits(np.concatenate(active))


def sorted_shares(layers: Sequence[NDArray[np.floating]]) -> dict[str, Any]:
    """How each layer spreads its coefficients (M_l,) over its memories: `ranks` from 0, the most used one, to 1, and
    their `shares` (L, POINTS), ready for JSON."""
    ranks = np.linspace(0, 1, POINTS)
    shares = [np.quantile(average / average.sum(), 1 - ranks).tolist() for average in layers]
    return {"ranks": ranks.tolist(), "shares": shares}


def _gini(ascending: NDArray[np.float64]) -> float:
    count = len(ascending)
    return float(2 * (np.arange(1, count + 1) @ ascending) / (count * ascending.sum()) - (count + 1) / count)


def overlap(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> dict[str, float | None]:
    """`value`, the share of the most active memories that two models have in common, and its `standard_error`; None
    where either lacks the sets of halves. one, other: `Breadth.most_active`, of models of the same layers."""
    if len(one) != len(other):
        one, other = one[:1], other[:1]
    common, chosen = (np.unpackbits(bits, axis=1).sum(1, dtype=np.int64) for bits in (one & other, one))
    shares = common / chosen
    error = 2**0.25 * half_sample_error((shares[1::2] - shares[2::2]) / 2)
    return {"value": float(shares[0]), "standard_error": finite(float(error))}
