"""Whether two runs are a pair: one seed gives conditions the same injected texts and the same order of data, so that
their difference does not contain what these change. Read from what the runs recorded."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from analysis.probes import Integers
from analysis.runs import Run, complete_lines


def unpaired(one: Sequence[Run], other: Sequence[Run]) -> list[str]:
    """What the n-th runs of both, which are compared as a pair, do not share: a line a reason, naming the first pair.

    Runs without injections lack no text. What a run did not record is not compared. Raises ValueError where a file is
    damaged.
    """
    found: dict[str, list[str]] = {}
    for first, second in zip(one, other):
        for reason in _reasons(first, second):
            found.setdefault(reason, []).append(f"{first.name} and {second.name}")
    return [
        f"{pairs[0]}{f' (and {len(pairs) - 1} more)' if len(pairs) > 1 else ''} are no pair: {reason}"
        for reason, pairs in found.items()
    ]


def _reasons(one: Run, other: Run) -> Iterator[str]:
    if one.folder.resolve() == other.folder.resolve():
        return
    texts = [_texts(run.folder) for run in (one, other)]
    if all(texts):
        for number, (first, second) in enumerate(zip(*texts), start=1):
            if first != second:
                yield f"injected texts differ, first in round {number}"
                break
    if one.seed is not None and other.seed is not None and one.seed != other.seed:
        yield "their seeds differ, and so does the order of data"
    elif _paths(one) != _paths(other):
        yield "their data.paths differ"
    elif (step := _first_other_batch(one.folder, other.folder)) is not None:
        yield f"the order of data differs, first at step {step}"


def _texts(folder: Path) -> list[list[tuple[Any, Any]]]:
    """(entry, tokens) of the texts of each injection, from injections.jsonl; empty without that file."""
    path = folder / "injections.jsonl"
    lines = complete_lines(path) if path.is_file() else ()
    return [[(text["entry"], text.get("tokens")) for text in line.get("texts", [])] for line in lines]


def _paths(run: Run) -> Any:
    return json.loads(run.settings)["data"].get("paths") if run.settings else None


def _first_other_batch(one: Path, other: Path) -> int | None:
    """The first step of `one` whose instances differ. Where batches differ in size, as many steps as make up the same
    number of instances are compared at a time. None where none differs, or either did not record its instances."""
    steps, batches = _batches(one)
    _, others = _batches(other)
    if not steps or not len(others):
        return None
    together = math.lcm(batches.shape[1], others.shape[1])
    count = min(batches.size, others.size) // together
    # The order within a batch depends on the number of processes, and changes nothing.
    first, second = (np.sort(b.reshape(-1)[: count * together].reshape(count, together)) for b in (batches, others))
    [different] = np.nonzero((first != second).any(axis=1))
    return steps[different[0] * together // batches.shape[1]] if len(different) else None


def _batches(folder: Path) -> tuple[list[int], Integers]:
    """Steps, and the instances of each (steps, batch) on all ranks, from data-indices/; without steps that a rank, in a
    run that is still training, has not recorded yet."""
    found: dict[int, list[int]] = {}
    for path in sorted((folder / "data-indices").glob("rank*.tsv")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(keepends=True), start=1):
            if line.endswith("\n"):
                try:
                    step, *instances = map(int, line.split())
                except ValueError as error:
                    raise ValueError(f"{path}: line {number} is not a step and numbers of instances") from error
                found.setdefault(step, []).extend(instances)
    size = max(map(len, found.values()), default=0)
    steps = sorted(step for step, instances in found.items() if len(instances) == size)
    return steps, np.array([found[step] for step in steps], np.int64).reshape(len(steps), size)
