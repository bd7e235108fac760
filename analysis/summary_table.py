"""acquisition.json as text: a line a run, what a reader of it has to know, and what each run differs by."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from analysis.rows import as_csv as rows_as_csv
from analysis.rows import columns_of
from olmo.console import fixed
from olmo.knowledge.entries import SETTINGS

# key of a row -> (head, digits, whether with its interval)
COLUMNS = {
    "K_before": ("K before", 4, False),
    "K_after": ("K after", 4, False),
    "A": ("A %", 2, True),
    "A_against_original": ("A % of original", 2, True),
    "K_published_before": ("K published before", 4, False),
    "K_published_after": ("K published after", 4, False),
    "A_published": ("A published %", 2, True),
    "A_published_against_original": ("A published % of original", 2, True),
    "P_before": ("P before", 4, False),
    "P_after": ("P after", 4, False),
    "F": ("F %", 2, True),
    "F_against_original": ("F % of original", 2, True),
    "effectivity": ("effectivity", 4, True),
    "a": ("a", 4, True),
}


def estimates_of(run: dict[str, Any], labels: list[str]) -> dict[str, Any]:
    """What the table shows of a run, each an estimate or None."""
    downstream = run["downstream"] or {}
    of_all = ((run["dynamics"] or {}).get("groups") or {}).get("all") or {}
    rises_of_original = run.get("loss_rise_against_original") or {}
    return {
        **{key: run.get(key) for key in COLUMNS if key[0] in "KA"},  # older results lack some
        **{key: downstream.get(key) for key in ("P_before", "P_after", "F")},
        "F_against_original": (run.get("downstream_against_original") or {}).get("F"),
        "effectivity": of_all.get("effectivity"),
        "a": (of_all.get("decay") or {}).get("a"),
        **{f"rise of {label}": run["loss_rise"].get(label) for label in labels},
        **{f"rise of {label} of original": rises_of_original.get(label) for label in labels},
    }


def _labels(result: dict[str, Any]) -> list[str]:
    """Labels of the held-out losses of any run."""
    return list(dict.fromkeys(label for run in result["runs"] for label in run["loss_rise"]))


def from_common_start(row: dict[str, Any]) -> dict[str, Any]:
    """The row of a run with A, A_published, F and the rises of losses measured from the weights before resuscitation,
    so that it can stand beside runs without it; what was not measured of them is missing."""
    if row.get("A_against_original") is None:
        return row
    rises = row.get("loss_rise_against_original") or {}
    return {
        **row,
        "A": row["A_against_original"],
        "A_published": row.get("A_published_against_original"),
        "loss_rise": rises,
        "downstream": row.get("downstream_against_original"),
    }


def by_condition(result: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each condition, in order of the runs: the mean of several seeds, or a run without others."""
    mean_of = {name: row for row in result.get("conditions", ()) for name in row["runs"]}
    found = {(row := mean_of.get(run["run"], run))["run"]: row for run in result["runs"]}
    return list(found.values())


def as_csv(result: dict[str, Any]) -> str:
    """A row a run, an estimate as three columns; empty where a run lacks it."""
    rows = []
    for run in (*result["runs"], *result.get("conditions", ())):
        row: dict[str, Any] = {"run": run["run"], "start": run["start"], "step": run["step"]}
        for name, estimate in estimates_of(run, _labels(result)).items():
            row |= columns_of(name, estimate)
        rows.append(row)
    return rows_as_csv(rows)


def table(result: dict[str, Any]) -> str:
    """A line a run, and one for the mean of several seeds; columns that no run has are left out."""
    labels = _labels(result)
    runs = [*result["runs"], *result.get("conditions", ())]
    rows = [estimates_of(run, labels) for run in runs]
    rises = {
        f"rise of {label}{suffix}": (f"rise of {label} %{suffix}", 2, True)
        for label in labels
        for suffix in ("", " of original")
    }
    columns = {**COLUMNS, **rises}
    # Where entries were injected, effectivity and a are asked for: a dash is better than no column.
    asked = {"effectivity", "a"} if any(run["dynamics"] for run in result["runs"]) else set()
    shown = {name: c for name, c in columns.items() if name in asked or any(_is_known(row[name]) for row in rows)}
    lines = [["run", "start", "step", *(head for head, _, _ in shown.values())]]
    for run, row in zip(runs, rows):
        start = "?" if run["start"] is None else str(run["start"])
        cells = (_cell(row[name], digits, interval) for name, (_, digits, interval) in shown.items())
        lines.append([run["run"], start, str(run["step"]), *cells])
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


def _is_known(estimate: dict[str, Any] | None) -> bool:
    return estimate is not None and estimate["value"] is not None


def _cell(estimate: dict[str, Any], digits: int, interval: bool) -> str:
    if not _is_known(estimate):
        return "-"
    return with_interval(estimate, digits) if interval else fixed(estimate["value"], digits)


def signed(value: float | None, digits: int) -> str:
    """A number with its sign; '?' where it is unknown or unbounded."""
    return "?" if value is None else fixed(value, digits, "+")


def with_interval(estimate: dict[str, Any], digits: int, unit: str = "") -> str:
    """value [low, high]."""
    value, low, high = (signed(estimate[part], digits) for part in ("value", "low", "high"))
    return f"{value}{unit} [{low}, {high}]"


def differences(result: dict[str, Any]) -> list[str]:
    """A line for every run or condition but the baseline."""
    lines = []
    for found in result["comparisons"]:
        pairs = found.get("runs", [None])  # older results compare single runs
        if not pairs:
            lines.append(f"{found['to']} minus {found['from']}: not compared, they have no seed in common")
            continue
        of_all = (found["dynamics"] or {}).get("all") or {}
        # Measured from its own start, an edited run gains by what the edit lost; from the common start it does not.
        start = found.get("common_start") or found
        named = {
            "A": (start["A"], " points", 2),
            "K after": (found["K_after"], "", 4),
            "A published": (start.get("A_published"), " points", 2),
            "K published after": (found.get("K_published_after"), "", 4),
            "F": (start["F"], " points", 2),
            "effectivity": (of_all.get("effectivity"), "", 4),
            "a": (of_all.get("a"), "", 4),
            **{f"rise of {label}": (rise, " points", 2) for label, rise in start["loss_rise"].items()},
        }
        parts = [
            f"{name} {with_interval(e, digits, unit)}" for name, (e, unit, digits) in named.items() if _is_known(e)
        ]
        seeds = f" ({len(pairs)} seeds)" if len(pairs) > 1 else ""
        common = "" if start is found else ", both from the original weights"
        lines.append(f"{found['to']} minus {found['from']}{seeds}{common}: {', '.join(parts)}")
    return lines


def notes(result: dict[str, Any]) -> list[str]:
    """What a reader of the table has to know about these runs."""
    runs = result["runs"]
    of_runs: dict[str, list[str]] = {}  # a note that several runs share is printed once
    for run in runs:
        for note in (*_notes(run), *_notes_on_dynamics(run)):
            of_runs.setdefault(note, []).append(run["run"])
    found = [f"note: {_names(names)}: {note}" for note, names in of_runs.items()]
    for name, first in result.get("identical", {}).items():
        why = f"has exactly the metrics of {first}: its seed varies nothing, or it is the same run"
        found.append(f"note: {name} {'was named twice' if name == first else why}; it counts once")
    for row in result.get("conditions", ()):
        digits = {name: COLUMNS.get(name, ("", 2))[1] for name in row["spread"]}
        spread = ", ".join(f"{COLUMNS.get(n, (n,))[0]} {fixed(v, digits[n])}" for n, v in row["spread"].items())
        names = ", ".join(row["runs"])
        found.append(f"note: {row['run']}: {names}; standard deviation between the seeds: {spread}")
    comparisons = result["comparisons"]
    found += dict.fromkeys(f"note: {reason}" for comparison in comparisons for reason in comparison.get("unpaired", ()))
    if len({run["step"] for run in runs}) > 1:
        found.append("note: the runs were evaluated up to different steps; their differences include that")
    if any(len(comparison.get("runs", [None])) == 1 for comparison in comparisons):
        found.append("note: differences of single runs have intervals over their entries; another seed may add more")
    return found


def _names(names: list[str]) -> str:
    shown = names if len(names) <= 3 else [*names[:2], f"{len(names) - 2} more runs"]
    return " and ".join(filter(None, (", ".join(shown[:-1]), shown[-1])))


def _notes(run: dict[str, Any]) -> Iterator[str]:
    if run["begins"] is not None and run["first_step"] > run["begins"]:
        yield f"was first evaluated at step {run['first_step']}; eval_on_load evaluates the start itself"
    steps = {f"the loss of {label}": pair for label, pair in run["loss_steps"].items()}
    if run["downstream_steps"]:
        steps["downstream accuracy"] = run["downstream_steps"]
    for name, (before, after) in steps.items():
        if (before, after) != (run["first_step"], run["step"]):
            yield f"{name} was evaluated at steps {before} and {after}"

    unknown = run["loss_rise"].keys() - (run.get("loss_rise_against_original") or {}).keys()
    if run["A_against_original"] is not None and unknown:
        yield (
            f"the losses of the original weights on {', '.join(sorted(unknown))} are not known, so figures lack them; "
            "eval_on_load evaluates these weights"
        )
    scale = run.get("K_published_of", "probes")  # older results have no K_published at all
    if scale is None:
        yield (
            "K_published is not known: tables of probes lack `positions` (an older run), and metrics.jsonl lacks the "
            "CrossEntropyLoss of their labels"
        )
    elif scale == "probes in other batches":
        yield "K_published before and after are of unequal batches (device_eval_batch_size); A_published includes that"
    elif scale != "probes":
        yield "K_published is that of the logged losses, without an interval (tables of an older run lack `positions`)"
    not_finite = run.get("not_finite", {"probes": {}, "losses": {}, "accuracies": 0})
    if not_finite["probes"]:
        at = {int(step): count for step, count in not_finite["probes"].items()}
        compared = f"; step {run['step']} is compared, the newest without any" if max(at) > run["step"] else ""
        yield f"{sum(at.values())} log-probabilities, the first at step {min(at)}, are not finite numbers{compared}"
    for label, count in not_finite["losses"].items():
        if count:
            yield f"{count} losses of {label} are not finite numbers"
    if not_finite["accuracies"]:
        yield f"{not_finite['accuracies']} accuracies are not finite numbers"


def _notes_on_dynamics(run: dict[str, Any]) -> Iterator[str]:
    if run["dynamics"] is None:
        if run["injections"]:
            why = "names no entry that is probed" if run["injections_logged"] else "is missing (an older run)"
            yield f"injections.jsonl {why}; effectivity and retainability need it"
        return
    coverage, window = run["dynamics"]["coverage"], run["dynamics"]["window"]
    groups, (low, high) = run["dynamics"]["groups"], run["dynamics"]["fit_range"]
    pairs, measured, of_all = coverage["pairs"], coverage["measured"], groups["all"]
    lacking_window = coverage.get("no_window", 0)  # older results do not count these
    if lacking_window:
        yield (
            f"{lacking_window} of {pairs} pairs of probe and injection have no probing window, and no effectivity: set "
            f"probing in the run's configuration, such as --probing.steps={window} --probing.interval=1"
        )
    if lacking_window == pairs:
        return
    if coverage["no_table_after"]:
        yield f"{coverage['no_table_after']} of {pairs} pairs of probe and injection have no table after the injection"
    if coverage.get("just_before", measured) < measured:
        older = measured - coverage["just_before"]
        yield f"{older} of {measured} effectivities are measured against a table older than the step before"
    looked_at = pairs - lacking_window - coverage["no_table_after"]
    if looked_at and coverage["tables"] < looked_at * window / 2:
        yield f"a maximum is over {coverage['tables'] / looked_at:.1f} tables of the {window} steps on average"
    if coverage["cut_short"]:
        yield f"{coverage['cut_short']} of {pairs} windows end after the newest table; their maxima may still rise"
    if of_all["nothing_acquired"] or of_all["not_known"]:
        yield (
            f"of {of_all['probes']} probes {of_all['nothing_acquired']} acquired nothing and have no retainability, "
            f"{of_all['not_known']} lack a table for it"
        )
    lacking = [s for s in SETTINGS if s in groups and groups[s]["decay"] is None]
    if lacking:
        when = f"{low} or more" if high is None else f"{low} to {high:.0f}"
        yield f"no decay constant of {', '.join(lacking)}: fewer than two tables {when} steps after their maxima"
