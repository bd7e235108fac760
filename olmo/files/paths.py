"""Paths: can a file be read, is it JSON, and which step does the name of a checkpoint folder state."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any


def check_readable(path: Path) -> None:
    """Raise an OSError that names the file and what is wrong with it; safetensors reports "no such file" for all."""
    try:
        with path.open("rb"):
            pass
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except OSError as error:
        raise type(error)(f"{path}: {(error.strerror or str(error)).lower()}") from error


def read_json(path: Path) -> Any:
    """What a JSON file holds, with or without a byte order mark. Raises OSError, or ValueError that names the file."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from error


def parse_step(name: str) -> tuple[int, str] | None:
    """Step and kind of a checkpoint folder `step{N}` (kind "") or `step{N}-unsharded`; None for any other name."""
    match = re.fullmatch(r"step(\d+)(-unsharded)?", name)
    return (int(match[1]), match[2] or "") if match else None
