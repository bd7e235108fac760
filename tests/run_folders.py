"""Folders of runs with numbers of our choice, in the formats that the trainer writes (formats.md, section 5)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas
from numpy.typing import NDArray

from analysis.probes import Knowledge
from analysis.runs import Run

KINDS = ("memorization", "semantic", "composition")
TASKS = ("sciq", "winogrande", "piqa", "openbook_qa", "hellaswag", "arc_easy")  # of P

# One number an entry, of different sizes so that weighing the settings alike would give another K.
BEFORE = {"paraphrase": [-4.0, -5.0, -7.0], "once": [-6.0, -9.0, -3.0, -5.0, -8.0]}
AFTER = {"paraphrase": [-2.0, -1.5, -3.0], "once": [-5.5, -8.0, -3.5, -5.0, -6.0]}


def probe_table(
    levels: Mapping[str, Sequence[float] | NDArray], per_kind: int = 5, spread: float = 0.0, seed: int = 0
) -> pandas.DataFrame:
    """Probes of each setting's entries: `levels[setting]` is the log-probability of each entry, `spread` the standard
    deviation of its probes around it. Target spans of 1 to 4 tokens, in padded batches of 20 to 60."""
    generator = np.random.default_rng(seed)
    rows = [
        (setting, entry, kind, index, level + spread * generator.normal(), int(generator.integers(1, 5)))
        for setting, entries in levels.items()
        for entry, level in enumerate(entries)
        for kind in KINDS
        for index in range(per_kind)
    ]
    table = pandas.DataFrame(rows, columns=["setting", "entry", "kind", "index", "mean_log_prob", "tokens"])
    positions = np.random.default_rng(len(rows)).integers(20, 60, len(rows))
    return table.assign(sum_log_prob=table.mean_log_prob * table.tokens, positions=positions)


def direct_k(table: pandas.DataFrame) -> float:
    """K of method.md, section 4, with the weights written out."""
    total, weights = 0.0, 0
    for _, of_setting in table.groupby("setting"):
        entries = of_setting.entry.nunique()
        k_of_setting = of_setting.groupby("entry").mean_log_prob.mean().mean()
        total, weights = total + entries * k_of_setting, weights + entries
    return total / weights


def label_losses(table: pandas.DataFrame) -> dict[str, float]:
    """CrossEntropyLoss of each label, as the evaluator logs it: a mean over probes, whatever their batches."""
    found = {}
    for (setting, kind), rows in table.groupby(["setting", "kind"]):
        found[f"{setting}_{kind}"] = -sum(s / n for s, n in zip(rows.sum_log_prob, rows.positions)) / len(rows)
    return found


def direct_k_published(table: pandas.DataFrame, settings: Sequence[str] = (), kinds: Sequence[str] = KINDS) -> float:
    """K_published with the weights written out."""
    losses, settings = label_losses(table), settings or table.setting.unique().tolist()
    of_settings = [sum(losses[f"{s}_{kind}"] for kind in kinds) / len(kinds) for s in settings]
    weights = [table[table.setting == s].entry.nunique() for s in settings]
    return -sum(w * loss for w, loss in zip(weights, of_settings)) / sum(weights)


def write_run(
    folder: Path,
    evaluations: Mapping[int, pandas.DataFrame],
    losses: Mapping[int, Mapping[str, Sequence[float] | NDArray]] | None = None,
    accuracy: Mapping[int, Mapping[str, float]] | None = None,
    original: pandas.DataFrame | None = None,
    injections: Sequence[int] = (),
    original_losses: Mapping[str, Sequence[float] | NDArray] | None = None,
    original_accuracy: Mapping[str, float] | None = None,
) -> Path:
    """A run's folder: probes, losses of held-out instances and accuracies by step; chance is 0.25 in every task.
    `original`: of the weights before resuscitation."""
    (folder / "probes").mkdir(parents=True)
    (folder / "losses").mkdir()
    lines: list[dict] = [{"step": step, "injection/round": i + 1.0} for i, step in enumerate(injections)]
    for step, table in evaluations.items():
        table.assign(step=step).to_parquet(folder / "probes" / f"step{step}.parquet")
        line = {"step": step, "eval/K": direct_k(table)}
        line.update({f"eval/K_{s}": direct_k(part) for s, part in table.groupby("setting")})
        line.update(_accuracies((accuracy or {}).get(step, {})))
        lines.append(line)
    if original_accuracy:
        lines.append({"step": 0, **{f"original/{k}": v for k, v in _accuracies(original_accuracy).items()}})
    tables = {f"step{step}": by_label for step, by_label in (losses or {}).items()}
    for stem, by_label in {**tables, **({"original": original_losses} if original_losses else {})}.items():
        rows = [(label, i, float(v)) for label, values in by_label.items() for i, v in enumerate(values)]
        table = pandas.DataFrame(rows, columns=["label", "instance", "loss"])
        table.assign(step=0).to_parquet(folder / "losses" / f"{stem}.parquet")
    if original is not None:
        original.assign(step=0).to_parquet(folder / "probes" / "original.parquet")
    lines.sort(key=lambda line: line["step"])
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def _accuracies(of_tasks: Mapping[str, float]) -> dict[str, float]:
    """As metrics of metrics.jsonl."""
    found = {}
    for task, value in of_tasks.items():
        metric = "len_norm" if task in ("piqa", "hellaswag", "openbook_qa") else "acc"
        found |= {f"eval/downstream/{task}_{metric}": value, f"eval/downstream/{task}_chance": 0.25}
    return found


def run_in_memory(
    before: Mapping[str, Sequence[float] | NDArray], after: Mapping[str, Sequence[float] | NDArray], **extra: Any
) -> Run:
    """A Run without a folder: every entry of a setting has one probe, with this log-probability."""

    def knowledge(levels: Mapping[str, Sequence[float] | NDArray]) -> Knowledge:
        sums = {(s, "semantic"): np.asarray(values, np.float64) for s, values in levels.items()}
        return Knowledge(sums, {key: np.ones(len(values), np.int64) for key, values in sums.items()})

    known = {field.name for field in fields(Run)}
    given = {"name": "run", "folder": Path("run"), "before": knowledge(before), "after": knowledge(after), **extra}
    assert given.keys() <= known
    return Run(**{name: given.get(name) for name in known})


def write_injections(folder: Path, rounds: Mapping[int, Sequence[str]]) -> None:
    """injections.jsonl of a run: the names of the entries that entered, by step."""
    lines = [
        {
            "step": step,
            "round": number,
            "tokens": 8 * len(names),
            "texts": [{"entry": name, "row": row, "tokens": 8} for row, name in enumerate(names)],
        }
        for number, (step, names) in enumerate(sorted(rounds.items()), start=1)
    ]
    (folder / "injections.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
