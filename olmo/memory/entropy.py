"""The entropy of average memory coefficients, and its standard error.

Method section 1 (paper, section 3.1, equation 2). Shapes: L layers that have memories, M_l memories of layer l, M
of all layers together, G groups of instances.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..distributed.ranks import Ranks

GROUPS = 64  # of instances, for the jackknife


def layer_entropy(averages: Iterable[NDArray[np.float64]]) -> NDArray[np.float64]:
    """H^l (L,), natural log, of the average coefficients (M_l,) of each layer; a coefficient of 0 contributes 0.

    Raises ValueError for a layer whose coefficients are all 0, negative or not finite.
    """
    return np.array([_entropy(average) for average in averages])


def _entropy(average: NDArray[np.float64]) -> np.float64:
    total = average.sum()
    if not np.isfinite(total) or (average < 0).any() or total <= 0:
        raise ValueError("average coefficients must be finite, not negative and not all 0 in a layer")
    p = average / total
    return -np.where(p > 0, p * np.log(np.where(p > 0, p, 1.0)), 0.0).sum()


class GroupedMeans:
    """A mean over instances of numbers of any shape, in float64, by groups of instances for its standard error.

    Instance k belongs to group k mod 64. Leaving one group out at a time (delete-a-group jackknife) gives the sampling
    error of independent samples; neighbours that share a document, as in packed text, make it a little too small.
    """

    def __init__(self, *shape: int):
        # On the device of the values, so that nothing waits for it, or on the host if the device has no float64 (MPS).
        self._sums = torch.zeros(GROUPS, *shape, dtype=torch.float64)
        self.counts = np.zeros(GROUPS)

    def add(self, values: Tensor, instances: NDArray[np.integer]) -> None:
        """Add the values (B, ...) of the instances with these numbers (B,)."""
        groups = instances % GROUPS
        values = values if values.is_cuda else values.cpu()
        # A product of matrices, unlike index_add_, gives the same sum every time on a GPU too.
        owner = torch.from_numpy(np.arange(GROUPS)[:, None] == groups).double().to(values.device, non_blocking=True)
        added = owner @ values.double().reshape(len(values), -1)
        self._sums = self._sums.to(values.device) + added.view(self._sums.shape)
        np.add.at(self.counts, groups, 1.0)  # one batch may hold several instances of a group

    def reduce(self, ranks: Ranks) -> None:
        """Add up the sums of all ranks."""
        self._sums, self.counts = torch.from_numpy(ranks.sum(self.sums)), ranks.sum(self.counts)

    @property
    def sums(self) -> NDArray[np.float64]:
        """Of each group, (64, ...)."""
        return self._sums.cpu().numpy()

    @property
    def instances(self) -> int:
        return int(self.counts.sum())

    @property
    def average(self) -> NDArray[np.float64]:
        return self.sums.sum(0) / self.counts.sum()

    def _without_each(self) -> Iterator[NDArray[np.float64]]:
        """The averages without group g, for each group that is not empty, if there are two or more."""
        filled = np.flatnonzero(self.counts)
        sums, count = self.sums, self.counts.sum()  # copied from their device once
        total = sums.sum(0)
        for group in filled if len(filled) > 1 else ():
            yield (total - sums[group]) / (count - self.counts[group])

    def leave_one_out(self) -> NDArray[np.float64]:
        """The statistic without group g, (G, ...), G at most 64; here the mean itself."""
        return np.array(list(self._without_each())).reshape(-1, *self.sums.shape[1:])


class CoefficientAverages(GroupedMeans):
    """Average coefficients Cbar (M,), layer after layer, whose statistic is H^l (L,), a function of the mean.

    sizes: number of memories of every layer of the model, 0 where it has none. Values to add are the means of
    `instance_means` side by side, (B, M).
    """

    def __init__(self, sizes: Sequence[int]):
        super().__init__(sum(sizes))
        self.sizes = {number: size for number, size in enumerate(sizes) if size}  # of the layers that have memories
        self.without = [number for number, size in enumerate(sizes) if not size]  # numbers of the other layers

    @property
    def layers(self) -> dict[int, NDArray[np.float64]]:
        """Cbar^l (M_l,) by the number of the layer in the model."""
        return dict(zip(self.sizes, self.split(self.average)))

    def leave_one_out(self) -> NDArray[np.float64]:
        """H^l without group g, (G, L)."""
        left_out = [layer_entropy(self.split(average)) for average in self._without_each()]
        return np.array(left_out).reshape(-1, len(self.sizes))

    def split(self, memories: NDArray[np.float64]) -> list[NDArray[np.float64]]:
        """The part (M_l,) of each layer, of (M,)."""
        return np.split(memories, np.cumsum(list(self.sizes.values()))[:-1])


def jackknife_error(left_out: NDArray[np.float64]) -> NDArray[np.float64]:
    """Standard error from estimates without group g, (G, ...) -> (...); nan with fewer than two groups."""
    groups = len(left_out)
    if groups < 2:
        return np.full(left_out.shape[1:], math.nan)
    return np.sqrt((groups - 1) / groups * ((left_out - left_out.mean(0)) ** 2).sum(0))
