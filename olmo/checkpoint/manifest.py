"""What a checkpoint folder holds, file by file: `manifest.json`, by which a damaged one is recognised.

    {"ephemeral": false, "files": {"model.safetensors": {"size": 1234, "crc32": "89abcdef"}, ...}}

CRC-32 finds errors of disks and copies (1 to 3 GB per second on one core); it does not protect against someone
who forges one. Folders without a manifest, older ones and those of OLMo, cannot be checked and pass. Files that the
manifest does not name, such as what the analysis writes beside a checkpoint, are not looked at.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from ..files.atomic import fsync
from ..files.digests import crc32
from ..files.paths import read_json

NAME = "manifest.json"
_THREADS = 32


def write(folder: Path, ephemeral: bool = False) -> None:
    """Write the manifest of all files of a folder, and wait until they and it are on the disk.

    `ephemeral` marks a checkpoint that is deleted once a newer one is complete.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    with ThreadPoolExecutor(_THREADS) as pool:  # both release Python's lock
        list(pool.map(fsync, paths))
        checksums = list(pool.map(crc32, paths))
    names = [path.relative_to(folder).as_posix() for path in paths]
    files = {name: {"size": path.stat().st_size, "crc32": crc} for name, path, crc in zip(names, paths, checksums)}
    (folder / NAME).write_text(json.dumps({"ephemeral": ephemeral, "files": files}, indent=2) + "\n", encoding="utf-8")
    fsync(folder / NAME)
    for place in {folder, *(path.parent for path in paths)}:
        fsync(place)


def _read(folder: Path) -> dict[str, Any]:
    """The manifest of a folder; ValueError where it is none, or names a file elsewhere."""
    path = folder / NAME
    try:
        saved = read_json(path)
        files: dict[str, Any] = saved["files"]
        if not files or any(type(entry["size"]) is not int or entry["crc32"] is None for entry in files.values()):
            raise ValueError("no size and crc32 of each file")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = str(error).removeprefix(f"{path}: ") if isinstance(error, ValueError) else repr(error)
        raise ValueError(f"{path}: not a checkpoint manifest: {reason}") from error
    for name in files:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise ValueError(f"{path}: names {name!r}, a path outside of the checkpoint")
    return saved


def sizes(folder: Path) -> dict[str, int]:
    """The files that the manifest of a folder names, and their sizes in bytes; ValueError where it is none."""
    return {name: entry["size"] for name, entry in _read(folder)["files"].items()}


def is_ephemeral(folder: Path) -> bool:
    """Whether a checkpoint is marked as one to delete once a newer one is complete."""
    try:
        return (folder / NAME).is_file() and bool(_read(folder).get("ephemeral"))
    except ValueError:
        return False


def problem(folder: Path, only: Collection[str] | None = None) -> str | None:
    """What is wrong with a folder that has a manifest, in one line that names the file; None where all is well.

    only: names of files (relative to the folder), where not all matter.
    """
    if not (folder / NAME).is_file():
        return None
    try:
        files = {name: entry for name, entry in _read(folder)["files"].items() if only is None or name in only}
        for name, entry in files.items():
            path = folder / name
            if not path.is_file():
                return f"{path}: missing"
            if path.stat().st_size != entry["size"]:
                return f"{path}: has {path.stat().st_size} bytes, and was written with {entry['size']}"
        with ThreadPoolExecutor(_THREADS) as pool:
            checksums = list(pool.map(crc32, (folder / name for name in files)))
    except (ValueError, OSError) as error:
        return str(error)
    for (name, entry), found in zip(files.items(), checksums):
        if found != entry["crc32"]:
            return f"{folder / name}: its checksum is {found}, and was {entry['crc32']} when it was written"
    return None
