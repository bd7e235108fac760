"""Names of checkpoints that belong to one training, revisions of the hub and folders: parsed, sorted, thinned out.

    step738020-tokens3095B   stage2-ingredient3-step2000-tokens9B   stage1-step-40000   lc-4k-to-32k-step-4000
    step1000   global_step1000   step_360   step-125000   checkpoint-500   iter_0001000   738020-unsharded   1000

A stage begins where the one before ended, and its ingredients are parallel branches. A name without a stage is of the
first one: some revisions of OLMo 2 lack it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from ..exceptions import ConfigurationError

# The whole number up to a dash: a commit of the hub may begin with digits, and a model's name with its size.
_STEP = re.compile(
    r"(?:(?P<stage>stage\d+(?:-ingredient\d+)?|lc-\d+k-to-\d+k)-)?"
    r"(?:(?:(?:global_)?step|checkpoint|iter)[_-]?)?(?P<step>\d+)(?:-|$)"
)
_TOKENS = re.compile(r"-tokens(\d+)B(?:-|$)")


@dataclass(frozen=True)
class Revision:
    """What a name states: `stage` ("" without one), `step` and `tokens` within the stage (-1 and None without)."""

    name: str
    stage: str
    step: int
    tokens: int | None

    @property
    def place(self) -> tuple[int, int, int]:
        return _place(self.stage)


def _place(stage: str) -> tuple[int, int, int]:
    """The place of a stage: extensions of the context are after the numbered stages; then its ingredient."""
    numbers = [int(digits) for digits in re.findall(r"\d+", stage)] or [1]
    return (1, numbers[0], 0) if stage.startswith("lc") else (0, numbers[0], (numbers[1:] or [0])[0])


def is_later_stage(stage: str) -> bool:
    """Whether a stage, "" without one, is not the first of its training."""
    return _place(stage)[:2] > (0, 1)


def parse(name: str) -> Revision:
    """What the name of a checkpoint's folder or revision states."""
    match, tokens = _STEP.match(name), _TOKENS.search(name)
    stage, step = (match["stage"] or "", int(match["step"])) if match else ("", -1)
    return Revision(name, stage, step, int(tokens[1]) * 10**9 if tokens else None)


def order(name: str) -> tuple[bool, tuple[int, int, int], int, list[str | int]]:
    """The key that sorts names by stage, ingredient and step, and then by the numbers in them; without a step last."""
    found = parse(name)
    parts = [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
    return found.step < 0, found.place, found.step, parts


def matching(names: Iterable[str], pattern: str) -> tuple[list[str], list[str]]:
    """(names that match a glob, sorted, and those that are left out: without a step, where others have one)."""
    found = sorted({name for name in names if fnmatchcase(name, pattern)}, key=order)
    with_step = [name for name in found if parse(name).step >= 0]
    return (with_step, found[len(with_step) :]) if with_step else (found, [])


def thinned(names: Sequence[str], every: int) -> list[bool]:
    """Which of sorted names to keep: of each `every` steps of a stage and ingredient the first, and its last.

    The steps kept are the same for models that were saved at other steps too. Raises ConfigurationError for a name
    without a step.
    """
    keep: list[bool] = []
    before: tuple[tuple[int, int, int], int] | None = None
    for name in names:
        found = parse(name)
        if found.step < 0:
            raise ConfigurationError(f"--every: {name} has no step in its name")
        here = (found.place, found.step // every)
        if keep and before is not None and before[0] != here[0]:
            keep[-1] = True
        keep.append(here != before)
        before = here
    return [*keep[:-1], True]


def before(stage: Revision, names: Iterable[str]) -> tuple[int, int | None] | None:
    """(steps, tokens or None) of the training before a later stage, by the names of all checkpoints of the model.

    0 of both where the stage counts on from the one before (SmolLM3). None where that is unknown: no checkpoint of an
    earlier stage, or ingredients that ended at different steps.
    """
    found = [one for one in map(parse, names) if one.step >= 0 and one.place[:2] <= stage.place[:2]]
    stages = sorted({one.place[:2] for one in [*found, stage]})
    numbers = [number for extension, number in stages if not extension]
    if len(stages) == 1 or numbers != list(range(min(numbers[0], 1), len(numbers) + min(numbers[0], 1))):
        return None
    steps: int = 0
    tokens: int | None = 0
    for place in stages:
        of_stage = [one for one in [*found, stage] if one.place[:2] == place]
        if min(one.step for one in of_stage) > steps:  # counted on, or the first stage
            steps, tokens = 0, 0
        if place == stage.place[:2]:
            break
        last = {one.place: one for one in sorted(of_stage, key=lambda one: one.step)}.values()
        if len({one.step for one in last}) > 1:
            return None
        known = [one.tokens for one in last if one.tokens is not None]
        steps += max(one.step for one in last)
        tokens = tokens + max(known) if known and tokens is not None else None
    return steps, tokens
