"""What a run wrote, read from its folder; also while it is still running."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
from omegaconf import OmegaConf

from analysis.estimates import Values
from analysis.locations import step_of
from analysis.probes import Knowledge, ProbeSeries, read_knowledge, read_probes
from olmo.checkpoint import is_hub_id
from olmo.knowledge.entries import SETTINGS

TASKS = ("sciq", "winogrande", "piqa", "openbook_qa", "hellaswag", "arc_easy")  # of P, paper B.2

Entry = tuple[str, int]  # setting, number


@dataclass(frozen=True)
class Run:
    """What a run's folder holds: its first evaluation, its newest one, and everything between."""

    name: str
    start: int | None  # pretraining step of the checkpoint it started from, 0 for new weights; None: unknown
    begins: int | None  # its own step there: 0 unless it continues the checkpoint's count; None: unknown
    first_step: int  # of the evaluation before
    step: int  # of the newest evaluation of all those probes
    before: Knowledge
    after: Knowledge
    original: Knowledge | None  # the weights before resuscitation
    losses: dict[str, list[tuple[int, Values]]]  # label -> step and loss of each held-out instance, before and after
    accuracy_before: dict[str, float]  # task -> accuracy
    accuracy_after: dict[str, float]
    accuracy_steps: tuple[int, int] | None  # steps before and after
    chance: dict[str, float]
    curve: list[tuple[int, dict[str, float]]]  # (step, `Knowledge.means`) of every table
    injections: list[int]  # steps
    encounters: dict[Entry, list[int]] | None  # entry -> steps whose batch held it; None: the run did not log it
    probes: ProbeSeries


def _complete_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file, one a line, without a last line that is still being written."""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(keepends=True), start=1):
        if line.endswith("\n"):
            try:
                found = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}: line {number} is not JSON: {error}") from error
            if not isinstance(found, dict) or not isinstance(found.get("step"), int):
                raise ValueError(f"{path}: line {number} is not an object with a step")
            yield found


def read_encounters(folder: Path) -> dict[Entry, list[int]] | None:
    """Entry -> ascending steps whose batch held one of its texts, from injections.jsonl; None without that file.

    Texts of a published injection map that belong to no known entry are left out.
    """
    path = folder / "injections.jsonl"
    if not path.is_file():
        return None
    found: dict[Entry, set[int]] = {}
    for line in _complete_lines(path):
        for text in line.get("texts", ()):
            named = re.fullmatch(r"(\w+)/(\d+)", text["entry"])
            if named and named[1] in SETTINGS:
                found.setdefault((named[1], int(named[2])), set()).add(line["step"])
    return {entry: sorted(steps) for entry, steps in found.items()}


def _losses(folder: Path, last: int) -> dict[str, list[tuple[int, Values]]]:
    """Label -> (step, loss of each instance) of its oldest and its newest table up to a step; labels that have no two
    tables of the same instances are left out."""
    found: dict[str, list[tuple[int, Values]]] = {}
    paths = {int(path.stem.removeprefix("step")): path for path in folder.glob("losses/step*.parquet")}
    for step in sorted(step for step in paths if step <= last):
        table = pyarrow.parquet.read_table(paths[step], columns=["label", "loss"])
        labels, losses = np.array(table["label"].to_pylist()), table["loss"].to_numpy()
        for label in dict.fromkeys(labels.tolist()):
            of_label = losses[labels == label]
            oldest = found.setdefault(label, [(step, of_label)])
            if step > oldest[0][0] and len(of_label) == len(oldest[0][1]):
                oldest[1:] = [(step, of_label)]
    return {label: pair for label, pair in found.items() if len(pair) == 2}


def _downstream(lines: list[dict[str, Any]], last: int) -> tuple[dict[int, dict[str, float]], dict[str, float]]:
    """({step: {task: accuracy}} up to a step, {task: chance})."""
    accuracy: dict[int, dict[str, float]] = {}
    chance: dict[str, float] = {}
    for line in lines:
        for name, value in line.items():
            found = re.fullmatch(r"eval/downstream/(\w+?)_(acc|len_norm|pmi_dc|f1|chance)", name)
            if found and line["step"] <= last:
                of = chance if found[2] == "chance" else accuracy.setdefault(line["step"], {})
                of[found[1]] = value
    return accuracy, chance


def _start(folder: Path) -> tuple[int | None, int | None]:
    """`start` and `begins` of a run: the step in the name of the checkpoint in config.yaml, and that step or 0."""
    path = folder / "config.yaml"
    if not path.is_file():
        return None, 0
    config = OmegaConf.load(path)
    load_path = OmegaConf.select(config, "load_path")
    if load_path is None:
        return 0, 0
    step = step_of(str(load_path) if is_hub_id(str(load_path)) else Path(str(load_path)))
    start = step if step >= 0 else None
    return start, 0 if OmegaConf.select(config, "reset_trainer_state") else start


def probing_steps(folder: Path) -> int | None:
    """The length of a run's probing windows in steps, from its config.yaml; None without them."""
    path = folder / "config.yaml"
    return OmegaConf.select(OmegaConf.load(path), "probing.steps") if path.is_file() else None


def read_run(folder: Path) -> Run:
    """Read a run's folder; raises FileNotFoundError where it holds no run, ValueError without two evaluations.

    K is compared at the first evaluation and at the newest one of the same probes: evaluators may have different
    intervals, so the newest evaluation may hold only some of them. Losses and accuracies are the newest ones up to
    that: in the windows after injections only probes are evaluated.
    """
    metrics = folder / "metrics.jsonl"
    if not metrics.is_file():
        raise FileNotFoundError(f"{folder}: no run here (no metrics.jsonl)")
    lines = list(_complete_lines(metrics))
    # An evaluation is complete once its line is there, which is written after its tables.
    complete = {line["step"] for line in lines if "eval/K" in line}
    probes = read_probes(folder)
    evaluated = [place for place, step in enumerate(probes.steps.tolist()) if step in complete]
    if len(evaluated) < 2:
        raise ValueError(f"{folder}: {len(evaluated)} evaluation(s) with probes, before and after are needed")
    asked = ~np.isnan(probes.values)
    first, *later = evaluated
    last = next((place for place in reversed(later) if np.array_equal(asked[place], asked[first])), None)
    if last is None:
        raise ValueError(f"{folder}: no evaluation after step {probes.steps[first]} has the same probes")
    first_step, step = int(probes.steps[first]), int(probes.steps[last])
    accuracy, chance = _downstream(lines, step)
    accuracy_before = accuracy[min(accuracy)] if accuracy else {}
    comparable = [s for s in accuracy if s > min(accuracy) and accuracy_before.keys() <= accuracy[s].keys()]
    original = folder / "probes" / "original.parquet"
    return Run(
        folder.name or folder.resolve().name,
        *_start(folder),
        first_step,
        step,
        probes.knowledge(first),
        probes.knowledge(last),
        read_knowledge(original) if original.is_file() else None,
        _losses(folder, step),
        accuracy_before,
        accuracy[max(comparable)] if comparable else {},
        (min(accuracy), max(comparable)) if comparable else None,
        chance,
        # The last tables of a run that diverged may hold NaN only.
        [(int(s), probes.knowledge(place).means()) for place, s in enumerate(probes.steps) if asked[place].any()],
        [line["step"] for line in lines if "injection/round" in line],
        read_encounters(folder),
        probes,
    )
