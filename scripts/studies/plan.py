"""What a study file becomes: starts, conditions, entropies, and stages (scripts/studies/stages.py).

Everything of a plan follows from the file and the folders that exist; nothing is run or downloaded here.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from analysis.locations import expand
from olmo.exceptions import ConfigurationError, did_you_mean
from olmo.files.paths import is_hub_id
from olmo.files.revisions import is_later_stage, parse
from scripts.studies.schema import Combination, Study

KINDS = ("prepare", "fetch", "entropy", "edit", "train", "score", "acquisition", "report")  # of stages
_LEARNING = 1000  # between the seeds of continual learning of one pretraining


@dataclass(frozen=True)
class Stage:
    """A command, what it makes, and which stages must have finished before."""

    name: str
    kind: str
    command: tuple[str, ...]  # module and arguments
    outputs: tuple[Path, ...]  # exist once it has finished
    needs: tuple[str, ...] = ()
    configurations: tuple[str, ...] = ()  # files whose content counts as part of the command
    run: Path | None = None  # the folder of a run; what another command left in it is deleted first
    shared: bool = False  # its outputs belong to all studies: where they exist, it has finished
    identity: str = ""  # where its name depends on what else the study has: what names its record instead

    @property
    def label(self) -> str:
        """The name of its record, log and job."""
        return slug(self.identity or self.name)


@dataclass(frozen=True)
class PlannedStart:
    """One checkpoint, or with the study's own pretraining one for each of its seeds."""

    name: str
    group: str  # the key of the study file
    also: tuple[str, ...]  # keys of lists and patterns that contain it as well
    model: str  # those of one model are measured together, and joined in one line of a figure
    locations: tuple[str, ...]  # folders or hub ids, one for each pretraining or one in all
    step: int  # -1: unknown
    own: bool  # of the study's own pretraining

    def of(self, pretraining: int) -> str:
        return self.locations[pretraining if len(self.locations) > 1 else 0]


@dataclass(frozen=True)
class Repetition:
    """A seed of continual learning from one pretraining."""

    pretraining: int
    learning: int
    seed: int
    folder: str  # the last part of the path of its runs


@dataclass(frozen=True)
class Condition:
    """One start, intervention and setting, repeated with several seeds."""

    name: str
    start: PlannedStart
    intervention: str
    setting: str

    def stage(self, repetition: Repetition) -> str:
        """The name of the stage that trains it."""
        return f"training {self.name}, {repetition.folder.replace('seed', 'seed ')}"

    def run(self, repetition: Repetition) -> Path:
        """Its folder in that of the study, whatever other settings and seeds there are."""
        parts = (slug(part) for part in (self.setting, self.start.name, self.intervention))
        return Path("runs", *parts, repetition.folder)


@dataclass
class Plan:
    """What a study file becomes; paths are those of its commands."""

    study: Study
    folder: Path
    starts: list[PlannedStart]
    conditions: list[Condition]
    repetitions: list[Repetition]
    pretrainings: int
    stages: list[Stage] = field(default_factory=list)
    entropies: list[dict[str, Any]] = field(default_factory=list)  # as plan.json has them
    scores: list[dict[str, Any]] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """The parts of plan.json that do not depend on what has run."""
        study = self.study
        inside = self.inside
        return {
            "title": study.title,
            "description": study.description,
            "notes": study.notes,
            "about": study.about,
            "repeats": study.repeats,
            "acquisition": vars(study.acquisition),
            "seeds": [
                [r.seed for r in self.repetitions if r.pretraining == k] for k in range(max(self.pretrainings, 1))
            ],
            "starts": [
                {"name": s.name, "step": s.step, "model": s.model, "checkpoints": [inside(p) for p in s.locations]}
                for s in self.starts
            ],
            "interventions": {"none": {}, **{name: _changed(found) for name, found in study.interventions.items()}},
            "settings": {name: _changed(found) for name, found in study.settings.items()},
            "conditions": [
                {
                    "name": c.name,
                    "start": c.start.name,
                    "intervention": c.intervention,
                    "setting": c.setting,
                    "runs": [
                        {
                            "folder": c.run(r).as_posix(),
                            "stage": c.stage(r),
                            "pretraining": r.pretraining,
                            "learning": r.learning,
                        }
                        for r in self.repetitions
                    ],
                }
                for c in self.conditions
            ],
            "entropies": [{**found, "folder": inside(found["folder"])} for found in self.entropies],
            "scores": [{**found, "folder": inside(found["folder"])} for found in self.scores],
            "directions": [
                {"claim": d.claim, "measure": d.measure, "from": d.start, "to": d.end, "expected": d.expected}
                for d in study.directions
            ],
            "figures": study.figures,
            "tables": study.tables,
        }

    def inside(self, path: str) -> str:
        """A path of the study's folder as seen from it; others are absolute, hub ids as they are."""
        place = Path(path)
        if place.is_relative_to(self.folder):
            return place.relative_to(self.folder).as_posix()
        return path if is_hub_id(path) else str(place.absolute())


def slug(name: str) -> str:
    """A name as a part of a path."""
    return re.sub(r"[^\w.+-]+", "_", name).strip("_.") or "_"


def _changed(section: Any) -> dict[str, Any]:
    """The keys of an intervention or setting that its file gives."""
    default = type(section)()
    return {key: value for key, value in vars(section).items() if value != getattr(default, key)}


def without_stages(study: Study, folder: Path) -> Plan:
    """The starts and conditions of a study.

    Raises ConfigurationError where names do not fit, or a start matches nothing.
    """
    pretrainings, repetitions = _repetitions(study)
    starts = _starts(study, folder, max(pretrainings, 1))
    check_unique("starts", [start.name for start in starts])
    conditions = list(_conditions(study, starts)) if study.configuration or _has_configurations(study) else []
    if study.conditions and not conditions:
        raise ConfigurationError("conditions: needs `configuration`, that of continual learning")
    for start in dict.fromkeys(condition.start for condition in conditions):
        if study.about == "model" and not start.own:
            raise ConfigurationError(
                f"starts.{start.group}: about: model: seeds reach back to the study's own pretraining, which this "
                "checkpoint is not of; write `about: checkpoint`"
            )
    check_unique("conditions", [condition.name for condition in conditions])
    check_unique("folders of runs", [str(c.run(repetitions[0])) for c in conditions])
    return Plan(study, folder, starts, conditions, repetitions, pretrainings)


def _has_configurations(study: Study) -> bool:
    of_settings = (setting.configuration for setting in study.settings.values())
    return any((*of_settings, *(start.configuration for start in study.starts.values())))


def _repetitions(study: Study) -> tuple[int, list[Repetition]]:
    if study.about not in ("model", "checkpoint"):
        raise ConfigurationError(f"about: {study.about!r} is neither 'model' nor 'checkpoint'")
    for name in ("seeds", "learning_seeds"):
        if getattr(study, name) < 1:
            raise ConfigurationError(f"{name}: must be at least 1")
    if study.about == "checkpoint":
        if study.learning_seeds != 1:
            raise ConfigurationError("learning_seeds: has no effect with `about: checkpoint`; write seeds")
        found = [Repetition(0, j, study.seed + j, f"seed{j}") for j in range(study.seeds)]
        return int(study.pretraining is not None), found
    if study.pretraining is None:
        raise ConfigurationError("about: model: needs `pretraining`, as its seeds reach back to it")
    return study.seeds, [
        Repetition(k, j, study.seed + k + _LEARNING * j, f"seed{k}" + (f".{j}" if j else ""))
        for k in range(study.seeds)
        for j in range(study.learning_seeds)
    ]


def check_unique(what: str, names: Sequence[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise ConfigurationError(f"two {what} are named '{name}'")


# --- starts and conditions ---------------------------------------------------------------------------------------


def _starts(study: Study, folder: Path, pretrainings: int) -> list[PlannedStart]:
    """Every start, those of patterns and lists expanded; a checkpoint that an earlier start names is not repeated."""
    found: dict[tuple[str, ...], PlannedStart] = {}
    for group, start in study.starts.items():
        where = f"starts.{group}"
        keys = ("step", "steps", "checkpoint", "checkpoints")
        given = [key for key in keys if getattr(start, key) not in (None, [])]
        if len(given) != 1:
            raise ConfigurationError(f"{where}: give one of {', '.join(keys)}")
        single = given[0] in ("step", "checkpoint")
        own = given[0] in ("step", "steps")
        if own:
            if study.pretraining is None:
                raise ConfigurationError(f"{where}.{given[0]}: needs `pretraining`; otherwise name a checkpoint")
            places = [
                tuple(str(folder / f"pretraining/seed{k}/step{step}-unsharded") for k in range(pretrainings))
                for step in ([start.step] if single else start.steps)
            ]
            model = start.model or "pretraining"
        else:
            named = [start.checkpoint] if single else start.checkpoints
            places = [(place,) for place in _places(named, where, {Path(p.output) for p in study.prepare.values()})]
            model = start.model
            single = single and len(places) == 1
        for locations in places:
            if (first := found.get(locations)) is not None:
                of_first = study.starts[first.group]
                other = start.model not in ("", first.model)
                other |= start.configuration not in (None, of_first.configuration)
                if single or other or start.overrides not in ({}, of_first.overrides):
                    raise ConfigurationError(f"{where}: {locations[0]} is already a start, starts.{first.group}")
                found[locations] = dataclasses.replace(first, also=(*first.also, group))
                continue
            of_name = parse(label_of(locations[0]))
            # A step within a later stage is no place in the whole training: figures keep the order of the file.
            step = -1 if is_later_stage(of_name.stage) else of_name.step
            name = group if single else f"step {step}" if step >= 0 else label_of(locations[0])
            found[locations] = PlannedStart(name, group, (), model or _model(locations[0]), locations, step, own)
    return _distinct(list(found.values()))


def _distinct(starts: Sequence[PlannedStart]) -> list[PlannedStart]:
    """Starts with the name of their model before their own, where two of patterns or lists have one name."""
    names = Counter(start.name for start in starts)
    return [
        start if names[start.name] == 1 else dataclasses.replace(start, name=f"{start.model} {start.name}")
        for start in starts
    ]


def _places(named: Iterable[str | None], where: str, prepared: Collection[Path]) -> Iterator[str]:
    """Folders and hub ids, patterns expanded in order of their stages and steps; a folder in `prepared` may not exist
    yet."""
    for name in named:
        assert name is not None
        if Path(name).is_dir() or Path(name) in prepared or is_hub_id(name):
            yield name.rstrip("/")
        elif any(c in name for c in "*?["):
            try:
                yield from map(str, expand(name))
            except (ConfigurationError, FileNotFoundError) as error:
                raise type(error)(f"{where}: {error}") from error
        else:
            raise ConfigurationError(f"{where}: {name}: no such checkpoint folder, nor a hub id (owner/name@revision)")


def label_of(location: str) -> str:
    return location.rstrip("/").rpartition("/")[2].rpartition("@")[2]


def _model(location: str) -> str:
    """What the checkpoints of one model have in common: the folder around them, or their name on the hub."""
    return location.partition("@")[0] if is_hub_id(location) else str(Path(location).parent)


def choose(names: Sequence[str], known: Mapping[str, Sequence[Any]], where: str) -> list[Any]:
    """What names stand for, or everything without names."""
    found: list[Any] = []
    for name in names or known:
        if name not in known:
            raise ConfigurationError(
                f"{where}: no '{name}'{did_you_mean(name, known) or '; known are ' + ', '.join(known)}"
            )
        found += known[name]
    return list(dict.fromkeys(found))


def starts_by_name(starts: Sequence[PlannedStart]) -> dict[str, list[PlannedStart]]:
    """Starts by the names that a study file may use: their own, and those of their groups."""
    named: dict[str, list[PlannedStart]] = {}
    for start in starts:
        for name in dict.fromkeys((start.group, *start.also, start.name)):
            named.setdefault(name, []).append(start)
    return named


def _conditions(study: Study, starts: Sequence[PlannedStart]) -> Iterator[Condition]:
    found: dict[Condition, None] = {}
    for number, combination in enumerate(study.conditions or [Combination()]):
        where = f"conditions[{number}]"
        of_start = choose(combination.starts, starts_by_name(starts), f"{where}.starts")
        interventions = choose(
            combination.interventions, {k: [k] for k in study.interventions}, f"{where}.interventions"
        )
        settings = choose(combination.settings, {k: [k] for k in study.settings}, f"{where}.settings")
        for setting in settings:
            for start in of_start:
                for intervention in interventions:
                    parts = [start.name, *([intervention] if intervention != "none" else [])]
                    name = ", ".join([*parts, *([setting] if len(study.settings) > 1 else [])])
                    found[Condition(name, start, intervention, setting)] = None
    yield from found
