"""Pickles of others, read by an unpickler that creates nothing but what its caller lists.

Numbers, strings and containers need no name, so an empty list admits those alone. Python's unpickler in C enlarges its
memo to any number that a pickle names (24 bytes fill the memory); the one in Python, used here, keeps a dictionary.
"""

from __future__ import annotations

import pathlib
import pickle
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, BinaryIO


class Refused(ValueError):
    """A pickle holds something that is not read."""


class ForbiddenName(Refused):
    """A pickle names something that it may not create or call."""


def _load_tuple(reader: Any, opcode: int) -> None:
    """Make a tuple. Tuples that hold one another many times take for ever to hash, and 200 bytes can describe them."""
    pickle._Unpickler.dispatch[opcode](reader)
    made = reader.stack[-1]
    size = 1 + sum(reader.tuples.get(id(item), (None, 1))[1] for item in made)
    if size > 2**20:
        raise Refused("tuples of tuples are too many")
    reader.tuples[id(made)] = made, size


class _Unpickler(pickle._Unpickler):
    """`read_persistent` makes an object of a persistent id, of which `pickle` itself knows none."""

    stack: list[Any]  # what has been made and not used yet
    metastack: list[list[Any]]  # the same of the containers around it, outermost first
    dispatch = dict(pickle._Unpickler.dispatch)
    for _opcode in (pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3):
        dispatch[_opcode[0]] = partial(_load_tuple, opcode=_opcode[0])

    def __init__(self, file: BinaryIO, allowed: Mapping[str, Any], read_persistent: Callable[[Any], Any] | None):
        super().__init__(file)
        self.allowed, self.read_persistent = allowed, read_persistent
        self.tuples: dict[int, tuple[Any, int]] = {}  # id -> tuple, and how many objects its hash depends on

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in self.allowed:
            raise ForbiddenName(f"refused to make {module}.{name}")
        return self.allowed[f"{module}.{name}"]

    def persistent_load(self, pid: Any) -> Any:
        if self.read_persistent is None:
            raise ForbiddenName("refused to read a persistent id")
        return self.read_persistent(pid)

    def load_build(self) -> None:
        """Set the state of an object; of a class or function, all users of it would see it."""
        if callable(self.stack[-2]):
            raise ForbiddenName("refused to change a class or a function")
        build: Any = pickle._Unpickler.dispatch[pickle.BUILD[0]]
        build(self)

    dispatch[pickle.BUILD[0]] = load_build  # type: ignore[assignment]

    def place(self) -> str:
        """The keys of the dictionaries around what is being read, as "a.b: "; empty outside of dictionaries."""
        levels = [*getattr(self, "metastack", []), getattr(self, "stack", [])]
        names = [next((item for item in reversed(level) if isinstance(item, str)), None) for level in levels]
        path = " ".join(".".join(filter(None, names)).split())
        return f"{path}: " if path else ""


def _path(make: Callable[..., Any], *parts: Any) -> Any:
    if not all(isinstance(part, str) for part in parts) or sum(map(len, parts)) > 4096:
        raise Refused("not the path of a file")
    return make(*parts)


# Paths of the machine that wrote a pickle, whatever system this is.
PATHS = {
    f"{module}.{pure}{system}Path": partial(_path, getattr(pathlib, f"Pure{system}Path"))
    for module in ("pathlib", "pathlib._local")
    for pure in ("", "Pure")
    for system in ("Posix", "Windows")
}


def unpickle(file: BinaryIO, allowed: Mapping[str, Any], read_persistent: Callable[[Any], Any] | None = None) -> Any:
    """The object in a pickle, which may name only the keys of `allowed` (`module.name`) and gets what they map to.

    Raises ForbiddenName for any other name, before anything has run, and ValueError for a damaged pickle. Refused,
    which what is called may raise, begins with the keys of the dictionaries around the place.
    """
    reader = _Unpickler(file, allowed, read_persistent)
    try:
        return reader.load()
    except Refused as error:
        raise type(error)(f"{reader.place()}{error}") from error
    except Exception as error:  # a damaged pickle raises almost anything
        raise ValueError(f"damaged, or not a pickle: {' '.join(str(error).split()) or type(error).__name__}") from error
