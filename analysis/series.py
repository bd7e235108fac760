"""Knowledge entropies of several checkpoints together: one table, paired differences, figures; from results alone.

A result is what `python -m analysis.entropy` wrote for one checkpoint: `knowledge_entropy.json`, and beside it
`mlp_average_coefficients.safetensors`, which only the figure of the coefficients needs.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from analysis.breadth import sorted_shares
from analysis.choices import EDITS, RESULT, SERIES
from analysis.figures import can_draw
from analysis.kinds import difference, kind_of, labels, positions, runs
from analysis.locations import Location, check_writable
from analysis.pairs import (
    KNOWLEDGE,
    MEASURES,
    OTHERS,
    breadth_without_errors,
    change,
    in_common,
    most_active,
    number_of,
    standard_error,
)
from analysis.results import COEFFICIENTS_FILE, read_coefficients
from olmo.console import fixed
from olmo.files.atomic import write_text
from olmo.files.paths import as_json, read_json
from olmo.files.revisions import is_later_stage, parse

_KEPT = (
    "knowledge_entropy",
    "standard_error",
    "layers",
    "layer_standard_errors",
    "maximum",
    "number_of_instances",
    "checkpoint",
    "data",
    "coefficient",
)
_OF_UNLIKE_LAYERS = ("layer_numbers", "layer_sizes")


# --- all together ------------------------------------------------------------------------------------------------


def read_result(path: Path) -> dict[str, Any]:
    """One result; raises OSError if it cannot be read, ValueError if it is something else."""
    result = read_json(path)
    missing = {*_KEPT, "leave_one_group_out"} - (result.keys() if isinstance(result, dict) else set())
    if missing:
        raise ValueError(f"{path}: not a result of analysis.entropy, it has no {sorted(missing)[0]}")
    try:
        numbers = [result["knowledge_entropy"], result["maximum"], *result["layers"], result["number_of_instances"]]
        # Of the numbers without each group, only their sums are needed: a series may have thousands of results.
        unlike = [result[name] for name in _OF_UNLIKE_LAYERS if name in result]
        numbers += [number + 0 for given in unlike for number in given]
        left_out = [[sum(layers)] for layers in result["leave_one_group_out"]]
        if "breadth" not in result and path.with_name(COEFFICIENTS_FILE).is_file():
            result["breadth"] = breadth_without_errors(path.with_name(COEFFICIENTS_FILE)).to_dict()
        others = {name: found for name in MEASURES if (found := number_of(result, name)) is not None}
        numbers += [number for value, resampled in others.values() for number in (value, *resampled)]
        known = bool(np.isfinite([*numbers, *(one for [one] in left_out), result["checkpoint"]["step"] + 0]).all())
        known &= all(isinstance(result[key]["path"], str) for key in ("checkpoint", "data"))
        known &= isinstance(result["data"]["sha256"], str) and len(result["layers"]) > 0
        known &= [len(given) for given in unlike] in ([], [len(result["layers"])] * 2)
    except (TypeError, KeyError, AttributeError):
        known = False
    if not known:
        raise ValueError(
            f"{path}: expected checkpoint, data, and numbers that are finite; measure it again with analysis.entropy"
        )
    named = parse(Path(result["checkpoint"]["path"]).name.rpartition("@")[2])
    if result["checkpoint"]["step"] < 0 <= named.step:  # of a version that did not know such names
        later = {"tokens": None} if is_later_stage(named.stage) else {}
        result["checkpoint"] |= {"step": named.step, **later, **({"stage": named.stage} if named.stage else {})}
    sums = {f"{name}_leave_one_group_out": others[name][1].tolist() for name in OTHERS if name in others}
    return {**result, **sums, "leave_one_group_out": left_out}


def _distinct(
    read: Sequence[tuple[dict[str, Any], Path]],
) -> tuple[list[tuple[dict[str, Any], Path]], list[str]]:
    """(the results without repetitions, a line for each of these): results of the same weights, edit and kind, such as
    those of a checkpoint that was named twice, by a path and by a link."""
    kept: dict[str, tuple[dict[str, Any], Path]] = {}
    repeated = []
    for result, path in read:
        checkpoint = result["checkpoint"]
        edits = [result.get(key) for key in EDITS]
        what = str((checkpoint.get("fingerprint") or path.resolve(), edits, kind_of(result)))
        first, _ = kept.setdefault(what, (result, path))
        if first is not result:
            repeated.append(f"left out: {checkpoint['path']} has the weights of {first['checkpoint']['path']}")
    return list(kept.values()), repeated


def gather(read: Sequence[tuple[dict[str, Any], Path]]) -> dict[str, Any]:
    """All numbers of a series of results and their files, ready for JSON: `rows`, those of a kind together, each kind
    in order of its position if all are known; `not_paired`, a line or None; `repeated`, a line for each result that is
    left out because its weights are those of another one; and `distributions` of the first, the middle and the last row
    of the kind that has most, if all have their file of coefficients.

    A row has H and its parts, `name`, `kind` (`analysis.kinds.labels`), `model`, `run` where several have one step,
    `position` (the steps of the whole training, or -1), `tokens` (or None), and the paired differences of H
    `from_previous`, `from_first` and `from_last` of its kind: `value` and `standard_error`, or None if there is no such
    pair. `measures` has the same of each of `analysis.pairs.MEASURES` that was measured, with its own `value` and
    `standard_error`; `overlap` is the share of the most active memories in common with the previous and the first one.
    """
    read, repeated = _distinct(read)
    where = positions([result for result, _ in read])
    if min(where) >= 0:
        read = [pair for _, pair in sorted(zip(where, read), key=lambda placed: placed[0])]
    results = [result for result, _ in read]
    where = positions(results)
    names = [Path(result["checkpoint"]["path"]).name for result in results]
    if len(set(names)) < len({result["checkpoint"]["path"] for result in results}):
        names = [result["checkpoint"]["path"] for result in results]
    by_kind: dict[str, list[int]] = {}
    for place, kind in enumerate(labels(results)):
        by_kind.setdefault(kind, []).append(place)
    of_runs = runs(results)
    rows: list[dict[str, Any]] = []
    reasons: dict[str | None, str] = {}
    for kind, places in by_kind.items():
        active: dict[int, Any] = {}  # of the first and of the previous row; those of all would fill the memory
        for place, previous in zip(places, (places[0], *places)):
            result, name, others = results[place], names[place], {"from_previous": previous, "from_first": places[0]}
            reason = difference(results[0], result)
            reasons.setdefault(reason, f"{name}: {reason}")
            active = {kept: active[kept] for kept in others.values() if kept in active}
            active[place] = most_active(read[place][1])
            others["from_last"] = places[-1]
            rows.append(
                {
                    "name": name,
                    "kind": kind,
                    "model": kind_of(result)["models"],
                    "run": of_runs[place],
                    "position": where[place],
                    "tokens": result["checkpoint"].get("tokens"),
                    **{key: result[key] for key in _KEPT},
                    **{key: result[key] for key in _OF_UNLIKE_LAYERS if key in result},
                    "precision": result.get("precision"),
                    **{key: change(results[other], result, KNOWLEDGE) for key, other in others.items()},
                    "measures": {
                        measure: {
                            "value": found[0],
                            "standard_error": standard_error(result, measure),
                            **{key: change(results[other], result, measure) for key, other in others.items()},
                        }
                        for measure in MEASURES
                        if (found := number_of(result, measure)) is not None
                    },
                    "overlap": {
                        key: in_common(active[other], active[place])
                        if other != place and difference(results[other], result) is None
                        else None
                        for key, other in others.items()
                        if other in active
                    },
                }
            )
    refused = "; ".join(text for reason, text in reasons.items() if reason)
    kind_of_most, largest = max(by_kind.items(), key=lambda pair: len(pair[1]))
    chosen = [largest[place] for place in sorted({0, len(largest) // 2, len(largest) - 1})]
    return {
        "rows": rows,
        "not_paired": f"not paired with {names[0]}: {refused}" if refused else None,
        "repeated": repeated,
        "distributions": _distributions(
            [(f"{names[i]} {kind_of_most}".rstrip(), read[i][1].with_name(COEFFICIENTS_FILE)) for i in chosen]
        ),
    }


def _distributions(files: Sequence[tuple[str, Path]]) -> list[dict[str, Any]]:
    """Sorted shares of the coefficients, with the names of the checkpoints; none where a file is missing."""
    if not all(file.is_file() for _, file in files):
        return []
    curves = []
    for name, file in files:
        averages = {number: values.double().numpy() for number, values in read_coefficients(file).average.items()}
        curve = {"name": name, **sorted_shares(list(averages.values()))}
        if list(averages) != list(range(len(averages))):
            curve["layer_numbers"] = list(averages)
        curves.append(curve)
    return curves


def written(folder: Path, drawn: bool) -> str:
    """Where the table is that was printed, and its figures."""
    return f"{folder / SERIES}: this table{'; its figures beside it' if drawn else ''}"


def table(series: dict[str, Any]) -> str:
    """The rows of a series as text: H, below it the other entropies that were measured, and what could not be paired or
    is left out."""
    several = any(row["kind"] for row in series["rows"])
    head = ["checkpoint", "step", "tokens", "H", "error", "from the one before", "from the first"]
    lines = [head + ["kind"] * several]
    for row in series["rows"]:
        step, tokens = row["checkpoint"]["step"], row["tokens"]
        lines.append(
            [
                row["name"],
                str(step) if step >= 0 else "",
                "" if tokens is None else f"{tokens / 1e9:,.0f}B" if tokens >= 10**10 else f"{tokens / 1e6:,.1f}M",
                *_cells(row["knowledge_entropy"], row),
                *[row["kind"]] * several,
            ]
        )
    text = _aligned(lines)
    for measure, title in OTHERS.items():
        measured = [(row, row["measures"][measure]) for row in series["rows"] if measure in row["measures"]]
        lines = [["checkpoint", title.removesuffix(" (nats)"), *head[4:], *["kind"] * several]]
        lines += [[row["name"], *_cells(one["value"], one), *[row["kind"]] * several] for row, one in measured]
        text += ["", *_aligned(lines)] if measured else []
    return "\n".join([*text, *filter(None, [series["not_paired"]]), *series["repeated"]])


def _cells(value: float, row: dict[str, Any]) -> list[str]:
    """A number, its error, and its differences from others, as text."""
    error = "" if row["standard_error"] is None else f"{row['standard_error']:.4f}"
    return [fixed(value, 4), error, _shown(row["from_previous"]), _shown(row["from_first"])]


def _aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*lines)]
    return [
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths))).rstrip()
        for line in lines
    ]


def _shown(difference: dict[str, float | None] | None) -> str:
    if difference is None or difference["value"] is None:
        return ""
    error = difference["standard_error"]
    return fixed(difference["value"], 4, "+") + (f" +- {error:.4f}" if error is not None else "")


def write(read: Sequence[tuple[dict[str, Any], Path]], folder: Path) -> dict[str, Any]:
    """Write `knowledge_entropy_series.json` of results and their files atomically; returns its content."""
    series = gather(read)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / SERIES, as_json(series, folder / SERIES))
    return series


def draw(series: dict[str, Any], folder: Path, scale: str = "step") -> None:
    """Write the figures of a series, PNG, PDF and CSV. scale: of their x axis (`analysis.figures.lines`)."""
    # Matplotlib is slow to import, and a single checkpoint has no figure.
    from analysis.figures.entropy import save_series

    save_series(series, folder, scale)


class Series:
    """The results of one command, written again with each new one: to `output`, or to the folder that contains all
    checkpoints, if there is one. Raises OSError if that cannot be written."""

    def __init__(self, locations: Sequence[Location], output: Path | None):
        parents = {Path(location).absolute().parent for location in locations}
        self.read: list[tuple[dict[str, Any], Path]] = []
        self._due = 0.0  # when the series is to be written again: all of it each time, at a twentieth of the time
        self.folder = output or (parents.pop() if len(parents) == 1 else None)
        if self.folder is not None:
            check_writable(self.folder)

    def add(self, result_folder: Path, new: bool) -> None:
        """Add a result; a `new` one is written to the series soon, in case the command is killed."""
        self.read.append((read_result(result_folder / RESULT), result_folder / RESULT))
        started = time.monotonic()
        if new and self.folder is not None and started >= self._due:
            write(self.read, self.folder)
            self._due = time.monotonic() + 20 * (time.monotonic() - started)

    def draw(self) -> None:
        """Print the table and draw the figures of the results so far."""
        if not self.read:
            return
        series = gather(self.read) if self.folder is None else write(self.read, self.folder)
        print(table(series), flush=True)
        if self.folder is None:
            print("the checkpoints are in several folders: name one with --output to save this table and its figures")
        else:
            drawn = can_draw()
            if drawn:
                draw(series, self.folder)
            print(written(self.folder, drawn))
