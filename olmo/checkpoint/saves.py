"""The checkpoints in a run's folder: their names, the newest complete one, the links to it, and deleting them."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterable
from pathlib import Path

from ..console import log
from ..files.atomic import fsync
from ..files.paths import parse_step
from . import manifest

SHARDS = "model_and_optim"  # folder in a checkpoint, as in OLMo


def saved_steps(save_folder: Path) -> list[tuple[int, str]]:
    """Step and kind of the checkpoints that a run saved, as `in_order`."""
    return in_order(path.name for path in save_folder.glob("step*") if path.is_dir())


def in_order(names: Iterable[str]) -> list[tuple[int, str]]:
    """Step and kind ("" or "-unsharded") of those names that are a checkpoint's, oldest first.

    Of two of one step the sharded one, which restarts prefer, is last.
    """
    return sorted(filter(None, map(parse_step, names)), key=lambda found: (found[0], found[1] == ""))


def is_sharded(folder: Path) -> bool:
    """Whether `olmo/checkpoint/sharded.py` has written a checkpoint's weights."""
    return (folder / SHARDS / ".metadata").is_file()


def has_trainer_state(names: Iterable[str]) -> bool:
    """Whether a checkpoint of these files has train.pt, or parts of it."""
    return any(name.startswith("train") for name in names)


def restarts(folder: Path) -> bool:
    """Whether a checkpoint, complete or damaged, was written with what a restart needs beside the weights."""
    if (folder / "train.pt").is_file() or not (folder / manifest.NAME).is_file():
        return (folder / "train.pt").is_file()
    try:
        return not folder.name.endswith("-unsharded") or has_trainer_state(manifest.sizes(folder))
    except ValueError:  # damaged
        return True


def latest(save_folder: Path) -> Path | None:
    """The newest complete checkpoint that can restart a run; warns about damaged ones.

    Raises ValueError if all are damaged.
    """
    damaged = []
    for step, kind in reversed(saved_steps(save_folder)):
        folder = save_folder / f"step{step}{kind}"
        if not restarts(folder):
            continue
        problem = manifest.problem(folder)
        if problem is None:
            return folder
        log.warning("damaged checkpoint: %s", problem)
        damaged.append(problem)
    if damaged:
        raise ValueError(f"{damaged[0]}; no checkpoint in {save_folder} is complete, delete them to start anew")
    return None


def newest(save_folder: Path) -> Path | None:
    """The newest checkpoint of a run, whose files are not checked; None if it has none."""
    return next((save_folder / f"step{step}{kind}" for step, kind in reversed(saved_steps(save_folder))), None)


def check_complete(folder: Path, unused: Collection[str] = ()) -> None:
    """Raise ValueError that names a damaged file of a checkpoint with a manifest, except among the `unused` ones.

    Missing files are reported by their readers: a user may have deleted some on purpose.
    """
    problem = manifest.problem(
        folder, {path.relative_to(folder).as_posix() for path in folder.rglob("*")} - set(unused)
    )
    if problem is not None:
        raise ValueError(f"damaged checkpoint: {problem}; without {folder / manifest.NAME} it is used as it is")


def link_latest(folder: Path) -> None:
    """Set the link `latest` beside a checkpoint to it, or to the sharded one of its step, and `latest-unsharded`, as
    OLMo does, to an unsharded one. Weights alone are never `latest`."""
    restart = folder.with_name(folder.name.removesuffix("-unsharded"))
    newest = restart if restart.is_dir() else folder
    links = {} if newest.name.endswith("-unsharded") and not restarts(newest) else {"latest": newest}
    if folder != restart:
        links["latest-unsharded"] = folder
    for name, target in links.items():
        partial = folder.with_name(f".{name}.partial")
        try:
            partial.unlink(missing_ok=True)
            partial.symlink_to(target.name, target_is_directory=True)
            partial.replace(folder.with_name(name))
        except OSError as error:  # a file system without links; this program needs none
            log.warning("%s: no link to %s (%s)", folder.with_name(name), target.name, error.strerror)


def delete(folder: Path, successor: Path | None = None) -> None:
    """Delete a checkpoint if it exists; `successor`, another folder, then gets its name.

    No checkpoint's name ever belongs to half of one: what a killed process leaves has another name.
    """
    doomed = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(doomed, ignore_errors=True)
    if folder.is_dir():
        folder.rename(doomed)
    if successor is not None:
        successor.rename(folder)
        fsync(folder.parent)
    shutil.rmtree(doomed, ignore_errors=True)


def delete_leftovers(save_folder: Path) -> None:
    """Delete what processes left that were killed while they saved or deleted a checkpoint."""
    for path in save_folder.glob(".step*"):
        if path.suffix in (".partial", ".removed") and parse_step(path.stem.removeprefix(".")):
            shutil.rmtree(path)
