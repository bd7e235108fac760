"""Paths: can a file be read, is it JSON, where are this project's configurations, and which step does the name of a
checkpoint folder state."""

from __future__ import annotations

import json
import math
import re
import stat
from argparse import ArgumentTypeError
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from ..console import log

LARGEST_JSON = 2**27  # bytes; parsed, they take ten times as many
_LFS = b"version https://git-lfs.github.com/spec/"


def check_readable(path: Path) -> None:
    """Raise an OSError that names the file and what is wrong with it; safetensors reports "no such file" for all.

    A pipe or a device has no size, and may never end.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode) and not path.is_dir():
            raise OSError(f"{path}: a pipe or a device, not a file")
        with path.open("rb"):
            pass
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except OSError as error:
        if error.strerror is None:
            raise
        raise type(error)(f"{path}: {error.strerror.lower()}") from error


def read_json(path: Path) -> Any:
    """What a JSON file holds, with or without a byte order mark. Raises OSError, or ValueError that names the file."""
    check_readable(path)
    if (size := path.stat().st_size) > LARGEST_JSON:
        raise ValueError(f"{path}: {size:,} bytes; JSON files of more than {LARGEST_JSON:,} are not read")
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from error


def as_json(content: Any, path: Path, indent: int | None = None) -> str:
    """The text of a JSON file, with a newline. Raises ValueError that names `path` and the first NaN or infinity, which
    JSON does not have and other programs cannot read."""
    try:
        return json.dumps(content, indent=indent, allow_nan=False) + "\n"
    except ValueError:
        if (found := next(_not_finite(content), None)) is None:
            raise
        raise ValueError(f"{path}: not written: {found[0]} is {found[1]}, not a finite number") from None


def _not_finite(content: Any, key: str = "") -> Iterator[tuple[str, float]]:
    """(keys with dots, value) of each number that is not finite."""
    if isinstance(content, float) and not math.isfinite(content):
        yield key, content
    inner = enumerate(content) if isinstance(content, (list, tuple)) else ()
    for name, value in content.items() if isinstance(content, dict) else inner:
        yield from _not_finite(value, f"{key}.{name}" if key else str(name))


def local_path(text: str) -> Path:
    """An argument that names a file or folder of this machine. Raises ArgumentTypeError for a URL, of which Path would
    lose a slash."""
    if is_url(text):
        raise ArgumentTypeError(f"{text}: URLs are not read here; download the file first, and give its path")
    return Path(text)


def is_url(text: str) -> bool:
    return re.match(r"[a-z][a-z0-9+.-]*://", text, re.IGNORECASE) is not None


def provided(path: Path) -> Path:
    """The path, or where nothing is there and it begins with `configs/`, that of the file which this package has.

    A wheel has the repository's configs/ as olmo/configs. A warning names the file, once.
    """
    if path.parts[:1] != ("configs",) or path.exists():
        return path
    package = Path(__file__).parents[1]
    folder = package if (package / "configs").is_dir() else package.parent  # a wheel, or a checkout elsewhere
    if not (folder / path).is_file():
        return path
    _log_provided(path, folder / path)
    return folder / path


@cache
def _log_provided(path: Path, found: Path) -> None:
    log.warning("%s: not in this folder; the one that is installed is used, %s", path, found)


def check_not_lfs(path: Path) -> None:
    """Raise ValueError for a file that is only what git has in place of one in Git LFS."""
    if path.is_file() and path.stat().st_size <= 1024:
        with path.open("rb") as file:
            if file.read(len(_LFS)) == _LFS:
                raise ValueError(f"{path}: a pointer of Git LFS, not the file itself; get it with: git lfs pull")


def is_hub_id(checkpoint: str) -> bool:
    """Whether a name that is not a folder here can be `owner/name[@revision]` on the Hugging Face hub."""
    known = re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w.-]+)?", checkpoint) is not None
    return known and not Path(checkpoint).exists() and not Path(checkpoint).parent.is_dir()


def parse_step(name: str) -> tuple[int, str] | None:
    """Step and kind of a checkpoint folder `step{N}` (kind "") or `step{N}-unsharded`; None for any other name."""
    match = re.fullmatch(r"step(\d+)(-unsharded)?", name)
    return (int(match[1]), match[2] or "") if match else None
