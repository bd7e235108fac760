"""The runs of a study, a group for each condition, read from their folders; and the start that conditions share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from analysis.conditions import Repetitions
from analysis.runs import NotEvaluated, Run, distinct, from_original, read_run
from analysis.study.interventions import UNCHANGED, changes_model, kind
from analysis.study.plan_file import Plan
from olmo.knowledge.entries import SETTINGS

Seed = tuple[int, int]  # of a pretraining, and of continual learning from it


@dataclass(frozen=True)
class Group:
    """The runs of one condition. `shared`: the same runs as if each had begun with the weights before an edit, or
    before a change of the model such as a temperature: the start that the conditions of a checkpoint share."""

    name: str
    start: str
    intervention: str
    setting: str
    runs: Repetitions
    shared: Repetitions


def read_groups(plan: Plan) -> tuple[list[Group], list[str], list[str]]:
    """(groups, lines about what is missing, warnings). A run that was not made, whose stage has not finished, or that
    was not evaluated before and after, as one that diverged, is left out, and a condition without any run too.

    Raises ValueError for files that are damaged, and where two runs are one.
    """
    missing: list[str] = []
    found: dict[str, dict[Seed, Run]] = {}
    for condition in plan.content["conditions"]:
        runs: dict[Seed, Run] = {}
        for member in condition["runs"]:
            seed = (member["pretraining"], member["learning"])
            if seed[0] and plan.content["about"] == "checkpoint":
                raise ValueError(
                    f"{plan.folder}: condition '{condition['name']}' has runs of several pretrainings, but "
                    "the study is about one checkpoint"
                )
            if seed in runs:
                raise ValueError(f"{plan.folder}: condition '{condition['name']}' has two runs of seed {seed}")
            if (reason := plan.unfinished(member)) is None:
                try:
                    run = read_run(plan.place(member["folder"]))
                    # Named by their places: seeds of one condition have folders of one name.
                    runs[seed] = replace(run, name=member["folder"])
                    continue
                except (FileNotFoundError, NotEvaluated) as error:
                    reason = str(error)
            missing.append(f"condition {condition['name']}, {member['folder']}: {reason}")
        found[condition["name"]] = runs
    for name, first in distinct([run for runs in found.values() for run in runs.values()])[1].items():
        raise ValueError(
            f"{plan.folder}: {name} has exactly the metrics of {first}: they are one run and must not count as two"
        )
    groups = [_group(plan, condition, found) for condition in plan.content["conditions"] if found[condition["name"]]]
    return groups, missing, [line for group in groups for line in _warnings(plan, group)]


def _group(plan: Plan, condition: Mapping[str, Any], found: Mapping[str, Mapping[Seed, Run]]) -> Group:
    runs, intervention = found[condition["name"]], plan.content["interventions"][condition["intervention"]]
    unchanged = _unchanged(plan, condition, found) if changes_model(intervention) else {}
    shared = [_from_start_of(from_original(run), unchanged.get(seed[0])) for seed, run in runs.items()]
    repetitions = Repetitions(tuple(runs.values()), tuple(runs), plan.content["about"])
    names = {key: condition[key] for key in ("name", "start", "intervention", "setting")}
    return Group(**names, runs=repetitions, shared=replace(repetitions, runs=tuple(shared)))


def _unchanged(plan: Plan, condition: Mapping[str, Any], found: Mapping[str, Mapping[Seed, Run]]) -> dict[int, Run]:
    """By pretraining, a run of the same start and setting without an intervention."""
    return {
        seed[0]: run
        for other in plan.content["conditions"]
        if (other["start"], other["setting"]) == (condition["start"], condition["setting"])
        if kind(plan.content["interventions"][other["intervention"]]) == UNCHANGED
        for seed, run in found[other["name"]].items()
    }


def _from_start_of(run: Run, other: Run | None) -> Run:
    """A run as if it had begun where another one of the same checkpoint did."""
    if other is None or not run.before.same_probes(other.before):
        return run
    losses = {
        label: [other.losses[label][0], after]
        for label, (_, after) in run.losses.items()
        if label in other.losses and len(other.losses[label][0][1]) == len(after[1])
    }
    scaled, two = run.published, other.published
    if scaled is not None:
        known = scaled.of_entries and two is not None and two.of_entries
        scaled = None if two is None else replace(scaled, before=two.before, of_entries=known)
    return replace(run, before=other.before, losses=losses, accuracy_before=other.accuracy_before, published=scaled)


def _warnings(plan: Plan, group: Group) -> list[str]:
    if not changes_model(plan.content["interventions"][group.intervention]):
        return []
    alone = [run.name for run, shared in zip(group.runs, group.shared) if shared is run]
    return [
        f"{name}: {group.intervention} changes the model at the start, and no run without it from {group.start} was "
        "found: A and forgetting are measured from the changed model"
        for name in alone
    ]


def numbers_of_entries(groups: Sequence[Group]) -> dict[str, int]:
    """How many entries of each setting are probed, at most in any run."""
    found: dict[str, int] = {}
    for knowledge in [run.before for group in groups for run in group.runs]:
        for setting in knowledge.settings:
            found[setting] = max(found.get(setting, 0), len(knowledge.entries(setting)))
    return {setting: found[setting] for setting in SETTINGS if setting in found}
