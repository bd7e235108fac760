"""Knowledge entropy over pretraining: of models, of layers, and how coefficients are spread over memories."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis.breadth import BREADTHS, MOST_ACTIVE
from analysis.canvas import BLUES, LINES, in_style, legend, panels, plain, save
from analysis.figures.lines import Point, over_pretraining, places
from analysis.pairs import OTHERS

_OVERLAPS = {
    "from_previous": f"overlap of the most active {MOST_ACTIVE:.0%} of memories with the checkpoint before",
    "from_first": f"overlap of the most active {MOST_ACTIVE:.0%} of memories with the first checkpoint",
}


@in_style
def entropy_over_steps(series: Sequence[Sequence[dict[str, Any]]], marked: Sequence[int] = ()) -> Figure:
    """Knowledge entropy over pretraining, one line a seed, bars of two standard errors; `marked` steps are larger.

    series: per seed the contents of the checkpoints' knowledge_entropy.json, ordered by step; or per kind the rows of
    a series, whose `kind` is then the line's name in a legend.
    """
    figure, [[axes]] = panels(6.4, 3.6)
    legend(figure, draw_entropy(axes, series, marked))
    return figure


def _points(results: Sequence[dict[str, Any]], line: object = "") -> list[dict[str, Any]]:
    """Where results are on an x axis (`analysis.figures.lines`). Results of one model are of one run, unless the name
    of their kind has several (`analysis.kinds`)."""
    return [
        {
            "line": line,
            "name": r.get("name", ""),
            "step": r.get("position", r["checkpoint"]["step"]),
            "tokens": r.get("tokens"),
            "run": (r.get("model"), r.get("run")),
        }
        for r in results
    ]


def _bars(value: float, error: float | None) -> dict[str, float]:
    """An interval of two standard errors."""
    return {"value": value, "low": value - 2 * (error or 0.0), "high": value + 2 * (error or 0.0)}


def by_kind(rows: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The rows of a series (analysis.series), a list a kind: only results of one kind are joined in one line."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        kinds.setdefault(row.get("kind", ""), []).append(row)
    return list(kinds.values())


def draw_entropy(axes: Axes, series: Sequence[Sequence[dict[str, Any]]], marked: Sequence[int]) -> list[Any]:
    """Draw the series; returns what a legend has to name: lines of several kinds, and marked steps."""
    together = iter(places(axes, [point for n, results in enumerate(series) for point in _points(results, n)]))
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
def layer_entropy_over_steps(results: Sequence[dict[str, Any]], scale: str = "step") -> Figure:
    """H of every layer over pretraining, bars of two standard errors, a panel for each kind of results."""
    kinds = by_kind(results)
    figure, [grid] = panels(6.4 * len(kinds), 3.6, columns=len(kinds))
    handles = [_layers(axes, rows, scale) for axes, rows in zip(grid, kinds)]
    if len(kinds) > 1:
        for axes, rows in zip(grid, kinds):
            axes.set_title(plain(rows[0]["kind"], 70), fontsize=9)
    legend(figure, max(handles, key=len))
    return figure


def numbers_of_layers(result: Mapping[str, Any]) -> Sequence[int]:
    """The numbers, in the model, of the layers of a result."""
    return result.get("layer_numbers") or range(len(result["layers"]))


def _layers(axes: Axes, results: Sequence[dict[str, Any]], scale: str) -> list[Line2D]:
    """Draw the layers of one kind of results; returns what a legend has to name."""
    where, layers, named = places(axes, _points(results), scale), len(results[0]["layers"]), []
    for layer, number in enumerate(numbers_of_layers(results[0])):
        values = [r["layers"][layer] for r in results]
        errors = [2 * (r["layer_standard_errors"][layer] or 0.0) for r in results]
        color = colormaps["viridis"](0.85 * layer / max(layers - 1, 1))
        axes.errorbar(where, values, errors, color=color, marker="o", markersize=4, capsize=3)
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


def series_over_pretraining(rows: Sequence[dict[str, Any]], scale: str = "step") -> tuple[Figure, list[Point]]:
    """H of the rows of a series, a line a kind, a panel for each model: models differ in their ceiling."""
    points = [
        {"panel": row.get("model", ""), **point, **_bars(row["knowledge_entropy"], row["standard_error"])}
        for row in rows
        for point in _points([row], row["kind"])
    ]
    return over_pretraining(points, scale, "knowledge entropy H (nats)")


def measures_over_pretraining(
    rows: Sequence[dict[str, Any]], measures: Mapping[str, str], scale: str = "step", shared: Mapping[str, str] = {}
) -> tuple[Figure, list[Point]] | None:
    """Measures of the rows of a series other than H, a panel each, a line a kind, bars of two standard errors; None
    where no row has one. measures: titles by name. shared: titles of the row's overlaps with other checkpoints."""
    found = [(title, row, row["measures"].get(name)) for name, title in measures.items() for row in rows]
    found += [(title, row, row["overlap"].get(name)) for name, title in shared.items() for row in rows]
    points = [
        {"panel": title, **point, **_bars(one["value"], one["standard_error"])}
        for title, row, one in found
        if one is not None
        for point in _points([row], row["kind"])
    ]
    return over_pretraining(points, scale) if points else None


def save_series(series: dict[str, Any], folder: Path, scale: str = "step") -> None:
    """Save the figures of `knowledge_entropy_series.json` (analysis.series)."""
    rows = series["rows"]
    figure, points = series_over_pretraining(rows, scale)
    save(figure, folder / "knowledge_entropy", points)
    layers = [
        {"kind": row["kind"], "name": row["name"], "step": row["position"], "layer": number}
        | {"value": value, "standard_error": error}
        for row in rows
        for number, value, error in zip(numbers_of_layers(row), row["layers"], row["layer_standard_errors"])
    ]
    save(layer_entropy_over_steps(rows, scale), folder / "knowledge_entropy_layers", layers)
    for name, measures, shared in (("other_entropies", OTHERS, {}), ("breadth", BREADTHS, _OVERLAPS)):
        if (drawn := measures_over_pretraining(rows, measures, scale, shared)) is not None:
            save(drawn[0], folder / name, drawn[1])
    if series["distributions"]:
        shares = [
            {"name": one["name"], "layer": layer, "rank": rank, "share": share}
            for one in series["distributions"]
            for layer, values in zip(one.get("layer_numbers", range(len(one["shares"]))), one["shares"])
            for rank, share in zip(one["ranks"], values)
        ]
        save(coefficient_distributions(series["distributions"]), folder / "coefficient_distributions", shares)
