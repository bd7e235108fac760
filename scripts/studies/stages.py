"""The stages of a plan: every command of a study, what it makes, and what it needs."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from analysis.locations import folder_names
from olmo.config.setting import spelled
from olmo.exceptions import ConfigurationError
from olmo.files.paths import is_hub_id
from scripts.studies.checks import check_overrides, check_seeds
from scripts.studies.plan import (
    Condition,
    Plan,
    PlannedStart,
    Repetition,
    Stage,
    check_unique,
    choose,
    slug,
    starts_by_name,
    without_stages,
)
from scripts.studies.schema import Entropy, Intervention, Scoring, Study

CHECKPOINTS = Path("checkpoints/hub")  # where a checkpoint of the hub is fetched that is trained or edited


def make_plan(study: Study, folder: Path) -> Plan:
    """Expand a study into its plan; stages are in the order in which they begin where several could.

    Raises ConfigurationError where names do not fit, or a start matches nothing.
    """
    check_overrides(study)
    plan = without_stages(study, folder)
    plan.stages = list(_Stages(plan).all())
    check_unique("stages", [stage.name for stage in plan.stages])
    check_unique("records of stages", [stage.label for stage in plan.stages])
    check_unique("outputs of stages", [str(output) for stage in plan.stages for output in stage.outputs])
    check_seeds(plan)
    return plan


class _Stages:
    """What the stages of a plan refer to: where each start, its coefficients and its edits are."""

    def __init__(self, plan: Plan):
        self.plan, self.study, self.folder = plan, plan.study, plan.folder
        self.prepared: tuple[str, ...] = ()
        self.fetched: dict[str, tuple[str, str]] = {}  # hub id -> stage, folder
        self.measured: dict[tuple[str, int], tuple[str, Path]] = {}  # start, pretraining -> stage, coefficients
        self.edited: dict[tuple[str, str, int], tuple[str, Path]] = {}  # start, intervention, pretraining

    def all(self) -> Iterator[Stage]:
        yield from self._prepare()
        yield from self._fetch()
        yield from self._pretrain()
        for name, found in self.study.entropy.items():
            yield from self._entropies(name, found)
        yield from self._edits()
        for name, found in self.study.entropy.items():
            yield from self._entropies_of_interventions(name, found)
        yield from self._train()
        yield from self._score()
        yield from self._acquisition()
        # It needs nothing: what is missing is named in it.
        yield Stage("report", "report", ("analysis.report", str(self.folder)), (self.folder / "report.html",))

    def _prepare(self) -> Iterator[Stage]:
        before: tuple[str, ...] = ()
        for name, found in self.study.prepare.items():
            output = Path(found.output)
            stage = Stage(
                f"prepare {name}",
                "prepare",
                tuple(found.command),
                (output,),
                before,
                shared=not output.is_relative_to(self.folder),
            )
            before = (stage.name,)
            yield stage
        self.prepared = before

    def _fetch(self) -> Iterator[Stage]:
        """Checkpoints of the hub that are trained or edited; one that is only measured is deleted after use."""
        for condition in self.plan.conditions:
            for location in condition.start.locations:
                if is_hub_id(location) and location not in self.fetched:
                    owner, _, name = location.partition("@")
                    output = CHECKPOINTS / owner / (name or "main")
                    stage = Stage(
                        f"fetch {location}",
                        "fetch",
                        ("scripts.get_model", location, "--output", str(output)),
                        (output,),
                    )
                    self.fetched[location] = (stage.name, str(output))
                    yield stage

    def _place(self, start: PlannedStart, pretraining: int) -> tuple[str, tuple[str, ...]]:
        """(where a start is for the commands, the stages that put it there)."""
        location = start.of(pretraining)
        if location in self.fetched:
            stage, folder = self.fetched[location]
            return folder, (stage,)
        return location, ((f"pretraining, seed {pretraining}",) if start.own else ())

    def _pretrain(self) -> Iterator[Stage]:
        pretraining = self.study.pretraining
        if pretraining is None:
            return
        steps = sorted({start.step for start in self.plan.starts if start.own})
        for k in range(self.plan.pretrainings):
            run = self.folder / f"pretraining/seed{k}"
            yield Stage(
                f"pretraining, seed {k}",
                "train",
                self._training(pretraining.configuration, run, self.study.seed + k, pretraining.overrides),
                tuple(run / f"step{step}-unsharded" for step in steps),
                self.prepared,
                (pretraining.configuration,),
                run,
            )

    @staticmethod
    def _training(configuration: str, run: Path, seed: int, overrides: Mapping[str, Any]) -> tuple[str, ...]:
        given = {"save_folder": run, "seed": seed, "try_load_latest_save": True, **overrides}
        return ("scripts.train", configuration, *(f"--{key}={spelled(value)}" for key, value in given.items()))

    def _entropies(self, data: str, found: Entropy) -> Iterator[Stage]:
        """One command for all starts of a model, so that Python and torch are loaded once."""
        starts = choose(found.starts, starts_by_name(self.plan.starts), f"entropy.{data}.starts")
        choose(
            found.interventions, {k: [k] for k in ("none", *self.study.interventions)}, f"entropy.{data}.interventions"
        )
        if "none" not in found.interventions:
            raise ConfigurationError(f"entropy.{data}.interventions: needs 'none' as well, to compare with")
        models = list(dict.fromkeys(start.model for start in starts))
        for coefficient in found.coefficients:
            for k in range(max(self.plan.pretrainings, 1)):
                for model in models:
                    group = [s for s in starts if s.model == model and (k == 0 or len(s.locations) > 1)]
                    if group:
                        yield self._entropy(data, found, coefficient, k, group, len(models) > 1)

    def _entropy(
        self, data: str, found: Entropy, coefficient: str, k: int, group: Sequence[PlannedStart], several_models: bool
    ) -> Stage:
        output = self.folder / "entropy" / slug(data) / coefficient / f"seed{k}"
        output = output / slug(group[0].model) if several_models else output
        places, needs = [], list(self.prepared)
        for start in group:
            place, stages = self._place(start, k)
            places.append(place)
            needs += stages
        name = f"entropy on {data}, {coefficient}" + (f", {group[0].model}" if several_models else "")
        name += f", seed {k}" if group[0].own else ""
        folders = _folders(output, places)
        for start, folder in zip(group, folders):
            self._note(name, data, coefficient, start, "none", k, folder)
            edits = found.edits or not any(other.edits for other in self.study.entropy.values())
            if coefficient == "abs" and edits:
                self.measured.setdefault((start.name, k), (name, folder / "mlp_average_coefficients.safetensors"))
        flags = self._entropy_flags(found, coefficient, output)
        if any(is_hub_id(place) for place in places):
            flags = (*flags, "--keep", "none")
        return Stage(
            name,
            "entropy",
            ("analysis.entropy", "--checkpoint", *places, *flags),
            tuple(folder / "knowledge_entropy.json" for folder in folders),
            tuple(dict.fromkeys(needs)),
        )

    @staticmethod
    def _entropy_flags(found: Entropy, coefficient: str, output: Path) -> tuple[str, ...]:
        given: dict[str, Any] = {"data": found.data, "data_size": found.data_size, "batch_size": found.batch_size}
        given |= {"coefficient": coefficient, "measures": ",".join(found.measures), "output": output}
        check_flags(found.flags, (*given, "checkpoint", "overwrite"), "entropy")
        return (*as_flags({**given, **found.flags}), "--overwrite")

    def _note(
        self, stage: str, data: str, coefficient: str, start: PlannedStart, intervention: str, k: int, folder: Path
    ) -> None:
        self.plan.entropies.append(
            {
                "data": data,
                "coefficient": coefficient,
                "start": start.name,
                "intervention": intervention,
                "pretraining": k,
                "folder": str(folder),
                "stage": stage,
            }
        )

    def _edits(self) -> Iterator[Stage]:
        for name, found in self.study.interventions.items():
            is_edit = found.ratio is not None or found.factor is not None
            where = f"interventions.{name}"
            if not is_edit:
                if found.temperature or found.selection != "lowest":
                    raise ConfigurationError(
                        f"{where}: selection and temperature have no effect without ratio and factor"
                    )
                continue
            if found.ratio is None or found.factor is None:
                raise ConfigurationError(f"{where}: needs ratio and factor")
            starts = [c.start for c in self.plan.conditions if c.intervention == name]
            for data, of_data in self.study.entropy.items():
                if name in of_data.interventions:
                    starts += self._changed(data, of_data, name)
            for start in dict.fromkeys(starts):
                for k in range(len(start.locations)):
                    yield self._edit(where, name, found, start, k)

    def _edit(self, where: str, name: str, found: Intervention, start: PlannedStart, k: int) -> Stage:
        if (start.name, k) not in self.measured:
            raise ConfigurationError(f"{where}: needs the entropy of start '{start.name}' with coefficients `abs`")
        measured, coefficients = self.measured[start.name, k]
        place, needs = self._place(start, k)
        edit = self.folder / "edits" / f"seed{k}" / f"{slug(start.name)}_{slug(name)}.safetensors"
        given = {"checkpoint": place, "coefficients": coefficients, "resuscitation_ratio": found.ratio}
        given |= {"amplifying_factor": found.factor, "output": edit}
        if found.selection != "lowest":
            given["select"] = found.selection
        if found.selection == "random":
            given["seed"] = self.study.seed + k
        if found.temperature:
            given["format"] = "temperature"
        stage = f"edit {start.name}, {name}" + (f", seed {k}" if start.own else "")
        self.edited[start.name, name, k] = (stage, edit)
        command = ("analysis.change_parameters", *as_flags(given), "--overwrite")
        return Stage(stage, "edit", command, (edit,), tuple(dict.fromkeys((measured, *needs))))

    def _entropies_of_interventions(self, data: str, found: Entropy) -> Iterator[Stage]:
        for name in found.interventions:
            if name == "none":
                continue
            of_run = self._intervention_flags(data, name)
            for coefficient in found.coefficients[:1]:
                for start in self._changed(data, found, name):
                    for k in range(len(start.locations)):
                        output = self.folder / "entropy" / slug(data) / coefficient / f"seed{k}"
                        output = output / slug(f"{start.name}_{name}")
                        place, needs = self._place(start, k)
                        edit = self.edited.get((start.name, name, k))
                        flags = of_run
                        if edit is not None:
                            needs = (*needs, edit[0])
                            is_temperature = self.study.interventions[name].temperature
                            flag = "--temperature_MLP" if is_temperature else "--resuscitation"
                            flags = (*of_run, flag, str(edit[1]))
                        stage = f"entropy on {data}, {coefficient}, {start.name}, {name}"
                        stage += f", seed {k}" if start.own else ""
                        self._note(stage, data, coefficient, start, name, k, output)
                        given = (*flags, *self._entropy_flags(found, coefficient, output))
                        yield Stage(
                            stage,
                            "entropy",
                            ("analysis.entropy", "--checkpoint", place, *given),
                            (output / "knowledge_entropy.json",),
                            tuple(dict.fromkeys((*self.prepared, *needs))),
                        )

    def _changed(self, data: str, found: Entropy, intervention: str) -> list[PlannedStart]:
        """The starts at which an intervention's entropy is measured: those that train with it, if any do."""
        starts = choose(found.starts, starts_by_name(self.plan.starts), f"entropy.{data}.starts")
        trained = {c.start for c in self.plan.conditions if c.intervention == intervention}
        return [start for start in starts if start in trained or not trained]

    def _intervention_flags(self, data: str, name: str) -> tuple[str, ...]:
        """The flags of analysis.entropy for what an intervention changes beside an edit."""
        found = self.study.interventions[name]
        known = {"model.temperature_attention": "--temperature_attention"}
        if unknown := [key for key in found.overrides if key not in known]:
            raise ConfigurationError(
                f"entropy.{data}.interventions: {name} changes {unknown[0]}, on which the entropy of a start does not "
                "depend"
            )
        return tuple(part for key, value in found.overrides.items() for part in (known[key], spelled(value)))

    def _train(self) -> Iterator[Stage]:
        # All conditions of a seed one after another: a study that is stopped early has complete repetitions.
        for repetition in self.plan.repetitions:
            for condition in self.plan.conditions:
                yield self._run(condition, repetition)

    def _run(self, condition: Condition, repetition: Repetition) -> Stage:
        study, k = self.study, repetition.pretraining
        setting, intervention = study.settings[condition.setting], study.interventions[condition.intervention]
        start = study.starts[condition.start.group]
        place, needs = self._place(condition.start, k)
        configuration = setting.configuration or start.configuration or study.configuration
        if configuration is None:
            raise ConfigurationError(f"settings.{condition.setting}: needs a configuration, as the study has none")
        identity = "_".join(condition.run(repetition).parts[1:])
        run = self.folder / condition.run(repetition)
        given: dict[str, Any] = {"load_path": place, "run_name": identity}
        given |= {**study.overrides, **start.overrides, **setting.overrides, **intervention.overrides}
        edit = self.edited.get(
            (condition.start.name, condition.intervention, k if len(condition.start.locations) > 1 else 0)
        )
        if edit is not None:
            key = "model.temperature_MLP" if intervention.temperature else "model.resuscitation"
            given[key] = edit[1]
            needs = (*needs, edit[0])
        return Stage(
            condition.stage(repetition),
            "train",
            self._training(configuration, run, repetition.seed, given),
            (run / "config.yaml", run / "metrics.jsonl"),
            tuple(dict.fromkeys((*self.prepared, *needs))),
            (configuration,),
            run,
            identity=f"training {identity}",
        )

    def _score(self) -> Iterator[Stage]:
        score = self.study.score
        if score is None:
            return
        starts = choose(score.starts, starts_by_name(self.plan.starts), "score.starts")
        models = list(dict.fromkeys(start.model for start in starts))
        for k in range(max(self.plan.pretrainings, 1)):
            for model in models:
                group = [s for s in starts if s.model == model and (k == 0 or len(s.locations) > 1)]
                if group:
                    yield self._scored(score, k, group, len(models) > 1)

    def _scored(self, score: Scoring, k: int, group: Sequence[PlannedStart], several_models: bool) -> Stage:
        output, name = self.folder / "score" / f"seed{k}", f"score, seed {k}"
        if several_models:
            output, name = output / slug(group[0].model), f"score {group[0].model}, seed {k}"
        located = [self._place(start, k) for start in group]
        places = [place for place, _ in located]
        folders = _folders(output, places)
        for start, folder in zip(group, folders):
            self.plan.scores.append(
                {"start": start.name, "pretraining": k, "folder": str(folder), "stage": name},
            )
        check_flags(score.flags, ("output", "overwrite"), "score")
        flags = as_flags({**score.flags, "output": output})
        flags += ("--keep", "none") if any(map(is_hub_id, places)) else ()
        needs = dict.fromkeys((*self.prepared, *(stage for _, stages in located for stage in stages)))
        outputs = tuple(folder / "score.json" for folder in folders)
        return Stage(name, "score", ("analysis.score", *places, *flags, "--overwrite"), outputs, tuple(needs))

    def _acquisition(self) -> Iterator[Stage]:
        """A table of the runs of each setting."""
        for setting in dict.fromkeys(condition.setting for condition in self.plan.conditions):
            conditions = [c for c in self.plan.conditions if c.setting == setting]
            groups = [[str(self.folder / c.run(r)) for r in self.plan.repetitions] for c in conditions]
            output = self.folder / "acquisition" / slug(setting)
            seeds = [part for group in groups if len(group) > 1 for part in ("--seeds", *group)]
            runs = [run for group in groups for run in group]
            needs = [c.stage(r) for c in conditions for r in self.plan.repetitions]
            command = (
                "analysis.acquisition",
                *runs,
                *seeds,
                *as_flags({**vars(self.study.acquisition), "output": output}),
            )
            yield Stage(
                "acquisition" + (f", {setting}" if len(self.study.settings) > 1 else ""),
                "acquisition",
                command,
                (output / "acquisition.json",),
                tuple(needs),
            )


def _folders(output: Path, places: Sequence[str]) -> list[Path]:
    """Where a command writes the results of each of its checkpoints."""
    if len(places) == 1:
        return [output]
    return [output / name for name in folder_names([p if is_hub_id(p) else Path(p) for p in places])]


def check_flags(flags: Iterable[str], own: Collection[str], section: str) -> None:
    """Raise ConfigurationError for flags that the study gives itself, from other keys of the section or its folder."""
    for name in flags:
        if name in own:
            raise ConfigurationError(f"{section}: flags.{name}: the study decides it; leave it out of flags")


def as_flags(given: Mapping[str, Any]) -> tuple[str, ...]:
    """Flags of a command of the analysis: null is left out, true is a flag alone, a list is several values."""
    found: list[str] = []
    for key, value in given.items():
        if value is None or value is False:
            continue
        values = [] if value is True else value if isinstance(value, (list, tuple)) else [value]
        found += [f"--{key}", *map(str, values)]
    return tuple(found)
