"""Probes along a run: their log-probability over steps, and how long it stays (Chang et al., arXiv 2406.11813)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis.canvas import GREY, KIND_COLORS, beside, in_style, legend, legend_of_runs, panels, plain, step_axis
from olmo.knowledge.entries import SETTINGS


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
    legend_of_runs(figure, runs, colors)
    return figure


def _points(run: dict[str, Any], measure: str) -> tuple[list[int], list[float]]:
    """Steps and values of a measure, of the evaluations that have it."""
    points = [p for p in run["curve"] if measure in p]
    return [p["step"] for p in points], [p[measure] for p in points]


def _mark(axes: Axes, injections: Sequence[int]) -> None:
    for step in injections:
        axes.axvline(step, color=GREY, linewidth=0.7, linestyle=":")


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
