"""The checkpoints in a run's folder: which is the newest whole one, the links to it, and how they go."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Collection
from pathlib import Path

from ..files.atomic import fsync
from . import manifest

SHARDS = "model_and_optim"  # folder in a checkpoint, as in OLMo
_log = logging.getLogger("olmo")


def saved_steps(save_folder: Path) -> list[tuple[int, str]]:
    """What a run saved, oldest first: pairs of step and kind, the end of the name ("" or "-unsharded").

    Of two of a step the one for restarts comes last.
    """
    found = (re.fullmatch(r"step(\d+)(-unsharded)?", p.name) for p in save_folder.glob("step*") if p.is_dir())
    return sorted(((int(match[1]), match[2] or "") for match in found if match), key=lambda s: (s[0], s[1] == ""))


def is_sharded(folder: Path) -> bool:
    """Whether `olmo/checkpoint/sharded.py` has written a checkpoint's weights."""
    return (folder / SHARDS / ".metadata").is_file()


def step_and_kind(folder: Path) -> tuple[int, str]:
    """Step and kind of a checkpoint by its name."""
    step, dash, kind = folder.name.removeprefix("step").partition("-")
    return int(step), dash + kind


def latest(save_folder: Path) -> Path | None:
    """The newest checkpoint that a run saved, that can restart it and is whole; damaged ones are named in the log.

    Raises ValueError where all are damaged.
    """
    damaged = []
    for step, kind in reversed(saved_steps(save_folder)):
        folder = save_folder / f"step{step}{kind}"
        if not (folder / "train.pt").is_file() and not (folder / manifest.NAME).is_file():
            continue  # weights alone
        problem = manifest.problem(folder)
        if problem is None:
            return folder
        _log.warning("damaged checkpoint: %s", problem)
        damaged.append(problem)
    if damaged:
        raise ValueError(f"{damaged[0]}; no checkpoint in {save_folder} is whole, remove them to start anew")
    return None


def check_whole(folder: Path, unused: Collection[str] = ()) -> None:
    """Raise ValueError that names what is damaged in a checkpoint with a manifest, among the files that are to be used.

    Who reads a file that is missing says so; a checkpoint may have been stripped of some.
    """
    problem = manifest.problem(
        folder, {path.relative_to(folder).as_posix() for path in folder.rglob("*")} - set(unused)
    )
    if problem is not None:
        raise ValueError(f"damaged checkpoint: {problem}; without {folder / manifest.NAME} it is used as it is")


def link_latest(folder: Path) -> None:
    """Let the link `latest` beside a checkpoint lead to it, or to the one of its step that is for restarts, and
    `latest-unsharded`, as in OLMo, to one of that kind."""
    restart = folder.with_name(folder.name.removesuffix("-unsharded"))
    links = {"latest": restart if restart.is_dir() else folder}
    if folder != restart:
        links["latest-unsharded"] = folder
    for name, target in links.items():
        partial = folder.with_name(f".{name}.partial")
        try:
            partial.unlink(missing_ok=True)
            partial.symlink_to(target.name, target_is_directory=True)
            partial.replace(folder.with_name(name))
        except OSError as error:  # a file system without links; nothing of ours needs them
            _log.warning("%s: no link to %s (%s)", folder.with_name(name), target.name, error.strerror)


def remove(folder: Path, successor: Path | None = None) -> None:
    """Remove a checkpoint if it is there; `successor`, another folder, then gets its name. No name
    of a checkpoint ever leads to half of one: what a killed process leaves is for `remove_left_over`."""
    doomed = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(doomed, ignore_errors=True)
    if folder.is_dir():
        folder.rename(doomed)
    if successor is not None:
        successor.rename(folder)
        fsync(folder.parent)
    shutil.rmtree(doomed, ignore_errors=True)


def remove_left_over(save_folder: Path) -> None:
    """Remove what processes that were killed while saving or removing a checkpoint have left."""
    for path in save_folder.glob(".step*"):
        if re.fullmatch(r"\.step\d+(-unsharded)?\.(partial|removed)", path.name):
            shutil.rmtree(path)
