"""Where checkpoints lie: `--step N` of the published layout, or `--checkpoint` paths, globs and hub ids.

A `Location` is a folder, or a hub id (a string) whose folder has yet to be downloaded.
"""

from __future__ import annotations

import argparse
import glob
import hashlib
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

from olmo.checkpoint import fingerprint, is_hub_id, is_olmo, model_files, read_state, resolve
from olmo.exceptions import ConfigurationError
from olmo.files.digests import file_digest
from olmo.files.tensors import read_training_state

Location = Path | str

FOLDERS = {"1B": Path("checkpoints/pretrained_1B"), "7B": Path("checkpoints/pretrained")}


def add_checkpoint_flags(parser: argparse.ArgumentParser, several: bool) -> None:
    """--step with --model_size, or --checkpoint."""
    which = parser.add_mutually_exclusive_group(required=True)
    if several:
        which.add_argument(
            "--step",
            type=_step,
            nargs="+",
            help="steps of the official run, in checkpoints/pretrained_1B/, or `all` that lie there",
        )
    else:
        which.add_argument("--step", type=int, help="a step of the official run, in checkpoints/pretrained_1B/")
    which.add_argument(
        "--checkpoint",
        nargs="+" if several else None,
        help="folder, glob, or hub id with @revision" if several else "folder, or hub id with @revision",
    )
    parser.add_argument("--model_size", choices=sorted(FOLDERS), default="1B", help="of --step")


def _step(text: str) -> int | str:
    return text if text == "all" else int(text)


_step.__name__ = "step"  # what argparse calls a wrong one


def checkpoint_folders(step: int | None, model_size: str, named: Sequence[str]) -> list[Path]:
    """The folders that the flags name, as `checkpoint_locations`; what is on the hub is downloaded."""
    locations = checkpoint_locations(None if step is None else [step], model_size, named)
    return [place if isinstance(place, Path) else resolve(place) for place in locations]


def checkpoint_locations(steps: Sequence[int | str] | None, model_size: str, named: Sequence[str]) -> list[Location]:
    """What the flags name, each once: patterns expanded, and steps in order of their number; hub ids are not asked for.

    `steps` are numbers, or "all" alone. Raises ConfigurationError or FileNotFoundError for what is not there.
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
            raise ConfigurationError(f"{place}: no checkpoints (*-unsharded) there; fetch some: scripts/get_model.sh")
        return sorted(found, key=step_of)
    folders = [place / f"{step}-unsharded" for step in sorted(set(map(int, steps)))]
    for folder in folders:
        if not folder.is_dir():
            raise ConfigurationError(
                f"{folder}: no such checkpoint; fetch it there, or give a hub id with --checkpoint "
                f"(allenai/OLMo-{model_size}@step{folder.name.partition('-')[0]}-tokens...)"
            )
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


def identity_of(folder: Path) -> str:
    """What tells the weights of a folder from all others: `fingerprint` of an OLMo model, SHA-256 of another's files.

    Reads all of them; the system keeps as much in memory as it can spare.
    """
    if is_olmo(folder):
        return fingerprint(read_state(folder))
    return hashlib.sha256(" ".join(map(file_digest, model_files(folder))).encode()).hexdigest()


def label_of(location: Location) -> str:
    """A short name that can be a folder's: that of the folder, or of the revision or model on the hub."""
    return location.name if isinstance(location, Path) else location.rpartition("/")[2].rpartition("@")[2]


def step_of(location: Location) -> int:
    """The training step in a checkpoint's name (`step90-unsharded`, `738020-unsharded`), -1 where there is none."""
    # All of the name up to a dash: a commit of the hub may begin with digits, and a model's name with its size.
    match = re.match(r"(?:step)?(\d+)(?:-|$)", label_of(location))
    return int(match[1]) if match else -1


def tokens_of(location: Location, folder: Path) -> int | None:
    """Tokens that a checkpoint has seen: as its name says in billions (`step738020-tokens3095B`), or, exactly, the
    trainer's state beside its weights; None where neither tells."""
    try:
        seen = read_training_state(folder, "train", "other").get("global_train_tokens_seen")
    except (OSError, ValueError, AttributeError):  # not there, or of another program
        seen = None
    if isinstance(seen, int):
        return seen
    match = re.search(r"-tokens(\d+)B(?:-|$)", label_of(location))
    return int(match[1]) * 10**9 if match else None
