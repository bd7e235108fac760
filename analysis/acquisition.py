"""What runs acquired and forgot (method section 4; paper, B.2, equations 4 and 5), from what they wrote.

    python -m analysis.acquisition RUN [RUN ...] [--output DIR]

K(theta): mean over entries of the mean over their probes of the target's log-probability. A and F in percent:
A = (K(after) - K(before)) / |K(before)|, positive when knowledge was acquired; F = -(P(after) - P(before)) / P(before),
positive when downstream accuracy was lost. Beside F: the rise of held-out losses. A run that started from
resuscitated weights gets A against these and against the original weights; only K(after) compares end states.
Intervals are 95 % percentile bootstrap intervals over entries (A, K) and instances (losses). Works on a run that
is still going: `after` is then its newest evaluation.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
from numpy.typing import NDArray

from olmo.exceptions import Parser, exit_status
from olmo.knowledge.entries import KINDS, SETTINGS

TASKS = ("sciq", "winogrande", "piqa", "openbook_qa", "hellaswag", "arc_easy")  # of P, paper B.2
RESAMPLES = 10_000
# 97.5 % quantiles of Student's t with 1, 2, ... degrees of freedom; beyond the last one they hardly fall.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval."""

    value: float
    low: float
    high: float

    def as_json(self) -> dict[str, float]:
        return {"value": self.value, "low": self.low, "high": self.high}


@dataclass(frozen=True)
class Knowledge:
    """l(p; theta) of one evaluation: per [setting, kind] its sum over each entry's probes (entries,), and how many
    probes these are. An entry may have more probes of one kind than of another; K weighs every probe alike."""

    sums: dict[tuple[str, str], Values]
    counts: dict[tuple[str, str], NDArray[np.int64]]

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


@dataclass(frozen=True)
class Run:
    """What a run's folder says about its first and its newest evaluation."""

    name: str
    first_step: int  # of the evaluation before
    step: int  # of the newest evaluation
    before: Knowledge
    after: Knowledge
    original: Knowledge | None  # the weights before resuscitation
    losses_before: dict[str, Values]  # label -> loss of each held-out instance
    losses_after: dict[str, Values]
    accuracy_before: dict[str, float]  # task -> accuracy
    accuracy_after: dict[str, float]
    chance: dict[str, float]
    curve: list[tuple[int, dict[str, float]]]  # (step, K metrics of that evaluation)
    injections: list[int]  # steps


# --- reading -----------------------------------------------------------------------------------------------------


def read_knowledge(path: Path) -> Knowledge:
    """One table of probes, as the trainer wrote it."""
    table = pyarrow.parquet.read_table(path, columns=["setting", "entry", "kind", "mean_log_prob"]).to_pydict()
    settings, kinds = np.array(table["setting"]), np.array(table["kind"])
    entries, values = np.array(table["entry"]), np.array(table["mean_log_prob"])
    sums: dict[tuple[str, str], Values] = {}
    counts: dict[tuple[str, str], NDArray[np.int64]] = {}
    for setting in SETTINGS:
        size = entries[settings == setting].max(initial=-1) + 1
        for kind in KINDS:
            chosen = (settings == setting) & (kinds == kind)
            if chosen.any():
                sums[setting, kind] = np.bincount(entries[chosen], values[chosen], size).astype(np.float64)
                counts[setting, kind] = np.bincount(entries[chosen], None, size)
    if not sums:
        raise ValueError(f"{path}: no probes in this table")
    return Knowledge(sums, counts)


def _read_losses(path: Path) -> dict[str, Values]:
    if not path.is_file():
        return {}
    table = pyarrow.parquet.read_table(path, columns=["label", "loss"]).to_pydict()
    labels, losses = np.array(table["label"]), np.array(table["loss"])
    return {label: losses[labels == label] for label in dict.fromkeys(table["label"])}


def _downstream(lines: list[dict[str, Any]], step: int) -> tuple[dict[str, float], dict[str, float]]:
    """({task: accuracy}, {task: chance}) of the evaluation at a step."""
    accuracy: dict[str, float] = {}
    chance: dict[str, float] = {}
    for line in lines:
        for name, value in line.items():
            found = re.fullmatch(r"eval/downstream/(\w+?)_(acc|len_norm|pmi_dc|f1|chance)", name)
            if found and line["step"] == step:
                (chance if found[2] == "chance" else accuracy)[found[1]] = value
    return accuracy, chance


def read_run(folder: Path) -> Run:
    """Read a run's folder; ValueError where it has no two evaluations with probes."""
    metrics = folder / "metrics.jsonl"
    if not metrics.is_file():
        raise FileNotFoundError(f"{folder}: no run here (no metrics.jsonl)")
    # The last line of a run that is still going may be half written.
    complete = [x for x in metrics.read_text(encoding="utf-8").splitlines(keepends=True) if x.endswith("\n")]
    lines = [json.loads(x) for x in complete]
    # An evaluation is whole once its line, written after its tables, is there.
    whole = {line["step"] for line in lines if "eval/K" in line}
    found = {int(p.stem.removeprefix("step")): p for p in folder.glob("probes/step*.parquet")}
    tables = {step: path for step, path in found.items() if step in whole}
    if len(tables) < 2:
        raise ValueError(f"{folder}: {len(tables)} evaluation(s) with probes, before and after are needed")
    first, *later = sorted(tables)
    before = read_knowledge(tables[first])
    # Evaluators of different intervals: the newest evaluation may hold only some of the probes.
    for last in reversed(later):
        after = read_knowledge(tables[last])
        if after.same_probes(before):
            break
    else:
        raise ValueError(f"{folder}: no evaluation after step {first} has the same probes")
    original = folder / "probes" / "original.parquet"
    losses_before, losses_after = (_read_losses(folder / "losses" / f"step{step}.parquet") for step in (first, last))
    both = [label for label, losses in losses_before.items() if len(losses_after.get(label, ())) == len(losses)]
    accuracy_before, chance = _downstream(lines, first)
    return Run(
        folder.name,
        first,
        last,
        before,
        after,
        read_knowledge(original) if original.is_file() else None,
        {label: losses_before[label] for label in both},
        {label: losses_after[label] for label in both},
        accuracy_before,
        _downstream(lines, last)[0],
        chance,
        [
            (line["step"], {k.removeprefix("eval/"): v for k, v in line.items() if k.startswith("eval/K")})
            for line in lines
            if "eval/K" in line
        ],
        [line["step"] for line in lines if "injection/round" in line],
    )


# --- estimates ---------------------------------------------------------------------------------------------------


def percent_change(before: Any, after: Any) -> Any:
    """100 (after - before) / |before|."""
    return 100 * (after - before) / np.abs(before)


def bootstrap(
    columns: Sequence[Values], statistic: Callable[..., Any], strata: Sequence[int] = (), seed: int = 0
) -> Estimate:
    """Estimate of a statistic of the means of `columns`, resampling what they have in common.

    columns: arrays (seeds, n), all of one shape: values of the same n entries (or instances) under several
    conditions. Entries are drawn with replacement, within strata of the given sizes, the same draw for every
    condition and seed. statistic: takes one mean a column (float64, vectorised). With several seeds the interval is
    widened by what they differ by (`widen`).
    """
    stacked = np.stack(columns)  # (conditions, seeds, n)
    over_seeds, count = stacked.mean(axis=1), stacked.shape[2]
    sizes = list(strata) or [count]
    assert sum(sizes) == count
    generator = np.random.default_rng(seed)
    found = []
    block = max(1, 2_000_000 // count)  # resamples at a time, to bound memory
    for start in range(0, RESAMPLES, block):
        number = min(block, RESAMPLES - start)
        draws = [generator.multinomial(size, np.full(size, 1 / size), number) for size in sizes]
        found.append(statistic(*(over_seeds @ (np.concatenate(draws, axis=1) / count).T)))
    low, high = np.quantile(np.concatenate(found), [0.025, 0.975])
    estimate = Estimate(float(statistic(*over_seeds.mean(axis=1))), float(low), float(high))
    return widen(estimate, np.array([statistic(*stacked[:, s].mean(axis=1)) for s in range(stacked.shape[1])]))


def widen(estimate: Estimate, per_seed: Values) -> Estimate:
    """Add the uncertainty of a mean over few seeds to an interval, in quadrature.

    per_seed: the estimate of every seed (seeds,). Its part is Student's t with seeds - 1 degrees of freedom times the
    standard error of their mean; a single seed tells nothing of it and leaves the interval as it is.
    """
    seeds = len(per_seed)
    if seeds < 2:
        return estimate
    half = STUDENT[min(seeds - 2, len(STUDENT) - 1)] * float(np.std(per_seed, ddof=1)) / math.sqrt(seeds)
    below, above = math.hypot(estimate.value - estimate.low, half), math.hypot(estimate.high - estimate.value, half)
    return Estimate(estimate.value, estimate.value - below, estimate.value + above)


def acquired(runs: Sequence[Run], setting: str | None = None, kind: str | None = None) -> Estimate:
    """A in percent against the weights that training started from, over runs that differ in their seed only."""
    before, after = ([getattr(r, n).entries(setting, kind) for r in runs] for n in ("before", "after"))
    return bootstrap([np.stack(before), np.stack(after)], percent_change, strata(runs[0], setting, kind))


def acquired_against_original(runs: Sequence[Run]) -> Estimate | None:
    """A in percent against the weights before resuscitation; None where nothing was resuscitated."""
    originals = [r.original for r in runs if r.original is not None]
    if len(originals) != len(runs):
        return None
    columns = [np.stack([o.entries() for o in originals]), np.stack([r.after.entries() for r in runs])]
    return bootstrap(columns, percent_change, strata(runs[0]))


def strata(run: Run, setting: str | None = None, kind: str | None = None) -> list[int]:
    """Numbers of entries of the settings that a run probes, with probes of one kind or any."""
    probed = {s for s, k in run.before.sums if setting in (None, s) and kind in (None, k)}
    return [len(run.before.entries(s, kind)) for s in SETTINGS if s in probed]


def loss_rise(runs: Sequence[Run], label: str) -> Estimate:
    """Rise of a held-out loss in percent: forgetting, where the label's text is what came before."""
    columns = [np.stack([getattr(r, n)[label] for r in runs]) for n in ("losses_before", "losses_after")]
    return bootstrap(columns, percent_change)


def forgotten(run: Run) -> dict[str, float] | None:
    """P before and after and F in percent over the tasks of the paper; None where the run has not all of them."""
    if not all(t in run.accuracy_before and t in run.accuracy_after for t in TASKS):
        return None
    before, after = (float(np.mean([a[t] for t in TASKS])) for a in (run.accuracy_before, run.accuracy_after))
    chance = float(np.mean([run.chance[t] for t in TASKS])) if all(t in run.chance for t in TASKS) else float("nan")
    return {"P_before": before, "P_after": after, "P_chance": chance, "F": -percent_change(before, after)}


def compare(one: Sequence[Run], other: Sequence[Run]) -> dict[str, Estimate]:
    """`other` minus `one`, paired over their common entries: A in points, and K(after)."""
    for run in (*one, *other):
        if not run.before.same_probes(one[0].before):
            raise ValueError(f"{one[0].name} and {run.name} were probed with different entries")
    columns = [np.stack([getattr(r, n).entries() for r in runs]) for runs in (one, other) for n in ("before", "after")]

    def difference_of_a(before: Any, after: Any, other_before: Any, other_after: Any) -> Any:
        return percent_change(other_before, other_after) - percent_change(before, after)

    def difference_of_k(before: Any, after: Any, other_before: Any, other_after: Any) -> Any:
        return other_after - after

    sizes = strata(one[0])
    return {
        "A": bootstrap(columns, difference_of_a, sizes),
        "K_after": bootstrap(columns, difference_of_k, sizes),
    }


def compare_loss_rise(one: Sequence[Run], other: Sequence[Run], label: str) -> Estimate:
    """`other` minus `one`: rise of a held-out loss in points, paired over instances."""
    columns = [
        np.stack([getattr(r, n)[label] for r in runs])
        for runs in (one, other)
        for n in ("losses_before", "losses_after")
    ]
    return bootstrap(columns, lambda a, b, c, d: percent_change(c, d) - percent_change(a, b))


def compare_loss_after(one: Sequence[Run], other: Sequence[Run], label: str) -> Estimate:
    """Held-out loss after training, `other` minus `one`, in percent of the loss from which `one` started; paired over
    instances. Unlike the rise of each from its own start, it does not favour a start that an edit made worse."""
    columns = [
        np.stack([values[label] for values in group])
        for group in (
            [r.losses_before for r in one],
            [r.losses_after for r in one],
            [r.losses_after for r in other],
        )
    ]
    return bootstrap(columns, lambda before, after, other_after: 100 * (other_after - after) / before)


def summarise(run: Run) -> dict[str, Any]:
    """Everything above for one run, ready for JSON."""
    settings = [s for s in SETTINGS if any(key[0] == s for key in run.before.sums)]
    kinds = [k for k in KINDS if any(key[1] == k for key in run.before.sums)]
    against_original = acquired_against_original([run])
    return {
        "run": run.name,
        "first_step": run.first_step,
        "step": run.step,
        "K_before": float(run.before.entries().mean()),
        "K_after": float(run.after.entries().mean()),
        "K_original": None if run.original is None else float(run.original.entries().mean()),
        "A": acquired([run]).as_json(),
        "A_against_original": None if against_original is None else against_original.as_json(),
        "A_by_setting": {s: acquired([run], s).as_json() for s in settings},
        "A_by_kind": {k: acquired([run], None, k).as_json() for k in kinds},
        "loss_rise": {label: loss_rise([run], label).as_json() for label in run.losses_before},
        "downstream": forgotten(run),
        "accuracy_before": run.accuracy_before,
        "accuracy_after": run.accuracy_after,
        "chance": run.chance,
        "curve": [{"step": step, **values} for step, values in run.curve],
        "injections": run.injections,
    }


# --- command -----------------------------------------------------------------------------------------------------


def table(summaries: Sequence[dict[str, Any]]) -> str:
    """A line a run."""
    width = max(len(s["run"]) for s in summaries)
    lines = [f"{'run':{width}}  K before   K after   A %  [95 %]             held-out loss rise %, F %"]
    for s in summaries:
        a, rises = s["A"], ", ".join(f"{k} {v['value']:+.2f}" for k, v in s["loss_rise"].items())
        f = "" if s["downstream"] is None else f", F {s['downstream']['F']:+.2f}"
        lines.append(
            f"{s['run']:{width}}  {s['K_before']:8.4f}  {s['K_after']:8.4f}  {a['value']:+5.2f} "
            f"[{a['low']:+.2f}, {a['high']:+.2f}]   {rises}{f}"
        )
    return "\n".join(lines)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        prog="python -m analysis.acquisition", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="save_folder of a training run")
    parser.add_argument("--output", type=Path, help="folder for acquisition.json and the figures")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> None:
    args = _parse(argv)
    runs = [read_run(folder) for folder in args.runs]
    if len({run.name for run in runs}) < len(runs):  # runs of several seeds, say, in folders of one name
        runs = [replace(run, name=str(folder)) for run, folder in zip(runs, args.runs)]
    summaries = [summarise(run) for run in runs]
    print(table(summaries))
    for run in runs:
        if run.first_step > 0:
            print(f"note: {run.name} was first evaluated at step {run.first_step}; eval_on_load gives the start itself")
    comparisons = []
    for run in runs[1:]:
        found = compare(runs[:1], [run])
        comparisons.append({"from": runs[0].name, "to": run.name, **{k: e.as_json() for k, e in found.items()}})
        a = found["A"]
        print(f"{run.name} minus {runs[0].name}: A {a.value:+.2f} points [{a.low:+.2f}, {a.high:+.2f}]")
    if args.output is not None:
        from analysis.figures import save_acquisition

        args.output.mkdir(parents=True, exist_ok=True)
        result = {"runs": summaries, "comparisons": comparisons, "resamples": RESAMPLES}
        partial = args.output / ".acquisition.json.partial"
        partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        partial.replace(args.output / "acquisition.json")
        save_acquisition(result, args.output)


if __name__ == "__main__":
    sys.exit(exit_status(main))
