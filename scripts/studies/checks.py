"""What is checked of a study before anything runs, beyond its names."""

from __future__ import annotations

from olmo.config import TrainConfig, load
from olmo.exceptions import ConfigurationError
from olmo.report.environment import seed_effects
from scripts.studies.plan import Plan
from scripts.studies.schema import Intervention, Study

_GIVEN = {  # keys of a run that the study itself gives -> what to do instead
    "seed": "`seed` of the study is the first one",
    "save_folder": "runs are in the study's folder",
    "try_load_latest_save": "an interrupted run is always continued",
    "load_path": "name a start",
}


def check_overrides(study: Study) -> None:
    """Raise ConfigurationError for overrides of what the study itself gives to runs, which repetitions depend on."""
    sections = {"": study.overrides}
    if study.pretraining is not None:
        sections["pretraining."] = study.pretraining.overrides
    for key in ("starts", "interventions", "settings"):
        sections |= {f"{key}.{name}.": found.overrides for name, found in getattr(study, key).items()}
    for where, overrides in sections.items():
        for key in overrides:
            if key in _GIVEN and (where, key) != ("pretraining.", "load_path"):
                raise ConfigurationError(f"{where}overrides.{key}: leave it out; {_GIVEN[key]}")
    if study.interventions.get("none", Intervention()) != Intervention():
        raise ConfigurationError("interventions.none: changes nothing; give what changes something another name")


def check_runs(plan: Plan) -> None:
    """Raise ConfigurationError where the configuration of a run does not load, or the study's own pretraining does not
    save a start; without it, the first run that begins would find out."""
    by_name = {stage.name: stage for stage in plan.stages}
    own = [start for start in plan.starts if start.own]
    names = ["pretraining, seed 0"] * bool(own) + [c.stage(plan.repetitions[0]) for c in plan.conditions]
    for name in names:
        _, configuration, *overrides = by_name[name].command
        try:
            config = load(configuration, overrides)
        except ConfigurationError as error:
            of_overrides = str(error).replace("command line:", f"overrides of {configuration}:")
            raise ConfigurationError(f"{name}: {of_overrides}") from None
        for start in own if name == names[0] else ():
            if not _saves(config, start.step):
                raise ConfigurationError(
                    f"starts.{start.group}: pretraining does not save step {start.step} (max_duration is "
                    f"{config.max_duration}, save_steps_unsharded {config.save_steps_unsharded}); set "
                    "save_steps_unsharded in pretraining.overrides"
                )


def _saves(config: TrainConfig, step: int) -> bool:
    """Whether a run leaves step{step}-unsharded, as CheckpointSaver.due decides; True where its end is not known."""
    duration = str(config.stop_at or config.max_duration)  # epochs and tokens are steps once the data are there
    last = int(duration) if duration.isdecimal() else None
    if last is not None and step > last:
        return False
    interval, final = config.save_interval_unsharded, last is None or step == last
    ends = interval is not None and (final or step % interval == 0)
    return step in (config.save_steps_unsharded or ()) or ends or (final and config.force_save_unsharded)


def check_seeds(plan: Plan) -> None:
    """Raise ConfigurationError where several seeds of continual learning would give one run several times."""
    if len({repetition.learning for repetition in plan.repetitions}) < 2:
        return
    by_name = {stage.name: stage for stage in plan.stages}
    for _, condition in {(c.setting, c.start.group): c for c in plan.conditions}.items():
        _, configuration, *overrides = by_name[condition.stage(plan.repetitions[0])].command
        if not seed_effects(load(configuration, overrides)):
            key = "seeds" if plan.study.about == "checkpoint" else "learning_seeds"
            raise ConfigurationError(
                f"{key}: another seed changes nothing in the runs of '{condition.name}' ({configuration}); give "
                "overrides: {data_shuffling: true}, or 1 seed"
            )
