"""Work repeated in rounds, so that whatever else the machine does affects all contestants alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike

Result = TypeVar("Result")


def alternate(rounds: int, works: Mapping[str, Callable[[], Result]]) -> dict[str, list[Result]]:
    """The results of every work, one a round; every second round runs them in reverse order."""
    results: dict[str, list[Result]] = {name: [] for name in works}
    for number in range(rounds):
        for name in list(works)[:: -1 if number % 2 else 1]:
            results[name].append(works[name]())
    return results


def spread(ratios: ArrayLike, digits: int = 2) -> str:
    """`1.03 x (0.98 to 1.10)`: the median and the range."""
    values = np.asarray(ratios)
    return f"{np.median(values):.{digits}f} x ({values.min():.{digits}f} to {values.max():.{digits}f})"
