"""What a run wrote, read from its folder; also while it is still running."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from omegaconf import OmegaConf

from analysis.choices import EDITS
from analysis.estimates import Values
from analysis.locations import step_of
from analysis.probes import (
    Knowledge,
    ProbeSeries,
    finite_or_nan,
    is_text,
    read_probes,
    read_table,
    read_tables,
    table_paths,
)
from analysis.published import Published, read_published
from olmo.checkpoint import is_hub_id
from olmo.files.paths import read_json
from olmo.knowledge.entries import KINDS, SETTINGS

_DILUTED = re.compile(rf"(original/)?eval/((?:{'|'.join(SETTINGS)})_(?:{'|'.join(KINDS)}))/CrossEntropyLoss")
_ACCURACY = re.compile(r"(original/)?eval/downstream/(\w+?)_(acc|len_norm|pmi_dc|f1|chance)")
TASKS = ("sciq", "winogrande", "piqa", "openbook_qa", "hellaswag", "arc_easy")  # of P, paper B.2

# Keys that name a run or its places: runs that differ in these and their seed only are of one setting.
_OF_ONE_RUN = {"seed", "data", "run_name", "save_folder", "remote_save_folder", "save_overwrite", "wandb"} | {
    "try_load_latest_save"
}

Entry = tuple[str, int]  # setting, number


class NotEvaluated(ValueError):
    """A run that lacks an evaluation of its probes, before or after training."""


@dataclass(frozen=True)
class Run:
    """What a run's folder holds: its first evaluation, its newest one, and everything between."""

    name: str
    folder: Path
    start: int | None  # pretraining step of the checkpoint it started from, 0 for new weights; None: unknown
    begins: int | None  # its own step there: 0 unless it continues the checkpoint's count; None: unknown
    first_step: int  # of the evaluation before
    step: int  # of the newest evaluation of all those probes
    before: Knowledge
    after: Knowledge
    original: Knowledge | None  # the weights before resuscitation
    losses: dict[str, list[tuple[int, Values]]]  # label -> step and loss of each held-out instance, before and after
    original_losses: dict[str, Values]  # label -> losses of the weights before resuscitation
    accuracy_before: dict[str, float]  # task -> accuracy
    accuracy_after: dict[str, float]
    accuracy_steps: tuple[int, int] | None  # steps before and after
    original_accuracy: dict[str, float]  # of the weights before resuscitation
    chance: dict[str, float]
    accuracies_not_finite: int  # left out
    curve: list[tuple[int, dict[str, float]]]  # (step, `Knowledge.means`) of every table
    injections: list[int]  # steps
    encounters: dict[Entry, list[int]] | None  # entry -> steps whose batch held it; None: the run did not log it
    probes: ProbeSeries
    seed: tuple[Any, Any] | None  # seed and data.seed of its configuration
    settings: str | None  # the rest of its configuration, without names and places of the run itself
    published: Published | None  # its evaluations on the paper's scale; None: unknown
    tokens_per_step: int | None  # of a global batch; None: unknown


def same_metrics(one: Run, other: Run) -> bool:
    """Whether two runs are one run as far as their metrics show: at every step at which both were evaluated, the last
    one included, every probe has the same value to the last bit, and so has every held-out instance."""
    if one.step != other.step or not one.probes.same(other.probes):
        return False
    shared = np.intersect1d(one.probes.steps, other.probes.steps)
    mine, others = (run.probes.values[np.isin(run.probes.steps, shared)] for run in (one, other))
    after = [(one.losses[label][1][1], other.losses[label][1][1]) for label in one.losses.keys() & other.losses.keys()]
    return all(np.array_equal(a, b, equal_nan=True) for a, b in [(mine, others), *after])


def distinct(runs: Sequence[Run]) -> tuple[list[Run], dict[str, str]]:
    """(the runs without repetitions, {name of a repetition: name of the run that it repeats}): runs whose metrics are
    the same, because their seeds vary nothing, or because one run was named twice, by a link or as a copy. The names
    are expected to differ."""
    kept: list[Run] = []
    repeated: dict[str, str] = {}
    for run in runs:
        first = next((k for k in kept if k.folder.resolve() == run.folder.resolve() or same_metrics(k, run)), None)
        if first is None:
            kept.append(run)
        else:
            repeated[run.name] = first.name
    return kept, repeated


def complete_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file, one a line, without a last line that is still being written."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.endswith(b"\n"):
                try:
                    found = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"{path}: line {number} is not JSON: {error}") from error
                if not isinstance(found, dict) or type(found.get("step")) is not int:
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
    for line in complete_lines(path):
        texts = line.get("texts", [])
        if not isinstance(texts, list) or not all(
            isinstance(t, dict) and isinstance(t.get("entry"), str) for t in texts
        ):
            raise ValueError(f"{path}: the texts of step {line['step']} are not a list of entries")
        for text in texts:
            named = re.fullmatch(r"(\w+)/(\d+)", text["entry"])
            if named and named[1] in SETTINGS:
                found.setdefault((named[1], int(named[2])), set()).add(line["step"])
    return {entry: sorted(steps) for entry, steps in found.items()}


def _table_of_losses(path: Path) -> dict[str, Values]:
    """Label -> loss of each instance of one table."""
    table = read_table(path, {"label": is_text, "loss": pyarrow.types.is_floating})
    labels, losses = np.array(table["label"].to_pylist()), finite_or_nan(table["loss"])
    return {label: losses[labels == label] for label in dict.fromkeys(labels.tolist())}


def _original_losses(folder: Path) -> dict[str, Values]:
    path = folder / "losses" / "original.parquet"
    return _table_of_losses(path) if path.is_file() else {}


def from_original(run: Run) -> Run:
    """The run as if it had begun with the weights before resuscitation, which runs without it share: what an edit
    loses at once then counts as lost. The run itself where nothing was resuscitated. Losses and accuracies that were
    not measured of the original weights are left out."""
    if run.original is None:
        return run
    losses = {
        label: [(before[0], run.original_losses[label]), after]
        for label, (before, after) in run.losses.items()
        if len(run.original_losses.get(label, ())) == len(after[1])
    }
    found = run.published
    scaled = None if found is None or found.original is None else replace(found, before=found.original)
    return replace(run, before=run.original, losses=losses, accuracy_before=run.original_accuracy, published=scaled)


def on_published_scale(run: Run) -> Run:
    """The run with the diluted losses of the published evaluator, which must be known, in place of log-probabilities,
    so that its K and A are K_published and A_published."""
    found = run.published
    assert found is not None
    return replace(run, before=found.before, after=found.after, original=found.original)


def _original(path: Path) -> ProbeSeries | None:
    """The probes of the weights before resuscitation, if they were scored."""
    found = read_tables({0: path}) if path.is_file() else None
    if found is not None and not len(found.steps):
        raise ValueError(f"{path}: holds no probes")
    return found


def _losses(folder: Path, last: int, before: Mapping[int, Path]) -> dict[str, list[tuple[int, Values]]]:
    """Label -> (step, loss of each instance) of its oldest and its newest table up to a step, those of `before`
    included; labels that have no two tables of the same instances are left out."""
    found: dict[str, list[tuple[int, Values]]] = {}
    paths = {**table_paths(folder / "losses"), **before}
    for step in sorted(step for step in paths if step <= last):
        for label, of_label in _table_of_losses(paths[step]).items():
            oldest = found.setdefault(label, [(step, of_label)])
            if step > oldest[0][0] and len(of_label) == len(oldest[0][1]):
                oldest[1:] = [(step, of_label)]
    return {label: pair for label, pair in found.items() if len(pair) == 2}


@dataclass
class _Metrics:
    """What is read of metrics.jsonl, which may have millions of lines: never all of them at once."""

    evaluated: set[int] = field(default_factory=set)  # steps whose evaluation is complete
    injections: set[int] = field(default_factory=set)  # steps
    accuracy: dict[int, dict[str, float]] = field(default_factory=dict)  # step -> task -> accuracy
    original: dict[str, float] = field(default_factory=dict)  # task -> accuracy of the weights before resuscitation
    chance: dict[str, float] = field(default_factory=dict)  # task -> accuracy of guessing
    accuracies_not_finite: int = 0
    diluted: dict[int | str, dict[str, float]] = field(default_factory=dict)  # step or "original" -> label -> loss

    def add(self, line: dict[str, Any]) -> None:
        """One line. Of a step with several lines the last values count. Values that are no numbers are left out."""
        step = line["step"]
        if "eval/K" in line:
            self.evaluated.add(step)
        if "injection/round" in line:
            self.injections.add(step)
        for name, value in line.items():
            is_finite = isinstance(value, (int, float)) and math.isfinite(value)
            label = _DILUTED.fullmatch(name) if name.endswith("/CrossEntropyLoss") else None
            if label and is_finite:
                self.diluted.setdefault("original" if label[1] else step, {})[label[2]] = value
            found = _ACCURACY.fullmatch(name) if "/downstream/" in name else None
            if found and not is_finite:
                self.accuracies_not_finite += 1
            elif found:
                of_step = self.original if found[1] else self.accuracy.setdefault(step, {})
                (self.chance if found[3] == "chance" else of_step)[found[2]] = value


def accuracies_of(line: dict[str, Any]) -> dict[str, float]:
    """Task -> accuracy in one line of metrics of the weights that are trained."""
    found = ((_ACCURACY.fullmatch(name), value) for name, value in line.items())
    return {named[2]: value for named, value in found if named and not named[1] and named[3] != "chance"}


def _read_metrics(path: Path) -> _Metrics:
    metrics = _Metrics()
    for line in complete_lines(path):
        metrics.add(line)
    return metrics


def _configuration(folder: Path) -> dict[str, Any] | None:
    """config.yaml of a run, None without one. Raises ValueError where it is something else."""
    path = folder / "config.yaml"
    if not path.is_file():
        return None
    try:
        found = OmegaConf.to_container(OmegaConf.load(path))
    except Exception as error:  # PyYAML's errors and OmegaConf's have no base class in common
        raise ValueError(f"{path}: not YAML: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected keys and values at the top level")
    return {str(key): value for key, value in found.items()}


def _start(config: dict[str, Any] | None) -> tuple[int | None, int | None]:
    """`start` and `begins` of a run: the step in the name of the checkpoint in its configuration, and that or 0."""
    if config is None:
        return None, 0
    load_path = config.get("load_path")
    if load_path is None:
        return 0, 0
    step = step_of(str(load_path) if is_hub_id(str(load_path)) else Path(str(load_path)))
    start = step if step >= 0 else None
    return start, 0 if config.get("reset_trainer_state") else start


def _seed(config: dict[str, Any] | None) -> tuple[tuple[Any, Any] | None, str | None]:
    """`seed` and `settings` of a run."""
    if config is None:
        return None, None
    section = config.get("data")
    data = section if isinstance(section, dict) else {}
    rest = {key: value for key, value in config.items() if key not in _OF_ONE_RUN}
    rest["data"] = {key: value for key, value in data.items() if key != "seed"}
    return (config.get("seed"), data.get("seed")), json.dumps(rest, sort_keys=True, default=str)


def _tokens_per_step(config: dict[str, Any] | None) -> int | None:
    model = (config or {}).get("model")
    batch = (config or {}).get("global_train_batch_size")
    length = model.get("max_sequence_length") if isinstance(model, dict) else None
    return batch * length if isinstance(batch, int) and isinstance(length, int) and batch * length > 0 else None


def probing_steps(folder: Path) -> int | None:
    """The length of a run's probing windows in steps, from its config.yaml; None without them."""
    probing = (_configuration(folder) or {}).get("probing")
    steps = probing.get("steps") if isinstance(probing, dict) else None
    return steps if isinstance(steps, int) and steps > 0 else None


def _scored_before(scores: Path, folder: Path, config: Mapping[str, Any]) -> _Metrics:
    """The metrics of analysis.score for the checkpoint that a run of this configuration started from. Raises
    FileNotFoundError where `scores` holds none, ValueError where they are of other weights."""
    if not (scores / "score.json").is_file():
        raise FileNotFoundError(f"{scores}: no scores here (no score.json); analysis.score writes them")
    about = read_json(scores / "score.json")
    scored, started = Path(about["checkpoint"]["path"]), Path(str(config.get("load_path")))
    # A checkpoint may have been moved since, so two paths of one name differ only if both are there.
    moved = scored.name == started.name and not (scored.exists() and started.exists())
    if scored.resolve() != started.resolve() and not moved:
        raise ValueError(f"{scores}: scores of {scored}, but the run {folder} started from {started}")
    model = config.get("model")
    for key in EDITS:
        of_run = bool(model.get(key)) if isinstance(model, dict) else False
        if of_run != (about.get(key) is not None):
            words = ("without", "with") if of_run else ("with", "without")
            raise ValueError(f"{scores}: scored {words[0]} {key}, but the run {folder} started {words[1]} it")
    return _read_metrics(scores / "metrics.jsonl")


def read_run(folder: Path, before: Path | None = None) -> Run:
    """Read a run's folder; raises FileNotFoundError where it holds no run, ValueError without two evaluations.

    `before`: the folder of the scores (analysis.score) of the checkpoint that the run started from, for a run that was
    not evaluated before its first step.

    K is compared at the first evaluation and at the newest one of the same probes: evaluators may have different
    intervals, so the newest evaluation may hold only some of them. Losses and accuracies are the newest ones up to
    that: in the windows after injections only probes are evaluated.
    """
    if not (folder / "metrics.jsonl").is_file():
        raise FileNotFoundError(f"{folder}: no run here (no metrics.jsonl)")
    metrics, config = _read_metrics(folder / "metrics.jsonl"), _configuration(folder)
    start, begins = _start(config)
    probes_before: dict[int, Path] = {}
    losses_before: dict[int, Path] = {}
    if before is not None:
        at, scores = begins or 0, _scored_before(before, folder, config or {})
        if at in metrics.evaluated:
            raise ValueError(f"{folder}: was evaluated at step {at}, before training; leave out --before")
        metrics.evaluated.add(at)
        metrics.chance.update(scores.chance)
        for found in scores.accuracy.values():
            metrics.accuracy[at] = found
        for losses in scores.diluted.values():
            metrics.diluted[at] = losses
        for name, tables in (("probes", probes_before), ("losses", losses_before)):
            for path in table_paths(before / name).values():
                tables[at] = path
    probes = read_probes(folder, probes_before)
    # An evaluation is complete once its line is there, which is written after its tables.
    evaluated = [place for place, step in enumerate(probes.steps.tolist()) if step in metrics.evaluated]
    if len(evaluated) < 2:
        raise NotEvaluated(f"{folder}: {len(evaluated)} evaluation(s) with probes, before and after are needed")
    asked = ~np.isnan(probes.values)
    first, *later = evaluated
    last = next((place for place in reversed(later) if np.array_equal(asked[place], asked[first])), None)
    if last is None:
        lost = probes.not_finite.get(int(probes.steps[first]), 0)
        why = f"; {lost} of its log-probabilities are not finite numbers" if lost else ""
        raise NotEvaluated(f"{folder}: no evaluation after step {probes.steps[first]} has the same probes{why}")
    original = _original(folder / "probes" / "original.parquet")
    scaled = read_published(probes, first, last, original, metrics.diluted)
    first_step, step = int(probes.steps[first]), int(probes.steps[last])
    accuracy = {s: of_step for s, of_step in metrics.accuracy.items() if s <= step}
    accuracy_before = accuracy[min(accuracy)] if accuracy else {}
    comparable = [s for s in accuracy if s > min(accuracy) and accuracy_before.keys() <= accuracy[s].keys()]
    return Run(
        folder.name or folder.resolve().name,
        folder,
        start,
        begins,
        first_step,
        step,
        probes.knowledge(first),
        probes.knowledge(last),
        None if original is None else original.knowledge(0),
        _losses(folder, step, losses_before),
        _original_losses(folder),
        accuracy_before,
        accuracy[max(comparable)] if comparable else {},
        (min(accuracy), max(comparable)) if comparable else None,
        metrics.original,
        metrics.chance,
        metrics.accuracies_not_finite,
        # The last tables of a run that diverged may hold NaN only.
        [
            (int(s), probes.knowledge(place).means() | (scaled.curve.get(int(s), {}) if scaled else {}))
            for place, s in enumerate(probes.steps)
            if asked[place].any()
        ],
        sorted(metrics.injections),
        read_encounters(folder),
        probes,
        *_seed(config),
        scaled,
        _tokens_per_step(config),
    )
