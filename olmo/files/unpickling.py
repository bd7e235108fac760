"""Pickles of others, read by an unpickler that creates nothing but what its caller lists.

Numbers, strings and containers need no name, so an empty list admits those alone.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from typing import Any, BinaryIO


class ForbiddenName(ValueError):
    """A pickle names something that it may not create or call."""


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: BinaryIO, allowed: Mapping[str, Any]):
        super().__init__(file)
        self.allowed = allowed

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in self.allowed:
            raise ForbiddenName(f"refused to make {module}.{name}")
        return self.allowed[f"{module}.{name}"]


def unpickle(file: BinaryIO, allowed: Mapping[str, Any]) -> Any:
    """The object in a pickle, which may name only the keys of `allowed` (`module.name`) and gets what they map to.

    Raises ForbiddenName for any other name, before anything has run, and ValueError for a damaged pickle.
    """
    try:
        return _Unpickler(file, allowed).load()
    except ForbiddenName:
        raise
    except Exception as error:  # a damaged pickle raises almost anything
        raise ValueError(f"damaged, or not a pickle: {' '.join(str(error).split()) or type(error).__name__}") from error
