"""Knowledge entropy over pretraining: of models, of layers, and how coefficients are spread over memories."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis.canvas import BLUES, LINES, in_style, legend, name_axis, panels, plain, save, step_axis


@in_style
def entropy_over_steps(series: Sequence[Sequence[dict[str, Any]]], marked: Sequence[int] = ()) -> Figure:
    """Knowledge entropy over pretraining, one line a seed, bars of two standard errors; `marked` steps are larger.

    series: per seed the contents of the checkpoints' knowledge_entropy.json, ordered by step; or per kind the rows of
    a series, whose `kind` is then the line's name in a legend.
    """
    figure, [[axes]] = panels(6.4, 3.6)
    legend(figure, draw_entropy(axes, series, marked))
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


def by_kind(rows: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The rows of a series (analysis.series), a list a kind: only results of one kind are joined in one line."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        kinds.setdefault(row.get("kind", ""), []).append(row)
    return list(kinds.values())


def draw_entropy(axes: Axes, series: Sequence[Sequence[dict[str, Any]]], marked: Sequence[int]) -> list[Any]:
    """Draw the series; returns what a legend has to name: lines of several kinds, and marked steps."""
    together = iter(_places(axes, [r for results in series for r in results]))
    named: list[Any] = []
    for number, results in enumerate(series):
        steps = [next(together) for _ in results]
        kind = results[0].get("kind", "")
        color = LINES[number % len(LINES)] if kind else BLUES[2]
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
    kinds = by_kind(results)
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
    save(entropy_over_steps(by_kind(rows)), folder / "knowledge_entropy")
    save(layer_entropy_over_steps(rows), folder / "knowledge_entropy_layers")
    if series["distributions"]:
        save(coefficient_distributions(series["distributions"]), folder / "coefficient_distributions")
