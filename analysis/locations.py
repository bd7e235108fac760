"""Where checkpoints are: `--step N` of the published layout, or `--checkpoint` paths, globs and hub ids.

A `Location` is a folder, or a hub id (a string) whose folder may not be downloaded yet.
"""

from __future__ import annotations

import argparse
import glob
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from olmo.checkpoint import is_hub_id, resolve
from olmo.checkpoint.formats import explain
from olmo.exceptions import ConfigurationError
from olmo.files.atomic import delete_files_of_dead_processes
from olmo.files.paths import step_in
from olmo.files.tensors import read_training_state

Location = Path | str

FOLDERS = {"1B": Path("checkpoints/pretrained_1B"), "7B": Path("checkpoints/pretrained")}


def add_checkpoint_flags(parser: argparse.ArgumentParser, several: bool) -> None:
    """Add --step with --model_size, and --checkpoint."""
    which = parser.add_mutually_exclusive_group(required=True)
    many: dict[str, Any] = {"nargs": "+"} if several else {}
    steps = "steps of the official run, or `all`" if several else "a step of the official run"
    which.add_argument("--step", type=step if several else int, **many, help=f"{steps}, in checkpoints/pretrained_1B/")
    which.add_argument("--checkpoint", **many, help="folder, glob, or hub id with @revision")
    parser.add_argument("--model_size", choices=sorted(FOLDERS), default="1B", help="of --step")


def step(text: str) -> int | str:  # argparse names it in its error
    return text if text == "all" else int(text)


def checkpoint_folders(step: int | None, model_size: str, named: Sequence[str]) -> list[Path]:
    """The folders that the flags name, like `checkpoint_locations`; hub ids are downloaded."""
    locations = checkpoint_locations(None if step is None else [step], model_size, named)
    return [place if isinstance(place, Path) else resolve(place) for place in locations]


def checkpoint_locations(steps: Sequence[int | str] | None, model_size: str, named: Sequence[str]) -> list[Location]:
    """What the flags name, each once: patterns expanded, and steps in order of their number; without asking the hub.

    `steps` are numbers, or "all" alone. Raises ConfigurationError or FileNotFoundError for what does not exist.
    """
    if steps is not None:
        return list(_steps(steps, model_size))
    locations: list[Location] = []
    for name in named:
        if Path(name).is_dir():
            locations.append(Path(name))
        elif any(c in name for c in "*?["):
            found = sorted((Path(p) for p in glob.glob(name) if Path(p).is_dir()), key=lambda p: (step_of(p), p))
            if not found:
                raise ConfigurationError(f"{name}: no folder matches")
            locations += found
        elif is_hub_id(name):
            locations.append(name)
        elif Path(name).is_file():
            raise FileNotFoundError(f"{name}: {explain(Path(name))}")
        else:
            raise FileNotFoundError(f"{name}: no such checkpoint folder")
    return list(dict.fromkeys(locations))


def _steps(steps: Sequence[int | str], model_size: str) -> list[Path]:
    place = FOLDERS[model_size]
    if "all" in steps:
        if len(steps) > 1:
            raise ConfigurationError("--step: `all`, or numbers")
        found = [p for p in place.glob("*-unsharded") if p.is_dir() and re.fullmatch(r"\d+-unsharded", p.name)]
        if not found:
            raise ConfigurationError(
                f"{place}: no checkpoints (*-unsharded); list known ones with: bash scripts/get_model.sh --list"
            )
        return sorted(found, key=step_of)
    folders = [place / f"{step}-unsharded" for step in sorted(set(map(int, steps)))]
    for folder in folders:
        if not folder.is_dir():
            raise ConfigurationError(
                f"{folder}: no such checkpoint; download it there, or give a hub id with --checkpoint "
                f"(allenai/OLMo-{model_size}@step{folder.name.partition('-')[0]}-tokens...)"
            )
    return folders


def check_writable(folder: Path) -> None:
    """Raise an OSError, before any work is spent on its content, if `folder` cannot be written or created.

    Deletes the temporary files that killed processes have left in it.
    """
    try:
        existing = next(place for place in (folder, *folder.parents) if place.exists())
        with tempfile.TemporaryFile(dir=existing):
            delete_files_of_dead_processes(folder)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise type(error)(f"{folder}: cannot be written: {reason}; name another place with --output") from error


def label_of(location: Location) -> str:
    """A short name for folders: that of the checkpoint's folder, or of its revision or model on the hub."""
    return location.name if isinstance(location, Path) else location.rpartition("/")[2].rpartition("@")[2]


def step_of(location: Location) -> int:
    """The training step in a checkpoint's name (`step90-unsharded`, `738020-unsharded`), -1 without one."""
    return step_in(label_of(location))


def tokens_of(location: Location, folder: Path) -> int | None:
    """Tokens that a checkpoint was trained on: exact ones from the trainer's state beside its weights, or billions from
    its name (`step738020-tokens3095B`); None if neither has them."""
    try:
        seen = read_training_state(folder, "train", "other").get("global_train_tokens_seen")
    except (OSError, ValueError, AttributeError):  # missing, or of another program
        seen = None
    if isinstance(seen, int):
        return seen
    match = re.search(r"-tokens(\d+)B(?:-|$)", label_of(location))
    return int(match[1]) * 10**9 if match else None
