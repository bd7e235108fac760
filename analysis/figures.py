"""Every figure, drawn from saved numbers. Nothing is computed here but positions on paper.

Drawing leaves matplotlib's global state (backend, rcParams, pyplot's figures) unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis.canvas import (
    bars,
    beside,
    in_style,
    legend,
    lengths,
    name_axis,
    panels,
    plain,
    save,
    side_by_side,
    step_axis,
)
from analysis.summary_table import by_condition, from_common_start
from olmo.knowledge.entries import SETTINGS

BLUES = ("#9ecae1", "#4292c6", "#08306b")  # early, middle, last checkpoint
ORANGES = ("#fdae6b", "#e6550d")  # resuscitated, q = 1 and q = 2
GREY = "#7f7f7f"
KINDS = (BLUES[2], ORANGES[1], "#31a354", "#756bb1", "#e7298a", "#8c6d31", GREY, "#17becf")  # of results, a line each
KIND_COLORS = {"memorization": "#08306b", "semantic": "#e6550d", "composition": "#31a354"}


@in_style
def entropy_over_steps(series: Sequence[Sequence[dict[str, Any]]], marked: Sequence[int] = ()) -> Figure:
    """Knowledge entropy over pretraining, one line a seed, bars of two standard errors; `marked` steps are larger.

    series: per seed the contents of the checkpoints' knowledge_entropy.json, ordered by step; or per kind the rows of
    a series, whose `kind` is then the line's name in a legend.
    """
    figure, [[axes]] = panels(6.4, 3.6)
    legend(figure, _entropy(axes, series, marked))
    return figure


def _places(axes: Axes, results: Sequence[dict[str, Any]]) -> list[int]:
    """Positions of results from left to right: their steps, or side by side, by name, where one is unknown."""
    steps = [r["checkpoint"]["step"] for r in results]
    if min(steps) >= 0:
        step_axis(axes, "pretraining step")
        return steps
    names = list(dict.fromkeys(r["name"] for r in results))
    name_axis(axes, names)
    return [names.index(r["name"]) for r in results]


def _by_kind(rows: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The rows of a series (analysis.series), a list a kind: only results of one kind are joined in one line."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        kinds.setdefault(row.get("kind", ""), []).append(row)
    return list(kinds.values())


def _entropy(axes: Axes, series: Sequence[Sequence[dict[str, Any]]], marked: Sequence[int]) -> list[Any]:
    """Draw the series; returns what a legend has to name: lines of several kinds, and marked steps."""
    together = iter(_places(axes, [r for results in series for r in results]))
    named: list[Any] = []
    for number, results in enumerate(series):
        steps = [next(together) for _ in results]
        kind = results[0].get("kind", "")
        color = KINDS[number % len(KINDS)] if kind else BLUES[2]
        values = [r["knowledge_entropy"] for r in results]
        errors = [2 * (r["standard_error"] or 0.0) for r in results]
        alpha = 1.0 if kind else max(1 - 0.25 * number, 0.25)
        line = axes.errorbar(steps, values, errors, color=color, alpha=alpha, marker="o", markersize=4, capsize=3)
        line.set_label(plain(kind, 80))
        named += [line] if kind else []
        for color, step in zip(BLUES, marked if number == 0 else ()):
            place = [steps.index(step)]
            named += axes.plot([step], [values[i] for i in place], "o", color=color, markersize=11, zorder=5)
            named[-1].set_label(f"start at step {step}")
    axes.margins(x=0.08, y=0.2)
    axes.set(ylabel="knowledge entropy H (nats)", title="Knowledge entropy over pretraining")
    return named


@in_style
def layer_entropy_over_steps(results: Sequence[dict[str, Any]]) -> Figure:
    """H of every layer over pretraining, bars of two standard errors, a panel for each kind of results."""
    kinds = _by_kind(results)
    figure, [grid] = panels(6.4 * len(kinds), 3.6, columns=len(kinds))
    handles = [_layers(axes, rows) for axes, rows in zip(grid, kinds)]
    if len(kinds) > 1:
        for axes, rows in zip(grid, kinds):
            axes.set_title(plain(rows[0]["kind"], 70), fontsize=9)
    legend(figure, max(handles, key=len))
    return figure


def _layers(axes: Axes, results: Sequence[dict[str, Any]]) -> list[Line2D]:
    """Draw the layers of one kind of results; returns what a legend has to name."""
    places, layers, named = _places(axes, results), len(results[0]["layers"]), []
    for layer, number in enumerate(results[0].get("layer_numbers", range(layers))):
        values = [r["layers"][layer] for r in results]
        errors = [2 * (r["layer_standard_errors"][layer] or 0.0) for r in results]
        color = colormaps["viridis"](0.85 * layer / max(layers - 1, 1))
        axes.errorbar(places, values, errors, color=color, marker="o", markersize=4, capsize=3)
        named.append(Line2D([], [], color=color, marker="o", markersize=4, label=f"layer {number}"))
    axes.set(ylabel="entropy of the layer (nats)", title="Knowledge entropy per layer")
    return named


@in_style
def coefficient_distributions(checkpoints: Sequence[dict[str, Any]]) -> Figure:
    """How each layer spreads its coefficients over its memories: shares, largest first, a line a checkpoint.

    checkpoints: `name`, `ranks` (0 the most used memory of the layer, 1 the least) and `shares` (layers, ranks);
    `layer_numbers` where these are not 0, 1, ...
    """
    layers = len(checkpoints[0]["shares"])
    numbers = checkpoints[0].get("layer_numbers", range(layers))
    columns = min(layers, 4)
    rows = math.ceil(layers / columns)
    figure, grid = panels(1.2 + 2.6 * columns, 1 + 2.1 * rows, rows, columns, sharex=True, sharey=True)
    colors = BLUES if len(checkpoints) == 3 else (BLUES[0], BLUES[2])
    for layer, axes in enumerate(grid.flat):
        if layer >= layers:
            axes.set_visible(False)
            continue
        for number, (one, color) in enumerate(zip(checkpoints, colors)):
            axes.plot(one["ranks"], one["shares"][layer], color=color, zorder=2 + number)
        axes.set_yscale("log")
        axes.set_title(f"layer {numbers[layer]}", fontsize=9)
    figure.supxlabel("memories of the layer, most used first (fraction of all)", fontsize=10)
    figure.supylabel("share of the coefficients, $p_i$", fontsize=10)
    legend(figure, [Line2D([], [], color=c, label=plain(one["name"])) for one, c in zip(checkpoints, colors)])
    return figure


def save_series(series: dict[str, Any], folder: Path) -> None:
    """Save the figures of `knowledge_entropy_series.json` (analysis.series)."""
    rows = series["rows"]
    save(entropy_over_steps(_by_kind(rows)), folder / "knowledge_entropy")
    save(layer_entropy_over_steps(rows), folder / "knowledge_entropy_layers")
    if series["distributions"]:
        save(coefficient_distributions(series["distributions"]), folder / "coefficient_distributions")


@in_style
def overview(
    series: Sequence[Sequence[dict[str, Any]]], marked: Sequence[int], rows: Sequence[dict[str, Any]], loss_label: str
) -> Figure:
    """The study in one row: entropy over pretraining, and what each start acquires and forgets."""
    figure, [[left, middle, right]] = panels(13.5, 3.7, columns=3, width_ratios=(1.3, 1, 1))
    legend(figure, _entropy(left, series, marked))
    _acquired_and_forgotten(middle, right, rows, loss_label)
    return figure


@in_style
def acquisition_and_forgetting(rows: Sequence[dict[str, Any]], loss_label: str) -> Figure:
    """A and forgetting by starting point. rows: `name`, `color`, `A` and `loss_rise` estimates of each condition."""
    figure, [[left, right]] = panels(10.5, 3.8, columns=2)
    _acquired_and_forgotten(left, right, rows, loss_label)
    return figure


def _acquired_and_forgotten(left: Axes, right: Axes, rows: Sequence[dict[str, Any]], loss_label: str) -> None:
    names, colors = [r["name"] for r in rows], [r["color"] for r in rows]
    bars(left, names, [r["A"] for r in rows], colors, "A, % (95 % interval)")
    left.set_title("Knowledge acquired")
    bars(right, names, [r["loss_rise"] for r in rows], colors, f"rise of held-out {loss_label} loss, %")
    right.set_title("Knowledge forgotten")


@in_style
def probes_over_steps(
    curves: Sequence[dict[str, Any]], injections: Sequence[int], measure: str = "K", title: str = ""
) -> Figure:
    """Log-probability of the probes over training, with a mark at every injection.

    curves: `name`, `color` and `curve`, a list of {step, K, K_paraphrase, K_once}.
    """
    figure, [[axes]] = panels(6.4, 3.8)
    _mark(axes, injections)
    rounds = [Line2D([], [], color=GREY, linewidth=0.7, linestyle=":", label="injection round")] if injections else []
    for run in curves:
        label = plain(run["name"].replace("\n", " "))
        axes.plot(*_points(run, measure), marker="o", markersize=3.5, color=run["color"], label=label)
    step_axis(axes, "step of training")
    axes.set(ylabel="log-probability of the target span", title=title)
    legend(figure, [*rounds, *axes.get_legend_handles_labels()[0]])
    return figure


@in_style
def probes_by_part(runs: Sequence[dict[str, Any]], colors: Sequence[Any], parts: Sequence[Sequence[str]]) -> Figure:
    """Log-probability over steps, a panel for each of `parts`, rows of names of measures such as K_once_semantic; a
    mark at every injection. Steps are counted from the run's own start, which may be a later one of its checkpoint.

    runs: `run`, `begins`, `curve`, a list of {step, measure: value, ...}, and `injections`, steps.
    """
    injections = sorted({step - (run.get("begins") or 0) for run in runs for step in run["injections"]})
    rows, columns = len(parts), len(parts[0])
    figure, grid = panels(1.2 + 3.4 * columns, 1.2 + 2.4 * rows, rows, columns, sharex=True)
    for axes, measure in zip(grid.flat, (measure for row in parts for measure in row)):
        _mark(axes, injections)
        for run, color in zip(runs, colors):
            steps, values = _points(run, measure)
            steps = [step - (run.get("begins") or 0) for step in steps]
            marker = "o" if len(steps) <= 40 else None
            axes.plot(steps, values, color=color, linewidth=1.2, marker=marker, markersize=3)
        axes.set_title(measure.removeprefix("K_").replace("_", ", "), fontsize=9)
        step_axis(axes, "")
    figure.supxlabel("step of training (dotted: injection)", fontsize=10)
    figure.supylabel("log-probability of the target span", fontsize=10)
    _legend_of_runs(figure, runs, colors)
    return figure


def _points(run: dict[str, Any], measure: str) -> tuple[list[int], list[float]]:
    """Steps and values of a measure, of the evaluations that have it."""
    points = [p for p in run["curve"] if measure in p]
    return [p["step"] for p in points], [p[measure] for p in points]


def _mark(axes: Axes, injections: Sequence[int]) -> None:
    for step in injections:
        axes.axvline(step, color=GREY, linewidth=0.7, linestyle=":")


def _legend_of_runs(figure: Figure, runs: Sequence[dict[str, Any]], colors: Sequence[Any]) -> None:
    names = [plain(run["run"]) for run in runs]
    legend(figure, [Line2D([], [], color=c, marker="o", markersize=4, label=n) for n, c in zip(names, colors)])


@in_style
def outcomes_over_pretraining(runs: Sequence[dict[str, Any]], colors: Sequence[Any]) -> Figure:
    """A, F and the rise of the first held-out loss, those that any run has, over the pretraining steps from which runs
    started, several of one step beside each other; side by side where a step is unknown.

    runs: `run`, `start`, and the estimates `A`, `downstream`.`F` (or None) and `loss_rise`.
    """
    labels = list(dict.fromkeys(label for run in runs for label in run["loss_rise"]))[:1]
    measures = {
        "A, %": [run["A"] for run in runs],
        "F, %": [(run["downstream"] or {}).get("F") for run in runs],
        **{f"rise of held-out {label} loss, %": [run["loss_rise"].get(label) for run in runs] for label in labels},
    }
    measures = {name: found for name, found in measures.items() if any(found)}
    figure, grid = panels(1 + 4.2 * len(measures), 3.8, columns=len(measures))
    starts = [run["start"] for run in runs]
    known = None not in starts
    places = side_by_side(starts) if known else list(range(len(runs)))
    for axes, (name, estimates) in zip(grid.flat, measures.items()):
        for place, estimate, color in zip(places, estimates, colors):
            if estimate is not None and estimate["value"] is not None:
                value, below, above = lengths(estimate)
                ends = [[below], [above]]
                axes.errorbar([place], [value], ends, color=color, marker="o", markersize=6, capsize=4)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_title(name)
        axes.margins(x=0.1)
        if known:
            step_axis(axes, "pretraining step of the start")
        else:
            name_axis(axes, [run["run"] for run in runs])
    figure.supylabel("95 % interval", fontsize=10)
    _legend_of_runs(figure, runs, colors)
    return figure


@in_style
def retainability(runs: Sequence[dict[str, Any]]) -> Figure:
    """Mean retainability over the time since the maximum, on a log axis, with its intervals and the line of its fit: a
    row of panels a run, a column a setting that has any, a colour a kind of probe. The larger a point, the more values
    it is the mean of.

    runs: `run` and `dynamics`.`groups`, named {setting}_{kind}, with `retainability` (at, mean, low, high) and `decay`.
    """
    groups = [item for run in runs for item in run["dynamics"]["groups"].items()]
    settings = [s for s in SETTINGS if any(name == s and group["retainability"]["at"] for name, group in groups)]
    rows, columns = len(runs), len(settings)
    figure, grid = panels(1.2 + 6 * columns, 0.8 + 3.2 * rows, rows, columns, sharex=True, sharey=True)
    for row, run in zip(grid, runs):
        for axes, setting in zip(row, settings):
            for kind, color in KIND_COLORS.items():
                group = run["dynamics"]["groups"].get(f"{setting}_{kind}")
                if group is not None and group["retainability"]["at"]:
                    _decay_of(axes, group, kind, color)
            axes.axhline(0, color="black", linewidth=0.8)
            axes.set(xscale="log", ylim=(-0.25, 1.25))
            axes.set_title(f"{plain(run['run'])}: {setting}", fontsize=9)
            beside(axes)
    figure.supxlabel("steps since the maximum after the last injection, t", fontsize=10)
    figure.supylabel("mean retainability R(q, t)", fontsize=10)
    return figure


def _decay_of(axes: Axes, group: dict[str, Any], kind: str, color: str) -> None:
    curve, fit = group["retainability"], group["decay"]
    label = kind if fit is None else f"{kind}, a = {fit['a']['value']:.3f}"
    sizes = [number / max(curve["values"]) for number in curve["values"]]
    low, high = ([math.nan if end is None else end for end in curve[name]] for name in ("low", "high"))
    axes.vlines(curve["at"], low, high, color=color, alpha=0.4, linewidths=[1.5 * size for size in sizes])
    axes.scatter(curve["at"], curve["mean"], [12 * size for size in sizes], color=color, linewidth=0, label=label)
    if fit is not None:
        axes.plot(*zip(*fit["line"]), color=color, linewidth=1.5, linestyle="--")


def _palette(count: int) -> list[Any]:
    return [colormaps["viridis"](0.85 * i / max(count - 1, 1)) for i in range(count)]


def save_acquisition(result: dict[str, Any], folder: Path) -> None:
    """Save the figures of acquisition.json (analysis.acquisition): A and forgetting of each run, the same over
    pretraining, log-probabilities over steps, retainability. Outcomes are those of conditions, from the start that
    edited and unedited runs share."""
    runs, outcomes = result["runs"], [from_common_start(row) for row in by_condition(result)]
    labels = [label for label in outcomes[0]["loss_rise"] if all(label in r["loss_rise"] for r in outcomes)]
    colors = _palette(len(outcomes))
    if labels:
        rows = [
            {"name": r["run"], "color": c, "A": r["A"], "loss_rise": r["loss_rise"][labels[0]]}
            for r, c in zip(outcomes, colors)
        ]
        save(acquisition_and_forgetting(rows, labels[0]), folder / "acquisition_and_forgetting")
    if len(outcomes) > 1:
        save(outcomes_over_pretraining(outcomes, colors), folder / "outcomes_over_pretraining")
    colors = _palette(len(runs))
    asked = {name for run in runs for point in run["curve"] for name in point}
    parts = [[f"K_{s}_{kind}" for kind in KIND_COLORS] for s in SETTINGS if f"K_{s}" in asked]
    save(probes_by_part(runs, colors, parts), folder / "probes_over_steps")
    measured = [run for run in runs if run["dynamics"] is not None]
    if any(group["retainability"]["at"] for run in measured for group in run["dynamics"]["groups"].values()):
        save(retainability(measured), folder / "retainability")
