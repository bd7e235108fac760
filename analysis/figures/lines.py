"""Lines over pretraining: several panels, a line for each kind of results, and the three scales of the x axis.

A point is `panel`, `line`, `name` (of the checkpoint), `step` (below 0, or None, where unknown), `tokens` (or None),
`run` (points of one run have one last step), and an estimate: `value`, `low` and `high`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from analysis.canvas import LINES, in_style, legend, lengths, name_axis, palette, panels, plain, step_axis
from analysis.figures import SCALES

Point = dict[str, Any]

COLUMNS = 3  # of panels
_STYLE: Any = {"marker": "o", "markersize": 4, "capsize": 3}


def missing(points: Sequence[Mapping[str, Any]], scale: str) -> str | None:
    """The name of a point that has no place on a scale; None if all have one."""
    key = "tokens" if scale == "tokens" else "step"
    return next((p["name"] for p in points if p[key] is None or p[key] < 0), None)


def places(axes: Axes, points: Sequence[Mapping[str, Any]], scale: str = "step") -> list[float]:
    """Where points are from left to right, and the axis of it: `share` is of the largest step of the point's run. By
    name, side by side, where a place is unknown, or where two points of a line and panel have one."""
    where: list[float] = []
    if missing(points, scale) is None:
        last: dict[Any, int] = {}
        for point in points:
            last[point["run"]] = max(last.get(point["run"], 1), point["step"] or 0)
        shares = {"step": lambda p: p["step"], "share": lambda p: p["step"] / last[p["run"]]}
        where = [shares.get(scale, lambda p: p["tokens"])(point) for point in points]
    if not where or max(Counter((p.get("panel"), p["line"], x) for p, x in zip(points, where)).values()) > 1:
        names = list(dict.fromkeys(point["name"] for point in points))
        name_axis(axes, names)
        return [names.index(point["name"]) for point in points]
    step_axis(axes, SCALES[scale])
    if scale == "share":
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    if scale == "tokens":  # 84 billion are 84B here, not 84G
        billions = max(where) >= 1e9
        axes.set_xlabel(f"{SCALES[scale]}, {'billions' if billions else 'millions'}")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value / (1e9 if billions else 1e6):,g}")
    return where


@in_style
def over_pretraining(
    points: Sequence[Point], scale: str = "step", label: str = "", colors: Mapping[str, Any] | None = None
) -> tuple[Figure, list[Point]]:
    """A panel for each `panel` of the points, in the same colors; returns the rows of its CSV too.

    label: of the y axis of all panels, whose names are then titles; without it a panel's name is its label. colors: of
    lines, where they are not kinds of results.
    """
    names = list(dict.fromkeys(point["panel"] for point in points))
    columns = 2 if len(names) == 4 else min(len(names), COLUMNS)
    deep = -(-len(names) // columns)
    figure, grid = panels(1 + 5.4 * columns, 0.3 + 3.3 * deep, deep, columns)
    lines = list(dict.fromkeys(point["line"] for point in points))
    colors = colors or dict(zip(lines, LINES if len(lines) <= len(LINES) else palette(len(lines))))
    rows: list[Point] = []
    handles: dict[str, Any] = {}
    for axes, panel in zip(grid.flat, names):
        of_panel = [point for point in points if point["panel"] == panel]
        where = places(axes, of_panel, scale)
        for line in dict.fromkeys(point["line"] for point in of_panel):
            chosen = [(x, point) for x, point in zip(where, of_panel) if point["line"] == line]
            values, below, above = zip(*(lengths(point) for _, point in chosen))
            xs = [x for x, _ in chosen]
            drawn = axes.errorbar(
                xs,
                values,
                [below, above],
                color=colors[line],
                marker="o",
                markersize=4,
                capsize=3,
                label=plain(line, 80),
            )
            handles.setdefault(line, drawn)
        rows += [{key: point[key] for key in point if key != "run"} | {"x": x} for x, point in zip(where, of_panel)]
        axes.margins(x=0.08, y=0.2)
        axes.set_ylabel(label or plain(panel, 38))
        if label and len(names) > 1:
            axes.set_title(plain(panel, 60), fontsize=9)
    for axes in list(grid.flat)[len(names) :]:
        axes.set_visible(False)
    legend(figure, [handle for line, handle in handles.items() if line] if len(lines) > 1 else [])
    return figure, rows
