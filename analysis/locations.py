"""Where checkpoints are: `--step N` of the published layout, or `--checkpoint` paths, hub ids, and patterns of both.

A `Location` is a folder, or a hub id (a string) whose folder may not be downloaded yet.
"""

from __future__ import annotations

import argparse
import difflib
import glob
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from olmo.exceptions import ConfigurationError
from olmo.files import revisions
from olmo.files.atomic import delete_files_of_dead_processes
from olmo.files.paths import is_hub_id

# `olmo.checkpoint` imports torch, which the runner of a study must not hold: it is imported where it is used.

Location = Path | str

FOLDERS = {"1B": Path("checkpoints/pretrained_1B"), "7B": Path("checkpoints/pretrained")}


def add_checkpoint_flags(parser: argparse.ArgumentParser, several: bool) -> None:
    """Add --step with --model_size, and --checkpoint."""
    which = parser.add_mutually_exclusive_group(required=True)
    many: dict[str, Any] = {"nargs": "+"} if several else {}
    steps = "steps of the official run, or `all`" if several else "a step of the official run"
    which.add_argument("--step", type=step if several else int, **many, help=f"{steps}, in checkpoints/pretrained_1B/")
    patterns = ", or a quoted pattern of folders or of revisions (owner/name@step*)" if several else ""
    which.add_argument("--checkpoint", **many, help=f"folder, or hub id with @revision{patterns}")
    parser.add_argument("--model_size", choices=sorted(FOLDERS), default="1B", help="of --step")
    if several:
        add_every_flag(parser)


def add_every_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--every",
        type=int,
        metavar="STEPS",
        help="of what a pattern matches, the first checkpoint of each STEPS steps, and the last of each stage",
    )


def step(text: str) -> int | str:  # argparse names it in its error
    return text if text == "all" else int(text)


def checkpoint_locations(
    steps: Sequence[int | str] | None, model_size: str, named: Sequence[str], every: int | None = None
) -> list[Location]:
    """What the flags name, each once: patterns expanded, sorted by stage and step, and thinned out to `every` steps.

    `steps` are numbers, or "all" alone. The hub is asked only about patterns of its revisions.
    Raises ConfigurationError or FileNotFoundError for what does not exist.
    """
    patterns = [name for name in named if _is_pattern(name)]
    if every is not None and every < 1:
        raise ConfigurationError("--every must be at least 1")
    if every is not None and not patterns and "all" not in (steps or ()):
        raise ConfigurationError("--every: selects from what a pattern or `--step all` matches; none is given")
    if steps is not None:
        return [*_thinned(_steps(steps, model_size), every)]
    locations: list[Location] = []
    for name in named:
        if name in patterns:
            locations += expand(name, every)
        elif Path(name).is_dir():
            locations.append(Path(name))
        elif is_hub_id(name):
            locations.append(name)
        elif Path(name).is_file():
            from olmo.checkpoint.formats import explain

            raise FileNotFoundError(f"{name}: {explain(Path(name))}")
        else:
            raise FileNotFoundError(f"{name}: no such checkpoint folder")
    return list(dict.fromkeys(locations))


def _is_pattern(name: str) -> bool:
    return any(c in name for c in "*?[") and not Path(name).is_dir()


def expand(pattern: str, every: int | None = None) -> list[Location]:
    """The folders, or else revisions on the hub (`owner/name@PATTERN`), that match a pattern, sorted by stage and step;
    how many revisions, and their size, is printed. Raises ConfigurationError or FileNotFoundError."""
    folders = [Path(place) for place in glob.glob(pattern) if Path(place).is_dir()]
    if folders:
        folders.sort(key=lambda place: (*revisions.order(place.name)[:3], place))
        return [*_thinned(folders, every)]
    model, _, wanted = pattern.partition("@")
    if not wanted or not is_hub_id(model):
        raise ConfigurationError(f"{pattern}: no folder matches")
    from olmo.checkpoint.hub import downloaded_refs, refs, size_of

    try:
        known, reached = [*refs(model)], True
    except FileNotFoundError as error:
        known, reached = downloaded_refs(model), False
        if not revisions.matching(known, wanted)[0]:
            raise FileNotFoundError(f"{error}; no revision that matches {wanted} was downloaded before") from error
        _print(f"warning: {error}; {pattern} matches only revisions that were downloaded before")
    usable = [name for name in known if is_hub_id(f"{model}@{name}")]
    found, left_out = revisions.matching(usable, wanted)
    if not found:
        near = difflib.get_close_matches(wanted, known, n=3, cutoff=0.3) or sorted(known, key=revisions.order)[:3]
        raise ConfigurationError(f"{pattern}: none of {len(known)} revisions matches; for instance {', '.join(near)}")
    chosen = [str(one) for one in _thinned([f"{model}@{name}" for name in found], every)]
    size = size_of(chosen[-1]) if reached else None
    line = f"{pattern}: {len(chosen)} of {len(known)} revisions, {label_of(chosen[0])} to {label_of(chosen[-1])}"
    if size is not None:
        line += f", about {size / 1e9:,.1f} GB each, {len(chosen) * size / 1e9:,.0f} GB in all"
    _print(line + (f"; left out, without a step: {', '.join(left_out)}" if left_out else ""))
    return [*chosen]


def _print(line: str) -> None:
    """Print a line on stderr, once for all processes of a launcher."""
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr, flush=True)


def _thinned(locations: Sequence[Location], every: int | None) -> Sequence[Location]:
    if every is None or not locations:
        return locations
    return [one for one, keep in zip(locations, revisions.thinned([*map(label_of, locations)], every)) if keep]


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


def folder_names(locations: Sequence[Location]) -> list[str]:
    """The folder of each location's results in --output: its label, and where two are the same, for all of the hub
    `name@revision`. Raises ConfigurationError where two remain the same."""
    names = [*map(label_of, locations)]
    for shown in ("{1}", "{0}--{1}"):
        if len(set(names)) == len(names):
            return names
        parts = [(*str(one).partition("/")[::2],) for one in locations]
        names = [n if isinstance(one, Path) else shown.format(*p) for one, n, p in zip(locations, names, parts)]
    twice = next((name for name, count in Counter(names).items() if count > 1), None)
    if twice is not None:
        raise ConfigurationError(
            f"--output: two checkpoint folders of one name, {twice}; measure them beside the checkpoints"
        )
    return names


def step_of(location: Location) -> int:
    """The training step in a checkpoint's name (`step90-unsharded`, `738020-unsharded`), -1 without one."""
    return revisions.parse(label_of(location)).step


def training_of(location: Location, folder: Path) -> dict[str, Any]:
    """What results state of the training of a checkpoint: `step` (-1 where unknown) and `tokens` (or None) of its name.

    With a stage in the name also `stage`; the step is then that of the stage. `steps_before`, of a later stage, are the
    steps of the earlier ones, and `tokens` include theirs, by the names of the model's revisions on the hub; without
    these the tokens are unknown.
    """
    found = revisions.parse(label_of(location))
    state: dict[str, Any] = {"step": found.step, "tokens": tokens_of(location, folder)}
    if not found.stage:
        return state
    state["stage"] = found.stage
    if not revisions.is_later_stage(found.stage):
        return state
    earlier = None
    if isinstance(location, str):
        from huggingface_hub import constants

        from olmo.checkpoint.hub import known_refs

        earlier = revisions.before(found, known_refs(location.partition("@")[0], constants.ENDPOINT))
    if earlier is None:
        return {**state, "tokens": None}
    steps, tokens = earlier
    known = tokens is not None and found.tokens is not None
    return {**state, "steps_before": steps, "tokens": (tokens or 0) + (found.tokens or 0) if known else None}


def tokens_of(location: Location, folder: Path) -> int | None:
    """Tokens that a checkpoint was trained on: exact ones from the trainer's state beside its weights, or billions from
    its name (`step738020-tokens3095B`); None if neither has them."""
    from olmo.files.tensors import read_training_state

    try:
        seen = read_training_state(folder, "train", "other").get("global_train_tokens_seen")
    except (OSError, ValueError, AttributeError):  # missing, or of another program
        seen = None
    return seen if isinstance(seen, int) else revisions.parse(label_of(location)).tokens
