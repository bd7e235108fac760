"""Documents packed into instances of one length, one after another: the rows that continual learning trains on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from numpy.typing import NDArray


def fill(tokens: NDArray[Any], documents: Iterable[NDArray[Any]]) -> int:
    """Fill `tokens` (size,) with documents (n,) in sequence until it is full; returns the number of ids written."""
    place = 0
    for document in documents:
        piece = document[: len(tokens) - place]
        tokens[place : place + len(piece)] = piece
        place += len(piece)
        if place == len(tokens):
            break
    return place
