"""Paths: can a file be read, is it JSON, and which step does the name of a checkpoint folder state."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

_LFS = b"version https://git-lfs.github.com/spec/"


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


def check_not_lfs(path: Path) -> None:
    """Raise ValueError for a file that is only what git has in place of one in Git LFS."""
    if path.is_file() and path.stat().st_size <= 1024:
        with path.open("rb") as file:
            if file.read(len(_LFS)) == _LFS:
                raise ValueError(f"{path}: a pointer of Git LFS, not the file itself; get it with: git lfs pull")


def parse_step(name: str) -> tuple[int, str] | None:
    """Step and kind of a checkpoint folder `step{N}` (kind "") or `step{N}-unsharded`; None for any other name."""
    match = re.fullmatch(r"step(\d+)(-unsharded)?", name)
    return (int(match[1]), match[2] or "") if match else None
