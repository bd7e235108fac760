"""Averages of a measurement that are not finite, and which layer they are of."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np


def check_finite(name: str, averages: Iterable[tuple[int | None, Any]], description: str) -> None:
    """Raise ValueError that names the first layer whose average is NaN or infinite; None is no layer."""
    for layer, average in averages:
        if not np.isfinite(average).all():
            place = "" if layer is None else f"layer {layer}: "
            raise ValueError(
                f"{description}: {place}the {name} average is NaN or infinite; the checkpoint has weights that are, or "
                "its activations exceed the range of --precision"
            )
