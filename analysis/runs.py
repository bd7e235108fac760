"""What a run wrote, read from its folder; also from that of a run that is still going."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from numpy.typing import NDArray
from omegaconf import OmegaConf

from analysis.estimates import Values
from analysis.locations import step_of
from olmo.checkpoint import is_hub_id
from olmo.knowledge.entries import KINDS, SETTINGS

TASKS = ("sciq", "winogrande", "piqa", "openbook_qa", "hellaswag", "arc_easy")  # of P, paper B.2

Entry = tuple[str, int]  # setting, number
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Knowledge:
    """l(p; theta) of one evaluation: per [setting, kind] its sum over each entry's probes (entries,), and how many
    probes these are. An entry may have more probes of one kind than of another; K weighs every probe alike."""

    sums: dict[tuple[str, str], Values]
    counts: dict[tuple[str, str], Integers]

    @classmethod
    def of(cls, settings: NDArray, entries: NDArray, kinds: NDArray, values: NDArray) -> Knowledge:
        """From one row a probe."""
        sums: dict[tuple[str, str], Values] = {}
        counts: dict[tuple[str, str], Integers] = {}
        for setting in SETTINGS:
            size = entries[settings == setting].max(initial=-1) + 1
            for kind in KINDS:
                chosen = (settings == setting) & (kinds == kind)
                if chosen.any():
                    sums[setting, kind] = np.bincount(entries[chosen], values[chosen], size).astype(np.float64)
                    counts[setting, kind] = np.bincount(entries[chosen], None, size)
        return cls(sums, counts)

    def entries(self, setting: str | None = None, kind: str | None = None) -> Values:
        """Means of the entries (n,) of one setting or all, over the probes of one kind or all."""
        found = []
        for name in SETTINGS if setting is None else (setting,):
            keys = [(name, k) for k in ((kind,) if kind else KINDS) if (name, k) in self.sums]
            if keys:
                total = np.sum([self.sums[k] for k in keys], axis=0)
                count = np.sum([self.counts[k] for k in keys], axis=0)
                found.append(total[count > 0] / count[count > 0])
        if not found:
            raise ValueError(f"no probes of setting {setting or 'any'} and kind {kind or 'any'}")
        return np.concatenate(found)

    def same_probes(self, other: Knowledge) -> bool:
        """Whether both have the same numbers of probes of the same entries, settings and kinds."""
        return self.counts.keys() == other.counts.keys() and all(
            np.array_equal(self.counts[key], other.counts[key]) for key in self.counts
        )

    def means(self) -> dict[str, float]:
        """K, K_{setting} and K_{setting}_{kind}, as far as there are probes."""
        settings = dict.fromkeys(setting for setting, _ in self.sums)
        return {
            "K": float(self.entries().mean()),
            **{f"K_{s}": float(self.entries(s).mean()) for s in settings},
            **{f"K_{s}_{k}": float(self.entries(s, k).mean()) for s, k in self.sums},
        }


@dataclass(frozen=True)
class ProbeSeries:
    """l(p; theta) of all Q probes of a run in all of its T tables, settings one after the other, entries in order."""

    steps: Integers  # (T,) ascending, optimizer steps done
    settings: NDArray[np.str_]  # (Q,)
    entries: Integers  # (Q,)
    kinds: NDArray[np.str_]  # (Q,)
    values: Values  # (T, Q), NaN where a table lacks the probe

    def same(self, other: ProbeSeries) -> bool:
        """Whether both are of the same probes."""
        names = ("settings", "entries", "kinds")
        return all(np.array_equal(getattr(self, name), getattr(other, name)) for name in names)

    def knowledge(self, place: int) -> Knowledge:
        """Of the table at a place among the steps."""
        there = ~np.isnan(self.values[place])
        columns = (self.settings, self.entries, self.kinds, self.values[place])
        return Knowledge.of(*(column[there] for column in columns))


@dataclass(frozen=True)
class Run:
    """What a run's folder says: its first evaluation, its newest one, and everything between."""

    name: str
    start: int | None  # pretraining step of the checkpoint it started from, 0 for new weights; None: not known
    begins: int | None  # its own step there: 0 unless it counts on from the checkpoint's; None: not known
    first_step: int  # of the evaluation before
    step: int  # of the newest evaluation of all those probes
    before: Knowledge
    after: Knowledge
    original: Knowledge | None  # the weights before resuscitation
    losses_before: dict[str, Values]  # label -> loss of each held-out instance
    losses_after: dict[str, Values]
    loss_steps: dict[str, tuple[int, int]]  # label -> steps before and after
    accuracy_before: dict[str, float]  # task -> accuracy
    accuracy_after: dict[str, float]
    accuracy_steps: tuple[int, int] | None  # steps before and after
    chance: dict[str, float]
    curve: list[tuple[int, dict[str, float]]]  # (step, `Knowledge.means`) of every table
    injections: list[int]  # steps
    encounters: dict[Entry, list[int]] | None  # entry -> steps whose batch held it; None: the run did not log it
    probes: ProbeSeries


def _table_of_probes(path: Path) -> tuple[pyarrow.Table, Values]:
    """(setting, entry, kind and index of each row, mean_log_prob of each row)."""
    names = ["setting", "entry", "kind", "index"]
    try:
        table = pyarrow.parquet.read_table(path, columns=[*names, "mean_log_prob"])
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: not a table of probes: {error}") from error
    return table.select(names), table["mean_log_prob"].to_numpy().astype(np.float64)


def read_knowledge(path: Path) -> Knowledge:
    """One table of probes, as the trainer wrote it."""
    keys, values = _table_of_probes(path)
    settings, entries, kinds = (np.array(keys[name].to_pylist()) for name in ("setting", "entry", "kind"))
    return Knowledge.of(settings, entries, kinds, values)


def read_probes(folder: Path) -> ProbeSeries:
    """All tables of probes of a run; paragraphs are no probes."""
    # A table gets its name when it is whole.
    paths = {int(path.stem.removeprefix("step")): path for path in folder.glob("probes/step*.parquet")}
    place_of: dict[tuple[str, int, str, int], int] = {}  # probe -> its number in the order in which they turn up
    found: list[tuple[int, Integers, Values]] = []  # step, numbers of its probes, their values
    keys, chosen, numbers = None, np.zeros(0, dtype=bool), np.zeros(0, dtype=np.int64)
    for step in sorted(paths):
        of_table, values = _table_of_probes(paths[step])
        if keys is None or not of_table.equals(keys):  # hardly ever but for the first
            keys = of_table
            rows = list(zip(*(of_table[name].to_pylist() for name in ("setting", "entry", "kind", "index"))))
            chosen = np.array([row[0] in SETTINGS and row[2] in KINDS for row in rows], dtype=bool)
            asked = [row for row, is_chosen in zip(rows, chosen) if is_chosen]
            numbers = np.array([place_of.setdefault(row, len(place_of)) for row in asked], dtype=np.int64)
        if len(numbers):
            found.append((step, numbers, values[chosen]))
    probes = list(place_of)
    kinds = list(KINDS)
    order = sorted(
        range(len(probes)),
        key=lambda i: (SETTINGS.index(probes[i][0]), probes[i][1], kinds.index(probes[i][2]), probes[i][3]),
    )
    values = np.full((len(found), len(probes)), np.nan)
    for row, (_, columns, scores) in enumerate(found):
        values[row, columns] = scores
    return ProbeSeries(
        np.array([step for step, _, _ in found], dtype=np.int64),
        np.array([probes[i][0] for i in order]),
        np.array([probes[i][1] for i in order], dtype=np.int64),
        np.array([probes[i][2] for i in order]),
        values[:, order],
    )


def _whole_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file of one a line. The last line of a run that is still going may be half written."""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(keepends=True), start=1):
        if line.endswith("\n"):
            try:
                found = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}: line {number} is not JSON: {error}") from error
            if not isinstance(found, dict) or not isinstance(found.get("step"), int):
                raise ValueError(f"{path}: line {number} is no object with a step")
            yield found


def read_encounters(folder: Path) -> dict[Entry, list[int]] | None:
    """Entry -> ascending steps whose batch held one of its texts, from injections.jsonl; None where there is none.

    Texts of a published injection map that belong to no known entry are left out.
    """
    path = folder / "injections.jsonl"
    if not path.is_file():
        return None
    found: dict[Entry, set[int]] = {}
    for line in _whole_lines(path):
        for text in line.get("texts", ()):
            named = re.fullmatch(r"(\w+)/(\d+)", text["entry"])
            if named and named[1] in SETTINGS:
                found.setdefault((named[1], int(named[2])), set()).add(line["step"])
    return {entry: sorted(steps) for entry, steps in found.items()}


def _losses(folder: Path, last: int) -> dict[str, list[tuple[int, Values]]]:
    """Label -> (step, loss of each instance) of its oldest and newest table up to a step, where these are two of the
    same instances."""
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
    """`start` and `begins` of a run: the step in the name of the checkpoint that config.yaml names, and whether the run
    counts on from it."""
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
    """How many steps of a run's probing windows were probed, by its config.yaml; None where it had none."""
    path = folder / "config.yaml"
    return OmegaConf.select(OmegaConf.load(path), "probing.steps") if path.is_file() else None


def read_run(folder: Path) -> Run:
    """Read a run's folder; ValueError where it has no two evaluations with probes.

    K is compared at the first evaluation and at the newest one of the same probes: evaluators may have different
    intervals, so a newest evaluation may hold only some of them. Losses and accuracies after are the newest ones
    not later than that: in the windows after injections only probes are evaluated.
    """
    metrics = folder / "metrics.jsonl"
    if not metrics.is_file():
        raise FileNotFoundError(f"{folder}: no run here (no metrics.jsonl)")
    lines = list(_whole_lines(metrics))
    # An evaluation is whole once its line, written after its tables, is there.
    whole = {line["step"] for line in lines if "eval/K" in line}
    probes = read_probes(folder)
    evaluated = [place for place, step in enumerate(probes.steps.tolist()) if step in whole]
    if len(evaluated) < 2:
        raise ValueError(f"{folder}: {len(evaluated)} evaluation(s) with probes, before and after are needed")
    asked = ~np.isnan(probes.values)
    first, *later = evaluated
    last = next((place for place in reversed(later) if np.array_equal(asked[place], asked[first])), None)
    if last is None:
        raise ValueError(f"{folder}: no evaluation after step {probes.steps[first]} has the same probes")
    first_step, step = int(probes.steps[first]), int(probes.steps[last])
    losses = _losses(folder, step)
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
        {label: before for label, ((_, before), _) in losses.items()},
        {label: after for label, (_, (_, after)) in losses.items()},
        {label: (pair[0][0], pair[1][0]) for label, pair in losses.items()},
        accuracy_before,
        accuracy[max(comparable)] if comparable else {},
        (min(accuracy), max(comparable)) if comparable else None,
        chance,
        # Of a run that diverged, the last tables may hold no number.
        [(int(s), probes.knowledge(place).means()) for place, s in enumerate(probes.steps) if asked[place].any()],
        [line["step"] for line in lines if "injection/round" in line],
        read_encounters(folder),
        probes,
    )
