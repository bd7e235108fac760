"""Runs that differ in their seed only, taken together, and the pairs of them that a comparison is made of.

The seeds of a condition are repetitions of one experiment: estimates are computed from means over them, and the
entries of different seeds are the same entries, never more of them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from analysis.runs import Run


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
