"""Where checkpoints lie: `--step N` of the published layout, or `--checkpoint` paths, globs and hub ids."""

from __future__ import annotations

import argparse
import glob
import re
import tempfile
from pathlib import Path

from olmo.checkpoint import resolve
from olmo.exceptions import ConfigurationError

FOLDERS = {"1B": Path("checkpoints/pretrained_1B"), "7B": Path("checkpoints/pretrained")}


def add_checkpoint_flags(parser: argparse.ArgumentParser, several: bool) -> None:
    """--step with --model_size, or --checkpoint."""
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--step", type=int, help="a step of the official run, in checkpoints/pretrained_1B/")
    which.add_argument(
        "--checkpoint",
        nargs="+" if several else None,
        help="folder, glob, or hub id with @revision" if several else "folder, or hub id with @revision",
    )
    parser.add_argument("--model_size", choices=sorted(FOLDERS), default="1B", help="of --step")


def checkpoint_folders(step: int | None, model_size: str, named: list[str]) -> list[Path]:
    """The folders that the flags name, patterns expanded, steps in order of their number."""
    if step is not None:
        folder = FOLDERS[model_size] / f"{step}-unsharded"
        if not folder.is_dir():
            raise ConfigurationError(
                f"{folder}: no such checkpoint; fetch it there, or give a hub id with --checkpoint "
                f"(allenai/OLMo-{model_size}@step{step}-tokens...)"
            )
        return [folder]
    folders: list[Path] = []
    for name in named:
        if any(c in name for c in "*?["):
            found = sorted((Path(p) for p in glob.glob(name) if Path(p).is_dir()), key=lambda p: (step_of(p), p))
            if not found:
                raise ConfigurationError(f"{name}: no folder matches")
            folders += found
        else:
            folders.append(resolve(name))
    return folders


def check_writable(folder: Path) -> None:
    """Raise an OSError, before any work is spent on what goes there, where `folder` cannot be written or made."""
    try:
        existing = next(place for place in (folder, *folder.parents) if place.exists())
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise type(error)(f"{folder}: cannot be written: {reason}; name another place with --output") from error


def step_of(folder: Path) -> int:
    """The training step in a checkpoint's name (`step90-unsharded`, `738020-unsharded`), -1 where there is none."""
    # All of the name up to a dash: a commit of the hub may begin with digits, and a model's name with its size.
    match = re.match(r"(?:step)?(\d+)(?:-|$)", folder.name)
    return int(match[1]) if match else -1
