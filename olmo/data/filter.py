"""Instances that repeat themselves too often to learn from (`data.instance_filter`, OLMo 2)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..config.schema import InstanceFilterConfig


def repeats_itself(rows: NDArray[np.int64], config: InstanceFilterConfig) -> NDArray[np.bool_]:
    """Which rows hold a stretch that repeats a period of tokens too often: (n, T) int64 -> (n,) bool.

    A stretch of `repetition_max_count` periods or more, of `repetition_min_period` to `repetition_max_period` tokens
    each, is too much. As in OLMo 0.6.0, periods longer than a third of the row are not looked for.
    """
    length = rows.shape[1]
    found = np.zeros(len(rows), dtype=bool)
    for period in range(config.repetition_min_period, min(config.repetition_max_period, length // 3) + 1):
        same = rows[:, period:] == rows[:, :-period]
        seen = np.cumsum(same, axis=1)
        before_run = np.maximum.accumulate(np.where(same, 0, seen), axis=1)
        longest = (seen - before_run).max(axis=1)
        found |= (longest + period) // period >= config.repetition_max_count
    return found
