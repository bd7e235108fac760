"""Probes along a run: their log-probability over steps, and how long it stays (Chang et al., arXiv 2406.11813)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from analysis.canvas import GREY, KIND_COLORS, beside, in_style, legend, legend_of_runs, panels, plain, step_axis
from analysis.rows import columns_of
from olmo.knowledge.entries import SETTINGS

Run = dict[str, Any]  # a run or condition of acquisition.json or study.json
Drawn = tuple[Figure, list[dict[str, Any]]]  # a figure, and the rows of its CSV


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


def _grid(runs: Sequence[Run], settings: Sequence[str], **options: Any) -> tuple[Figure, Any]:
    """A row of panels a run, a column a setting."""
    figure, grid = panels(1.2 + 4.6 * len(settings), 0.8 + 3 * len(runs), len(runs), len(settings), **options)
    for row, run in zip(grid, runs):
        for axes, setting in zip(row, settings):
            axes.set_title(f"{plain(run['run'])}: {setting}", fontsize=9)
    return figure, grid


def _legend_of_kinds(figure: Figure, *more: Line2D) -> None:
    kinds = [Line2D([], [], color=color, marker="o", markersize=4, label=kind) for kind, color in KIND_COLORS.items()]
    legend(figure, [*kinds, *more])


def settings_of_curves(runs: Sequence[Run]) -> list[str]:
    """The settings of which any evaluation of any run has a kind of probe."""
    asked = {name for run in runs for point in run["curve"] for name in point}
    return [s for s in SETTINGS if any(f"K_{s}_{kind}" in asked for kind in KIND_COLORS)]


@in_style
def probes_by_kind(runs: Sequence[Run]) -> Drawn:
    """Change of the log-probability of probes since the start, over steps: a row of panels a run, a column a setting, a
    line a kind of probe, a mark at every injection (Chang et al., figure 2).

    runs: `run`, `begins`, `injections` and `curve`, a list of {step, K_{setting}_{kind}: value}.
    """
    settings = settings_of_curves(runs)
    figure, grid = _grid(runs, settings, sharey=True)
    rows = []
    for row, run in zip(grid, runs):
        begins, injections = run.get("begins") or 0, run["injections"]
        for axes, setting in zip(row, settings):
            _mark(axes, [step - begins for step in injections])
            for kind, color in KIND_COLORS.items():
                steps, values = _points(run, f"K_{setting}_{kind}")
                at, change = [step - begins for step in steps], [value - values[0] for value in values]
                axes.plot(at, change, color=color, linewidth=1.2, marker="o" if len(at) <= 40 else None, markersize=3)
                named = {"run": run["run"], "setting": setting, "kind": kind}
                for step, value in zip(steps, change):
                    rows.append({**named, "step": step, "change": value, "is injection": step in injections})
            axes.axhline(0, color="black", linewidth=0.8)
            step_axis(axes, "")
    figure.supxlabel("step of training", fontsize=10)
    figure.supylabel("change of log-probability", fontsize=10)
    _legend_of_kinds(figure, Line2D([], [], color=GREY, linewidth=0.7, linestyle=":", label="injection"))
    return figure, rows


def _measured(run: Run, setting: str, curve: str) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """(kind, group, its curve) of the kinds of a setting that have one with points."""
    groups = (run["dynamics"] or {"groups": {}})["groups"]
    for kind in KIND_COLORS:
        group = groups.get(f"{setting}_{kind}", {})
        if group.get(curve, {}).get("at"):
            yield kind, group, group[curve]


def _settings(runs: Sequence[Run], curve: str) -> list[str]:
    """The settings of which any run has a point."""
    return [setting for setting in SETTINGS if any(list(_measured(run, setting, curve)) for run in runs)]


def has_points(runs: Sequence[Run], curve: str) -> bool:
    """Whether any run has any point of `effectivity_by_injection` or `retainability` by setting and kind."""
    return bool(_settings(runs, curve))


def _ends(curve: dict[str, Any]) -> list[list[float]]:
    """Both ends of the intervals, NaN where unknown."""
    return [[math.nan if end is None else end for end in curve[name]] for name in ("low", "high")]


@in_style
def effectivity_by_injection(runs: Sequence[Run]) -> Drawn:
    """Mean effectivity by the number of the injection, with 95 % intervals: a row of panels a run, a column a setting,
    a line a kind of probe (Chang et al., figure 3).

    runs: `run` and `dynamics`.`groups`, named {setting}_{kind}, with `effectivity_by_injection` (at, mean, low, high,
    values).
    """
    settings = _settings(runs, "effectivity_by_injection")
    figure, grid = _grid(runs, settings, sharex=True, sharey=True)
    rows = []
    for row, run in zip(grid, runs):
        for axes, setting in zip(row, settings):
            for kind, _, curve in _measured(run, setting, "effectivity_by_injection"):
                axes.plot(curve["at"], curve["mean"], color=KIND_COLORS[kind], marker="o", markersize=4)
                axes.vlines(curve["at"], *_ends(curve), color=KIND_COLORS[kind], alpha=0.4)
                rows += _rows(run, setting, kind, "injection", curve)
            axes.axhline(0, color="black", linewidth=0.8)
            axes.xaxis.set_major_locator(MaxNLocator(10, integer=True))
    grid[0][0].set_xlim(0.5, max((row["injection"] for row in rows), default=1) + 0.5)
    figure.supxlabel("number of the injection", fontsize=10)
    figure.supylabel("mean effectivity", fontsize=10)
    _legend_of_kinds(figure)
    return figure, rows


def _rows(run: Run, setting: str, kind: str, x: str, curve: dict[str, Any]) -> list[dict[str, Any]]:
    columns = {x: "at", "mean": "mean", "low": "low", "high": "high", "values": "values"}
    points = zip(*(curve[key] for key in columns.values()))
    return [{"run": run["run"], "setting": setting, "kind": kind, **dict(zip(columns, point))} for point in points]


@in_style
def retainability(runs: Sequence[Run], in_tokens: bool = False) -> Drawn:
    """Mean retainability over the time since the maximum, on a log axis, with its intervals and the line of its fit: a
    row of panels a run, a column a setting that has any, a colour a kind of probe. The larger a point, the more values
    it is the mean of. The time is in steps, or in tokens of runs whose `tokens_per_step` is known.

    runs: `run` and `dynamics`.`groups`, named {setting}_{kind}, with `retainability` (at, mean, low, high, values) and
    `decay`. The legend has a, its standard error, R^2 and the x-intercept of each fit.
    """
    settings = _settings(runs, "retainability")
    figure, grid = panels(
        1.2 + 6.6 * len(settings), 0.8 + 3.2 * len(runs), len(runs), len(settings), sharex=True, sharey=True
    )
    unit, rows = "tokens" if in_tokens else "steps", []
    for row, run in zip(grid, runs):
        scale = run["tokens_per_step"] if in_tokens else 1
        for axes, setting in zip(row, settings):
            for kind, group, curve in _measured(run, setting, "retainability"):
                _decay_of(axes, group, kind, scale, unit)
                fit = _fit(group, scale)
                rows += [point | fit for point in _rows(run, setting, kind, unit, _scaled(curve, scale))]
            axes.axhline(0, color="black", linewidth=0.8)
            axes.set(xscale="log", ylim=(-0.25, 1.25))
            axes.set_title(f"{plain(run['run'])}: {setting}", fontsize=9)
            beside(axes)
    figure.supxlabel(f"{unit} since the maximum after the last injection", fontsize=10)
    figure.supylabel("mean retainability R(q, t)", fontsize=10)
    return figure, rows


def _scaled(curve: dict[str, Any], scale: int) -> dict[str, Any]:
    return {**curve, "at": [time * scale for time in curve["at"]]}


def _fit(group: dict[str, Any], scale: int) -> dict[str, Any]:
    """Numbers of the fitted line; the slope is the same for steps and tokens, the x-intercept is not."""
    fit = group["decay"] or {}
    zero = (fit.get("x_intercept") or {}).get("value")
    return {
        **columns_of("a", fit.get("a")),
        "standard error of a": fit.get("standard_error"),
        "R^2": fit.get("r_squared"),
        "x-intercept": None if zero is None else zero * scale,
    }


def _decay_of(axes: Axes, group: dict[str, Any], kind: str, scale: int, unit: str) -> None:
    curve, fit, color = _scaled(group["retainability"], scale), group["decay"], KIND_COLORS[kind]
    sizes = [number / max(curve["values"]) for number in curve["values"]]
    axes.vlines(curve["at"], *_ends(curve), color=color, alpha=0.4, linewidths=[1.5 * size for size in sizes])
    label = kind if fit is None else f"{kind}\n{_words(_fit(group, scale), unit)}"
    axes.scatter(curve["at"], curve["mean"], [12 * size for size in sizes], color=color, linewidth=0, label=label)
    if fit is not None:
        times, heights = zip(*fit["line"])
        axes.plot([time * scale for time in times], heights, color=color, linewidth=1.5, linestyle="--")


def _words(fit: dict[str, Any], unit: str) -> str:
    """A fit in two lines of a legend; an x-intercept that is unbounded or far beyond any run is infinite."""
    error, squared, zero = fit["standard error of a"], fit["R^2"], fit["x-intercept"]
    first = f"a = {fit['a']:.3f}" + ("" if error is None else f" (standard error {error:.3f})")
    second = "" if squared is None else f"$R^2$ = {squared:.2f}, "
    return f"{first}\n{second}x-intercept {'∞' if zero is None or zero > 1e15 else f'{zero:.2g}'} {unit}"
