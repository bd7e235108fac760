"""Runs that differ in their seed only, taken together, and the pairs of them that a comparison is made of.

The seeds of a condition are repetitions of one experiment: estimates are computed from means over them, and the
entries of different seeds are the same entries, never more of them. Seeds have two levels: of pretraining, and of
continual learning from one pretrained checkpoint.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from analysis.estimates import finite
from analysis.runs import Run


@dataclass(frozen=True)
class Repetitions(Sequence[Run]):
    """The runs of one condition of a study, and which of them repeat what.

    seeds: (number of the pretraining, number of the learning seed) of each run. about: `model`, where the repetitions
    are pretrainings, each the mean over its learning seeds; `checkpoint`, where they are learning seeds of one
    pretraining. Functions of analysis.outcomes also take a plain list, of which every run is a repetition.
    """

    runs: tuple[Run, ...]
    seeds: tuple[tuple[int, int], ...]
    about: str = "model"

    def __post_init__(self) -> None:
        assert len(self.runs) == len(self.seeds) == len(set(self.seeds)) and self.about in ("model", "checkpoint")
        assert self.about == "model" or len({pretraining for pretraining, _ in self.seeds}) <= 1

    def __len__(self) -> int:
        return len(self.runs)

    def __getitem__(self, place: Any) -> Any:
        return self.runs[place]


def units(runs: Sequence[Run]) -> list[int]:
    """The repetition that each run belongs to."""
    if isinstance(runs, Repetitions) and runs.about == "model":
        return [pretraining for pretraining, _ in runs.seeds]
    return list(range(len(runs)))


def mapped(function: Callable[[Run], Run], runs: Sequence[Run]) -> Sequence[Run]:
    """`function` of every run, in the same repetitions."""
    found = [function(run) for run in runs]
    return replace(runs, runs=tuple(found)) if isinstance(runs, Repetitions) else found


def paired(one: Repetitions, other: Repetitions) -> tuple[Repetitions, Repetitions]:
    """The runs of both whose seeds both have, in one order; without any, both are empty."""
    shared = [seed for seed in one.seeds if seed in other.seeds]
    first, second = (
        replace(side, runs=tuple(side.runs[side.seeds.index(seed)] for seed in shared), seeds=tuple(shared))
        for side in (one, other)
    )
    return first, second


def spread(values: Sequence[float], runs: Sequence[Run]) -> dict[str, float | None]:
    """Standard deviations of an outcome (or a paired difference), `values` one a run, at the two levels of seeds.

    `learning`: between learning seeds of one pretraining, pooled over pretrainings. `pretraining`: between
    pretrainings, without what the learning seeds contribute to their means; where each has one learning seed, that
    cannot be separated and is included. None where the runs do not show it. Runs in a plain list are learning seeds.
    """
    pretrainings = [p for p, _ in runs.seeds] if isinstance(runs, Repetitions) else [0] * len(runs)
    groups = [[v for v, p in zip(values, pretrainings) if p == chosen] for chosen in dict.fromkeys(pretrainings)]
    degrees = len(values) - len(groups)
    within = sum(len(group) * float(np.var(group)) for group in groups) / degrees if degrees else None
    between = None
    if len(groups) > 1:
        contributed = (within or 0.0) * float(np.mean([1 / len(group) for group in groups]))
        between = max(float(np.var([np.mean(group) for group in groups], ddof=1)) - contributed, 0.0)
    return {
        "pretraining": None if between is None else finite(math.sqrt(between)),
        "learning": None if within is None else finite(math.sqrt(within)),
    }


@dataclass(frozen=True)
class Condition:
    """Runs of one setting, each with another seed, or a single run."""

    name: str
    runs: list[Run]

    def keys(self) -> list[object]:
        """What names each run among its seeds: its seed, or its place where these are unknown or not all different."""
        seeds = [run.seed for run in self.runs]
        return list(seeds) if None not in seeds and len(set(seeds)) == len(seeds) else list(range(len(seeds)))


def conditions(runs: Sequence[Run], together: Sequence[Sequence[Run]] = ()) -> list[Condition]:
    """Group runs, in order of the first of each group: as `together` says, and otherwise runs whose configurations
    are the same but for the seed, where all their seeds differ."""
    groups = [list(group) for group in together]
    named = {id(run) for group in groups for run in group}
    by_settings: dict[str, list[Run]] = {}
    for run in runs:
        if id(run) not in named:
            # Runs that did not record what they were set to stand alone.
            by_settings.setdefault(run.settings or f"alone {id(run)}", []).append(run)
    for group in by_settings.values():
        are_seeds = len({run.seed for run in group}) == len(group)
        groups += [group] if are_seeds else [[run] for run in group]
    place = {id(run): number for number, run in enumerate(runs)}
    groups.sort(key=lambda group: min(place[id(run)] for run in group))
    taken: set[str] = set()
    found = []
    for group in groups:
        name = _name([run.name for run in group])
        name = name if name not in taken else ", ".join(run.name for run in group)
        taken.add(name)
        found.append(Condition(name, group))
    return found


def _name(names: Sequence[str]) -> str:
    """What names have in common at their beginning, without the word seed; the first one if that is nothing."""
    if len(names) == 1:
        return names[0]
    first, last = min(names), max(names)
    common = next((place for place, (a, b) in enumerate(zip(first, last)) if a != b), len(first))
    return re.sub(r"(?i)([\W_]*seed|[\W_]+s)?[\W_]*$", "", first[:common]) or names[0]


def pairs(one: Condition, other: Condition) -> list[tuple[Run, Run]]:
    """The runs of two conditions by their seed, those that both have; two single runs whatever their seeds are."""
    if len(one.runs) == len(other.runs) == 1:
        return [(one.runs[0], other.runs[0])]
    of_other = dict(zip(other.keys(), other.runs))
    return [(run, of_other[key]) for key, run in zip(one.keys(), one.runs) if key in of_other]
