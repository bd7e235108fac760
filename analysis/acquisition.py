"""What runs acquired and forgot (method section 4; paper, B.2, equations 4 and 5), from what they wrote.

    python -m analysis.acquisition RUN [RUN ...] [--output DIR]
    python -m analysis.acquisition DIR/acquisition.json [--output DIR]      table and figures anew

K(theta): mean over entries of the mean over their probes of the target's log-probability. A and F in percent:
A = (K(after) - K(before)) / |K(before)|, positive when knowledge was acquired; F = -(P(after) - P(before)) / P(before),
positive when downstream accuracy was lost. P: mean accuracy over six tasks. Beside F: the rise of held-out losses. A
run that started from resuscitated weights gets A against these and against the original weights; only K(after)
compares end states. From probes scored around injections (probing windows) also Chang et al.'s effectivity,
retainability and decay constant a, positive when knowledge decays: analysis/dynamics.py.

Intervals are 95 % percentile bootstrap intervals over entries (K, A, effectivity, a), instances (losses) and tasks (P,
F); further runs are compared with the first one on the same draws. Of six tasks an interval is rough, and tells what
another choice of tasks might give, not what other questions would.

Works on a run that is still going: `after` is then its newest evaluation of all probes, and losses and accuracies are
the newest ones up to it.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from analysis import dynamics, estimates
from analysis.dynamics import Dynamics
from analysis.locations import check_writable
from analysis.outcomes import (
    acquired,
    acquired_against_original,
    compare,
    compare_forgotten,
    compare_loss_rise,
    forgotten,
    knowledge,
    loss_rise,
)
from analysis.runs import Run, probing_steps, read_run
from olmo.exceptions import ConfigurationError, Parser, exit_status
from olmo.knowledge.entries import KINDS, SETTINGS

RESULT = "acquisition.json"


# --- everything, ready for JSON ----------------------------------------------------------------------------------


def measure(run: Run, options: dynamics.Options) -> Dynamics | None:
    """None where the run did not log what it injected, or injected nothing that it probes."""
    found = dynamics.measure(run.probes, run.encounters or {}, options)
    return found if found.injected.any() else None


def summarise(run: Run, measured: Dynamics | None = None) -> dict[str, Any]:
    """Everything about one run."""
    settings = [s for s in SETTINGS if any(key[0] == s for key in run.before.sums)]
    kinds = [k for k in KINDS if any(key[1] == k for key in run.before.sums)]
    against_original = acquired_against_original([run])
    return {
        "run": run.name,
        "start": run.start,
        "begins": run.begins,
        "first_step": run.first_step,
        "step": run.step,
        "K_before": knowledge(run, "before").as_json(),
        "K_after": knowledge(run, "after").as_json(),
        "K_original": None if run.original is None else float(run.original.entries().mean()),
        "A": acquired([run]).as_json(),
        "A_against_original": None if against_original is None else against_original.as_json(),
        "A_by_setting": {s: acquired([run], s).as_json() for s in settings},
        "A_by_kind": {k: acquired([run], None, k).as_json() for k in kinds},
        "by_setting_and_kind": {
            f"{s}_{k}": {
                "K_before": knowledge(run, "before", s, k).as_json(),
                "K_after": knowledge(run, "after", s, k).as_json(),
                "A": acquired([run], s, k).as_json(),
            }
            for s, k in run.before.sums
        },
        "loss_rise": {label: loss_rise([run], label).as_json() for label in run.losses_before},
        "loss_steps": {label: list(steps) for label, steps in run.loss_steps.items()},
        "downstream": forgotten([run]),
        "downstream_steps": None if run.accuracy_steps is None else list(run.accuracy_steps),
        "accuracy_before": run.accuracy_before,
        "accuracy_after": run.accuracy_after,
        "chance": run.chance,
        "curve": [{"step": step, **values} for step, values in run.curve],
        "injections": run.injections,
        "injections_logged": run.encounters is not None,
        "dynamics": None if measured is None else dynamics.summarise(measured),
    }


def comparison(one: Run, other: Run, first: Dynamics | None, second: Dynamics | None) -> dict[str, Any]:
    """Paired differences, `other` minus `one`, of all that both have."""
    f = compare_forgotten([one], [other])
    labels = [k for k in one.losses_before if len(other.losses_before.get(k, ())) == len(one.losses_before[k])]
    both = first is not None and second is not None and first.probes.same(second.probes)
    return {
        "from": one.name,
        "to": other.name,
        **{name: found.as_json() for name, found in compare([one], [other]).items()},
        "by_setting_and_kind": {
            f"{s}_{k}": {name: found.as_json() for name, found in compare([one], [other], s, k).items()}
            for s, k in one.before.sums
        },
        "F": None if f is None else f.as_json(),
        "loss_rise": {label: compare_loss_rise([one], [other], label).as_json() for label in labels},
        "dynamics": dynamics.compare(first, second) if both and first and second else None,
    }


# --- table -------------------------------------------------------------------------------------------------------


def rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The table's numbers, a row a run, an estimate as three columns; None where a run has not got it."""
    labels = dict.fromkeys(label for run in result["runs"] for label in run["loss_rise"])
    found = []
    for run in result["runs"]:
        downstream, of_all = run["downstream"] or {}, ((run["dynamics"] or {}).get("groups") or {}).get("all") or {}
        named = {
            "K_before": run["K_before"],
            "K_after": run["K_after"],
            "A": run["A"],
            "A_against_original": run["A_against_original"],
            **{key: downstream.get(key) for key in ("P_before", "P_after", "F")},
            "effectivity": of_all.get("effectivity"),
            "a": (of_all.get("decay") or {}).get("a"),
            **{f"rise of {label}": run["loss_rise"].get(label) for label in labels},
        }
        row: dict[str, Any] = {"run": run["run"], "start": run["start"], "step": run["step"]}
        for name, estimate in named.items():
            for part, suffix in (("value", ""), ("low", " low"), ("high", " high")):
                row[name + suffix] = None if estimate is None else estimate[part]
        found.append(row)
    return found


def table(result: dict[str, Any]) -> str:
    """A line a run; what no run has is left out."""
    found = rows(result)
    shown = {  # column -> (head, digits, with its interval)
        "K_before": ("K before", 4, False),
        "K_after": ("K after", 4, False),
        "A": ("A %", 2, True),
        "A_against_original": ("A % of original", 2, True),
        "P_before": ("P before", 4, False),
        "P_after": ("P after", 4, False),
        "F": ("F %", 2, True),
        "effectivity": ("effectivity", 4, True),
        "a": ("a", 4, True),
        **{
            name: (f"{name} %", 2, True)
            for name in found[0]
            if name.startswith("rise of ") and f"{name} low" in found[0]
        },
    }
    shown = {name: how for name, how in shown.items() if any(row[name] is not None for row in found)}
    lines = [["run", "start", "step", *(head for head, _, _ in shown.values())]]
    for row in found:
        start = "?" if row["start"] is None else str(row["start"])
        cells = [_cell(row, name, digits, interval) for name, (_, digits, interval) in shown.items()]
        lines.append([row["run"], start, str(row["step"]), *cells])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


def _cell(row: dict[str, Any], name: str, digits: int, interval: bool) -> str:
    if row[name] is None:
        return "-"
    sign = "+" if interval else ""
    return f"{row[name]:{sign}.{digits}f}" + (
        f" [{_end(row[name + ' low'], digits)}, {_end(row[name + ' high'], digits)}]" if interval else ""
    )


def _end(value: float | None, digits: int) -> str:
    return "?" if value is None else f"{value:+.{digits}f}"


def differences(result: dict[str, Any]) -> list[str]:
    """A line for every run but the first."""
    lines = []
    for found in result["comparisons"]:
        of_all = (found["dynamics"] or {}).get("all") or {}
        named = {
            "A": (found["A"], " points", 2),
            "K after": (found["K_after"], "", 4),
            "F": (found["F"], " points", 2),
            "effectivity": (of_all.get("effectivity"), "", 4),
            "a": (of_all.get("a"), "", 4),
            **{f"rise of {label}": (rise, " points", 2) for label, rise in found["loss_rise"].items()},
        }
        parts = [
            f"{name} {e['value']:+.{digits}f}{unit} [{_end(e['low'], digits)}, {_end(e['high'], digits)}]"
            for name, (e, unit, digits) in named.items()
            if e is not None
        ]
        lines.append(f"{found['to']} minus {found['from']}: {', '.join(parts)}")
    return lines


def notes(result: dict[str, Any]) -> list[str]:
    """What a reader of the table must know of these runs."""
    found = []
    for run in result["runs"]:
        said = []
        if run["begins"] is not None and run["first_step"] > run["begins"]:
            said.append(f"was first evaluated at step {run['first_step']}; eval_on_load gives the start itself")
        steps = {f"the loss of {label}": pair for label, pair in run["loss_steps"].items()}
        if run["downstream_steps"]:
            steps["downstream accuracy"] = run["downstream_steps"]
        for name, (before, after) in steps.items():
            if (before, after) != (run["first_step"], run["step"]):
                said.append(f"{name} is of steps {before} and {after}")
        said += _notes_of_dynamics(run)
        found += [f"note: {run['run']}: {text}" for text in said]
    if len({run["step"] for run in result["runs"]}) > 1:
        found.append("note: the runs were evaluated up to different steps; their differences hold that too")
    return found


def _notes_of_dynamics(run: dict[str, Any]) -> list[str]:
    measured = run["dynamics"]
    if measured is None:
        if not run["injections"]:
            return []
        why = "holds no entry that is probed" if run["injections_logged"] else "is missing (an older run)"
        return [f"injections.jsonl {why}; effectivity and retainability need it"]
    said, coverage, window = [], measured["coverage"], measured["window"]
    pairs, of_all = coverage["pairs"], measured["groups"]["all"]
    if coverage["measured"] < pairs:
        said.append(
            f"of {pairs} pairs of probe and injection {coverage['no_table_before']} have no table in the {window} "
            f"steps before, {coverage['no_table_after']} none in those from it; probing windows give them"
        )
    if coverage["just_before"] < coverage["measured"]:
        count = coverage["measured"] - coverage["just_before"]
        said.append(f"{count} of {coverage['measured']} effectivities are against a table older than the step before")
    looked_at = pairs - coverage["no_table_after"]
    if looked_at and coverage["tables"] < looked_at * window / 2:
        said.append(f"a maximum is over {coverage['tables'] / looked_at:.1f} tables of the {window} steps on average")
    if coverage["cut_short"]:
        said.append(
            f"{coverage['cut_short']} of {pairs} windows end beyond the newest table; their maxima are of what is there"
        )
    if of_all["nothing_acquired"] or of_all["not_known"]:
        said.append(
            f"of {of_all['probes']} probes {of_all['nothing_acquired']} acquired nothing and have no retainability, "
            f"{of_all['not_known']} lack a table for it"
        )
    low, high = measured["fit_range"]
    lacking = [s for s in SETTINGS if s in measured["groups"] and measured["groups"][s]["decay"] is None]
    if lacking:
        when = f"{low} or more" if high is None else f"{low} to {high:.0f}"
        said.append(f"no decay constant of {', '.join(lacking)}: fewer than two tables {when} steps after their maxima")
    return said


# --- command -----------------------------------------------------------------------------------------------------


def _window(text: str) -> int:
    if int(text) < 1:
        raise ValueError
    return int(text)


def _factor(text: str) -> float:
    factor = 0.0 if text == "none" else float(text)
    if not 0 <= factor < math.inf:
        raise ValueError
    return factor


def _range(text: str) -> tuple[int, float]:
    low, _, high = text.partition("-")
    found = int(low), int(high) if high else math.inf
    if not 1 <= found[0] < found[1]:
        raise ValueError
    return found


_window.__name__, _factor.__name__, _range.__name__ = "window", "outlier_factor", "fit_range"  # of argparse's errors


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        prog="python -m analysis.acquisition", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help=f"save_folder of a run, or one {RESULT}")
    parser.add_argument("--output", type=Path, help=f"folder for {RESULT}, acquisition.csv and the figures")
    parser.add_argument(
        "--window",
        type=_window,
        help="steps from an injection to its maximum; default: the probing.steps of the first run, or else 50",
    )
    parser.add_argument(
        "--outlier_factor",
        type=_factor,
        default=1.5,
        help="of interquartile ranges, beyond which effectivities and retainabilities are left out; 0 or none: no such",
    )
    parser.add_argument(
        "--fit_range",
        type=_range,
        default=(1, math.inf),
        metavar="A-B",
        help="steps after the maximum to fit; `A-`: from A",
    )
    return parser.parse_args(argv)


def _measure_all(folders: Sequence[Path], options: dynamics.Options) -> dict[str, Any]:
    runs = [read_run(folder) for folder in folders]
    if len({run.name for run in runs}) < len(runs):  # runs of several seeds, say, in folders of one name
        runs = [replace(run, name=str(folder)) for run, folder in zip(runs, folders)]
    measured = [measure(run, options) for run in runs]
    return {
        "runs": [summarise(run, of_run) for run, of_run in zip(runs, measured)],
        "comparisons": [comparison(runs[0], run, measured[0], of_run) for run, of_run in zip(runs[1:], measured[1:])],
        "resamples": estimates.RESAMPLES,
    }


def _read(path: Path) -> dict[str, Any]:
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: no JSON: {error}") from error
    if not isinstance(result, dict) or not {"runs", "comparisons"} <= result.keys():
        raise ValueError(f"{path}: not what this command wrote")
    return result


def _write(folder: Path, name: str, text: str) -> None:
    partial = folder / f".{name}.partial"
    partial.write_text(text, encoding="utf-8")
    partial.replace(folder / name)


def main(argv: Sequence[str]) -> None:
    args = _parse(argv)
    if args.output is not None:
        check_writable(args.output)
    again = args.runs[0].is_file()
    if again and len(args.runs) > 1:
        raise ConfigurationError(f"{args.runs[0]}: a file of results stands alone; runs are folders")
    if again:
        result = _read(args.runs[0])
    else:
        window = args.window or probing_steps(args.runs[0]) or 50
        result = _measure_all(args.runs, dynamics.Options(window, args.outlier_factor, args.fit_range))
    for text in (table(result), *notes(result), *differences(result)):
        print(text)
    if args.output is not None:
        from analysis.figures import save_acquisition

        args.output.mkdir(parents=True, exist_ok=True)
        _write(args.output, RESULT, json.dumps(result) + "\n")
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, list(rows(result)[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows(result))
        _write(args.output, "acquisition.csv", buffer.getvalue())
        save_acquisition(result, args.output)


if __name__ == "__main__":
    sys.exit(exit_status(main))
