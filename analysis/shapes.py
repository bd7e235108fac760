"""Whether a JSON file has the shape that its reader needs: files are copied, edited, and written by other versions."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
# An estimate, as `Estimate.as_json` writes it.
ESTIMATE = dict.fromkeys(("value", "low", "high"), (float, None))


def check(path: Path, value: Any, shape: Any, where: str = "") -> None:
    """Raise ValueError with the file and the place if a value has another shape.

    shape: a type (float: any finite number), None, a tuple of shapes that are all allowed, [shape] for a list, or a
    mapping: its keys must exist, others may; "*" is the shape of all others, and "?" before a name makes it optional.
    """
    allowed = shape if isinstance(shape, tuple) else (shape,)
    fitting = [alternative for alternative in allowed if _is(value, alternative)]
    if not fitting:
        expected = " or ".join(map(_named, allowed))
        raise ValueError(f"{path}: {where or 'the file'}: expected {expected}, not {str(value)[:40]!r}")
    shape = fitting[0]
    if isinstance(shape, list):
        for number, item in enumerate(value):
            check(path, item, shape[0], f"{where}[{number}]")
    elif isinstance(shape, dict):
        prefix = f"{where}." if where else ""
        for key, of_key in shape.items():
            name = key.removeprefix("?")
            if name in value:
                check(path, value[name], of_key, prefix + name)
            elif key == "*":
                for other in value.keys() - shape.keys():
                    check(path, value[other], of_key, prefix + str(other))
            elif name == key:
                raise ValueError(f"{path}: has no {prefix}{key}; it is damaged, or of another version")


def _is(value: Any, shape: Any) -> bool:
    if shape is None or isinstance(shape, (list, dict)):
        return value is None if shape is None else isinstance(value, type(shape))
    if shape is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, shape) and (shape is bool or not isinstance(value, bool))


def _named(shape: Any) -> str:
    if isinstance(shape, list):
        return "a list"
    if isinstance(shape, dict) or shape is dict:
        return "keys and values"
    return "null" if shape is None else _NAMES[shape]
