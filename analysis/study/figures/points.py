"""How figures of outcomes are drawn: from rows, one a point, that are the figure's CSV as well.

A row has `panel`, `line`, `part`, `x`, and an estimate's `value`, `low` and `high`. A panel's points of one line and
part are joined; lines differ in color, parts in style. Rows without an x are a level of the whole panel. Points of one
x are drawn beside each other, so that no interval hides another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis.canvas import LINES, in_style, legend, lengths, name_axis, palette, panels, plain

Row = dict[str, Any]
Key = tuple[str, str]  # line, part

STYLES = {"": "-", "after": "-", "before": ":", "paraphrase": "-", "once": ":", "duplicate": "--"}  # of parts
COLUMNS = 4  # of panels


def point(panel: str, line: str, x: str | None, estimate: Mapping[str, Any], part: str = "", **more: Any) -> Row:
    return {"panel": panel, "line": line, "part": part, "x": x, **more} | {
        end: estimate[end] for end in ("value", "low", "high")
    }


@in_style
def draw(rows: Sequence[Row], x_label: str, order: Sequence[str] = (), joined: bool = True) -> Figure:
    """A panel for each `panel` of the rows; names along x in the order given, or of appearance; intervals are 95 %."""
    names = list(dict.fromkeys(row["panel"] for row in rows))
    columns = min(len(names), COLUMNS)
    deep = -(-len(names) // columns)
    figure, grid = panels(1 + 3.4 * columns, 0.6 + 3.1 * deep, deep, columns)
    colors = _colors(rows)
    for axes, name in zip(grid.flat, names):
        of_panel = [row for row in rows if row["panel"] == name]
        _draw(axes, of_panel, colors, order, joined)
        axes.set_title(plain(name), fontsize=10)
        axes.set_xlabel(x_label)
        ends = [end for row in of_panel for end in (row["low"], row["high"], row["value"]) if end is not None]
        if min(ends) < 0 < max(ends):
            axes.axhline(0, color="black", linewidth=0.8)
    for axes in list(grid.flat)[len(names) :]:
        axes.set_visible(False)
    keys = list(dict.fromkeys((row["line"], row["part"], row["x"] is None) for row in rows))
    named = [(", ".join(filter(None, key[:2])), key) for key in keys]
    if len(named) > 1:
        legend(figure, [_handle(text, colors[key[0]], key[1], key[2]) for text, key in named])
    return figure


def _colors(rows: Sequence[Row]) -> dict[str, Any]:
    lines = list(dict.fromkeys(row["line"] for row in rows))
    return dict(zip(lines, LINES if len(lines) <= len(LINES) else palette(len(lines))))


def _handle(text: str, color: Any, part: str, level: bool) -> Line2D:
    style = "--" if level else STYLES.get(part, "-")
    return Line2D(
        [], [], color=color, linestyle=style, marker=None if level else "o", markersize=4, label=plain(text, 60)
    )


def _draw(axes: Axes, rows: Sequence[Row], colors: Mapping[str, Any], order: Sequence[str], joined: bool) -> None:
    there = list(dict.fromkeys(row["x"] for row in rows if row["x"] is not None))
    names = [name for name in order if name in there] or there
    keys: list[Key] = list(dict.fromkeys((row["line"], row["part"]) for row in rows if row["x"] is not None))
    apart = min(0.08, 0.5 / max(len(keys), 1))
    for number, (line, part) in enumerate(keys):
        chosen = [r for r in rows if (r["line"], r["part"]) == (line, part) and r["x"] is not None]
        chosen.sort(key=lambda row: names.index(row["x"]))
        places = [names.index(row["x"]) + apart * (number - (len(keys) - 1) / 2) for row in chosen]
        values, below, above = zip(*map(lengths, chosen))
        style = STYLES.get(part, "-")
        axes.errorbar(
            places,
            values,
            [below, above],
            color=colors[line],
            linestyle=style if joined else "",
            marker="o",
            markersize=5,
            markerfacecolor="white" if style == ":" else colors[line],
            capsize=3,
        )
    for row in (row for row in rows if row["x"] is None and row["value"] is not None):
        axes.axhline(row["value"], color=colors[row["line"]], linestyle="--", linewidth=1.2)
        if row["low"] is not None and row["high"] is not None:
            axes.axhspan(row["low"], row["high"], color=colors[row["line"]], alpha=0.12, linewidth=0)
    name_axis(axes, names)
    axes.set_xlim(-0.5, max(len(names), 1) - 0.5)
