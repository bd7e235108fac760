"""Every figure, drawn from saved numbers. Nothing is computed here but positions on paper.

Drawing leaves matplotlib's global state (backend, rcParams, pyplot's figures) unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator

from olmo.files.atomic import atomic_path
from olmo.knowledge.entries import SETTINGS

BLUES = ("#9ecae1", "#4292c6", "#08306b")  # early, middle, last checkpoint
ORANGES = ("#fdae6b", "#e6550d")  # resuscitated, q = 1 and q = 2
GREY = "#7f7f7f"
KINDS = (BLUES[2], ORANGES[1], "#31a354", "#756bb1", "#e7298a", "#8c6d31", GREY, "#17becf")  # of results, a line each
KIND_COLORS = {"memorization": "#08306b", "semantic": "#e6550d", "composition": "#31a354"}

_in_style = rc_context(  # a decorator
    {
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.25,
        "legend.frameon": False,
        "figure.constrained_layout.use": True,
    }
)


def _panels(width: float, height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Figure, Any]:
    """A figure of a size in inches, and its axes (rows, columns)."""
    figure = Figure(figsize=(width, height))
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


@_in_style
def save(figure: Figure, stem: Path) -> Path:
    """Write PNG and PDF beside each other, each atomically; returns the PNG's path."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    for suffix in (".png", ".pdf"):
        with atomic_path(stem.with_suffix(suffix)) as partial:
            figure.savefig(partial, dpi=160)
    return stem.with_suffix(".png")


@_in_style
def entropy_over_steps(series: Sequence[Sequence[dict[str, Any]]], marked: Sequence[int] = ()) -> Figure:
    """Knowledge entropy over pretraining, one line a seed, bars of two standard errors; `marked` steps are larger.

    series: per seed the contents of the checkpoints' knowledge_entropy.json, ordered by step; or per kind the rows of
    a series, whose `kind` is then the line's name in a legend.
    """
    figure, [[axes]] = _panels(6.4, 3.6)
    _entropy(axes, series, marked)
    return figure


def _places(axes: Axes, results: Sequence[dict[str, Any]]) -> list[int]:
    """Positions of results from left to right: their steps, or side by side, by name, where one is unknown."""
    steps = [r["checkpoint"]["step"] for r in results]
    if min(steps) >= 0:
        axes.set_xlabel("pretraining step")
        return steps
    names = list(dict.fromkeys(r["name"] for r in results))
    axes.set_xticks(range(len(names)), names, rotation=20, ha="right")
    return [names.index(r["name"]) for r in results]


def _by_kind(rows: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The rows of a series (analysis.series), a list a kind: only results of one kind are joined in one line."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        kinds.setdefault(row.get("kind", ""), []).append(row)
    return list(kinds.values())


def _entropy(axes: Axes, series: Sequence[Sequence[dict[str, Any]]], marked: Sequence[int]) -> None:
    together, kinds = iter(_places(axes, [r for results in series for r in results])), []
    for number, results in enumerate(series):
        steps = [next(together) for _ in results]
        kinds.append(results[0].get("kind", ""))
        color = KINDS[number % len(KINDS)] if kinds[-1] else BLUES[2]
        values = [r["knowledge_entropy"] for r in results]
        errors = [2 * (r["standard_error"] or 0.0) for r in results]
        alpha = 1.0 if kinds[-1] else max(1 - 0.25 * number, 0.25)
        line = axes.errorbar(steps, values, errors, color=color, alpha=alpha, marker="o", markersize=4, capsize=3)
        line.set_label(kinds[-1])
        for color, step in zip(BLUES, marked if number == 0 else ()):
            height = values[steps.index(step)]
            axes.plot(step, height, "o", color=color, markersize=11, zorder=5)
            axes.annotate(f"step {step}", (step, height), textcoords="offset points", xytext=(0, 13), ha="center")
    axes.margins(x=0.08, y=0.2)
    axes.set(ylabel="knowledge entropy H (nats)", title="Knowledge entropy over pretraining")
    if any(kinds):
        axes.figure.legend(loc="outside lower center", fontsize=8)


@_in_style
def layer_entropy_over_steps(results: Sequence[dict[str, Any]]) -> Figure:
    """H of every layer over pretraining, bars of two standard errors, a panel for each kind of results."""
    kinds = _by_kind(results)
    figure, [panels] = _panels(6.4 * len(kinds), 3.6, columns=len(kinds))
    for axes, rows in zip(panels, kinds):
        _layers(axes, rows)
        if len(kinds) > 1:
            axes.set_title(rows[0]["kind"], fontsize=9)
    return figure


def _layers(axes: Axes, results: Sequence[dict[str, Any]]) -> None:
    steps = _places(axes, results)
    layers = len(results[0]["layers"])
    for layer in range(layers):
        values = [r["layers"][layer] for r in results]
        errors = [2 * (r["layer_standard_errors"][layer] or 0.0) for r in results]
        color = colormaps["viridis"](0.85 * layer / max(layers - 1, 1))
        axes.errorbar(
            steps, values, errors, color=color, marker="o", markersize=4, capsize=3, label=f"layer {layer + 1}"
        )
    axes.set(ylabel="entropy of the layer (nats)", title="Knowledge entropy per layer")
    if layers <= 8:
        axes.legend(ncols=2, loc="upper right")
    else:
        axes.legend(ncols=math.ceil(layers / 16), fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))


@_in_style
def coefficient_distributions(checkpoints: Sequence[dict[str, Any]]) -> Figure:
    """How each layer spreads its coefficients over its memories: shares, largest first, a line a checkpoint.

    checkpoints: `name`, `ranks` (0 the most used memory of the layer, 1 the least) and `shares` (layers, ranks).
    """
    layers = len(checkpoints[0]["shares"])
    columns = min(layers, 4)
    rows = math.ceil(layers / columns)
    figure, panels = _panels(1.2 + 2.6 * columns, 1 + 2.1 * rows, rows, columns, sharex=True, sharey=True)
    colors = BLUES if len(checkpoints) == 3 else (BLUES[0], BLUES[2])
    for layer, axes in enumerate(panels.flat):
        if layer >= layers:
            axes.set_visible(False)
            continue
        for number, (one, color) in enumerate(zip(checkpoints, colors)):
            label = one["name"] if layer == 0 else None
            axes.plot(one["ranks"], one["shares"][layer], color=color, label=label, zorder=2 + number)
        axes.set_yscale("log")
        axes.set_title(f"layer {layer + 1}", fontsize=9)
    figure.supxlabel("memories of the layer, most used first (fraction of all)", fontsize=10)
    figure.supylabel("share of the coefficients, $p_i$", fontsize=10)
    figure.legend(loc="outside upper center", ncols=len(checkpoints))
    return figure


def save_series(series: dict[str, Any], folder: Path) -> None:
    """Save the figures of `knowledge_entropy_series.json` (analysis.series)."""
    rows = series["rows"]
    save(entropy_over_steps(_by_kind(rows)), folder / "knowledge_entropy")
    save(layer_entropy_over_steps(rows), folder / "knowledge_entropy_layers")
    if series["distributions"]:
        save(coefficient_distributions(series["distributions"]), folder / "coefficient_distributions")


def _lengths(estimate: dict[str, Any]) -> tuple[float, float, float]:
    """(value, length of the interval below it, above it); lengths are 0 where an end is unknown, a value NaN."""
    value = math.nan if estimate["value"] is None else estimate["value"]
    low, high = (value if estimate[end] is None else estimate[end] for end in ("low", "high"))
    return value, max(value - low, 0.0), max(high - value, 0.0)


def bars(
    axes: Axes, names: Sequence[str], estimates: Sequence[dict[str, float]], colors: Sequence[str], label: str
) -> None:
    """Estimates with their intervals as bars."""
    values, below, above = zip(*map(_lengths, estimates))
    axes.bar(range(len(names)), values, yerr=[below, above], color=colors, capsize=4, width=0.7)
    axes.set_xticks(range(len(names)), names)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_ylabel(label)


@_in_style
def overview(
    series: Sequence[Sequence[dict[str, Any]]], marked: Sequence[int], rows: Sequence[dict[str, Any]], loss_label: str
) -> Figure:
    """The study in one row: entropy over pretraining, and what each start acquires and forgets."""
    figure, [[left, middle, right]] = _panels(13.5, 3.7, columns=3, width_ratios=(1.3, 1, 1))
    _entropy(left, series, marked)
    _acquired_and_forgotten(middle, right, rows, loss_label)
    return figure


@_in_style
def acquisition_and_forgetting(rows: Sequence[dict[str, Any]], loss_label: str) -> Figure:
    """A and forgetting by starting point. rows: `name`, `color`, `A` and `loss_rise` estimates of each condition."""
    figure, [[left, right]] = _panels(10.5, 3.8, columns=2)
    _acquired_and_forgotten(left, right, rows, loss_label)
    return figure


def _acquired_and_forgotten(left: Axes, right: Axes, rows: Sequence[dict[str, Any]], loss_label: str) -> None:
    names, colors = [r["name"] for r in rows], [r["color"] for r in rows]
    bars(left, names, [r["A"] for r in rows], colors, "A, % (95 % interval)")
    left.set_title("Knowledge acquired")
    bars(right, names, [r["loss_rise"] for r in rows], colors, f"rise of held-out {loss_label} loss, %")
    right.set_title("Knowledge forgotten")


@_in_style
def probes_over_steps(
    curves: Sequence[dict[str, Any]], injections: Sequence[int], measure: str = "K", title: str = ""
) -> Figure:
    """Log-probability of the probes over training, with a mark at every injection.

    curves: `name`, `color` and `curve`, a list of {step, K, K_paraphrase, K_once}.
    """
    figure, [[axes]] = _panels(6.4, 3.8)
    _mark(axes, injections, label="injection round")
    for run in curves:
        label = run["name"].replace("\n", " ")
        axes.plot(*_points(run, measure), marker="o", markersize=3.5, color=run["color"], label=label)
    axes.set(xlabel="step of continual training", ylabel="log-probability of the target span", title=title)
    axes.legend(fontsize=8, loc="upper right")
    return figure


@_in_style
def probes_by_part(runs: Sequence[dict[str, Any]], colors: Sequence[Any], parts: Sequence[Sequence[str]]) -> Figure:
    """Log-probability over steps, a panel for each of `parts`, rows of names of measures such as K_once_semantic; a
    mark at every injection.

    runs: `run`, `curve`, a list of {step, measure: value, ...}, and `injections`, steps.
    """
    injections = sorted({step for run in runs for step in run["injections"]})  # a control has none
    rows, columns = len(parts), len(parts[0])
    figure, panels = _panels(1.2 + 3.4 * columns, 1.2 + 2.4 * rows, rows, columns, sharex=True)
    for axes, measure in zip(panels.flat, (measure for row in parts for measure in row)):
        _mark(axes, injections)
        for run, color in zip(runs, colors):
            steps, values = _points(run, measure)
            marker = "o" if len(steps) <= 40 else None
            axes.plot(steps, values, color=color, linewidth=1.2, marker=marker, markersize=3)
        axes.set_title(measure.removeprefix("K_").replace("_", ", "), fontsize=9)
    figure.supxlabel("step of training (dotted: injection)", fontsize=10)
    figure.supylabel("log-probability of the target span", fontsize=10)
    _legend_of_runs(figure, runs, colors)
    return figure


def _points(run: dict[str, Any], measure: str) -> tuple[list[int], list[float]]:
    """Steps and values of a measure, of the evaluations that have it."""
    points = [p for p in run["curve"] if measure in p]
    return [p["step"] for p in points], [p[measure] for p in points]


def _mark(axes: Axes, injections: Sequence[int], label: str | None = None) -> None:
    for number, step in enumerate(injections):
        axes.axvline(step, color=GREY, linewidth=0.7, linestyle=":", label=None if number else label)


def _legend_of_runs(figure: Figure, runs: Sequence[dict[str, Any]], colors: Sequence[Any]) -> None:
    handles = [Line2D([], [], color=color, marker="o", markersize=4, label=r["run"]) for r, color in zip(runs, colors)]
    figure.legend(handles=handles, loc="outside upper center", ncols=min(len(runs), 3), fontsize=8)


@_in_style
def outcomes_over_pretraining(runs: Sequence[dict[str, Any]], colors: Sequence[Any]) -> Figure:
    """A, F and the rise of the first held-out loss, those that any run has, over the pretraining steps from which runs
    started; side by side where a step is unknown.

    runs: `run`, `start`, and the estimates `A`, `downstream`.`F` (or None) and `loss_rise`.
    """
    labels = list(dict.fromkeys(label for run in runs for label in run["loss_rise"]))[:1]
    measures = {
        "A, %": [run["A"] for run in runs],
        "F, %": [(run["downstream"] or {}).get("F") for run in runs],
        **{f"rise of held-out {label} loss, %": [run["loss_rise"].get(label) for run in runs] for label in labels},
    }
    measures = {name: found for name, found in measures.items() if any(found)}
    figure, panels = _panels(1 + 4.2 * len(measures), 3.8, columns=len(measures))
    starts = [run["start"] for run in runs]
    known = None not in starts
    places = starts if known else list(range(len(runs)))
    for axes, (name, estimates) in zip(panels.flat, measures.items()):
        for place, estimate, color in zip(places, estimates, colors):
            if estimate is not None:
                value, below, above = _lengths(estimate)
                ends = [[below], [above]]
                axes.errorbar([place], [value], ends, color=color, marker="o", markersize=6, capsize=4)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_title(name)
        axes.margins(x=0.1)
        if known:
            axes.set_xlabel("pretraining step of the start")
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        else:
            axes.set_xticks(places, [run["run"] for run in runs], rotation=20, ha="right")
    figure.supylabel("95 % interval", fontsize=10)
    _legend_of_runs(figure, runs, colors)
    return figure


@_in_style
def retainability(runs: Sequence[dict[str, Any]]) -> Figure:
    """Mean retainability over the time since the maximum, on a log axis, with its intervals and the line of its fit: a
    row of panels a run, a column a setting that has any, a colour a kind of probe. The larger a point, the more values
    it is the mean of.

    runs: `run` and `dynamics`.`groups`, named {setting}_{kind}, with `retainability` (at, mean, low, high) and `decay`.
    """
    groups = [item for run in runs for item in run["dynamics"]["groups"].items()]
    settings = [s for s in SETTINGS if any(name == s and group["retainability"]["at"] for name, group in groups)]
    rows, columns = len(runs), len(settings)
    figure, panels = _panels(1.2 + 4.2 * columns, 0.8 + 3.2 * rows, rows, columns, sharex=True, sharey=True)
    for row, run in zip(panels, runs):
        for axes, setting in zip(row, settings):
            for kind, color in KIND_COLORS.items():
                group = run["dynamics"]["groups"].get(f"{setting}_{kind}")
                if group is not None and group["retainability"]["at"]:
                    _decay_of(axes, group, kind, color)
            axes.axhline(0, color="black", linewidth=0.8)
            axes.set(xscale="log", ylim=(-0.25, 1.25))
            axes.set_title(f"{run['run']}: {setting}", fontsize=9)
            if axes.get_legend_handles_labels()[0]:
                axes.legend(fontsize=8, loc="upper right")
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


def save_acquisition(result: dict[str, Any], folder: Path) -> None:
    """Save the figures of acquisition.json (analysis.acquisition): A and forgetting of each run, the same over
    pretraining, log-probabilities over steps, retainability."""
    runs, palette = result["runs"], colormaps["viridis"]
    colors = [palette(0.85 * i / max(len(runs) - 1, 1)) for i in range(len(runs))]
    labels = [label for label in runs[0]["loss_rise"] if all(label in r["loss_rise"] for r in runs)]
    if labels:
        rows = [
            {"name": r["run"], "color": c, "A": r["A"], "loss_rise": r["loss_rise"][labels[0]]}
            for r, c in zip(runs, colors)
        ]
        save(acquisition_and_forgetting(rows, labels[0]), folder / "acquisition_and_forgetting")
    if len(runs) > 1:
        save(outcomes_over_pretraining(runs, colors), folder / "outcomes_over_pretraining")
    asked = {name for run in runs for point in run["curve"] for name in point}
    parts = [[f"K_{s}_{kind}" for kind in KIND_COLORS] for s in SETTINGS if f"K_{s}" in asked]
    save(probes_by_part(runs, colors, parts), folder / "probes_over_steps")
    measured = [run for run in runs if run["dynamics"] is not None]
    if any(group["retainability"]["at"] for run in measured for group in run["dynamics"]["groups"].values()):
        save(retainability(measured), folder / "retainability")
