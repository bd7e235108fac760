"""In which order a run sees the instances of its source: OLMo's global indices (formats section 3)."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray


def build_order(
    instances: int, seed: int, epoch: int, world_size: int = 1, drop_last: bool = True, shuffle: bool = True
) -> NDArray[np.uint32]:
    """Instance numbers (n,), uint32, in the order that OLMo's `IterableDataset` gives them.

    The shuffle is numpy's Generator(PCG64(seed + epoch)). The result is cut (`drop_last`) or padded from its own
    front to a multiple of `world_size`.
    """
    if instances >= np.iinfo(np.uint32).max:
        raise ValueError(f"{instances} instances do not fit OLMo's 32-bit data order")
    order = np.arange(instances, dtype=np.uint32)
    if shuffle:
        np.random.Generator(np.random.PCG64(seed=seed + epoch)).shuffle(order)
    if drop_last:
        return order[: instances // world_size * world_size]
    return np.resize(order, math.ceil(instances / world_size) * world_size)
