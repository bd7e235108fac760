"""What figures are drawn on: their style, panels, legends outside the axes, labels, and files.

Matplotlib's global state (backend, rcParams, pyplot's figures) is never changed.
"""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, cast

from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator

from analysis.rows import as_csv
from olmo.files.atomic import atomic_path, write_text

LINE = 0.19  # inches, of a legend in small print
CHARACTER = 0.075

BLUES = ("#9ecae1", "#4292c6", "#08306b")  # early, middle, last checkpoint
ORANGES = ("#fdae6b", "#e6550d")  # resuscitated, q = 1 and q = 2
GREY = "#7f7f7f"
LINES = (BLUES[2], ORANGES[1], "#31a354", "#756bb1", "#e7298a", "#8c6d31", GREY, "#17becf")  # of kinds of results
KIND_COLORS = {"memorization": "#08306b", "semantic": "#e6550d", "composition": "#31a354"}  # of probes

in_style = rc_context(  # a decorator
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


class Drawing(Figure):
    """A figure that a notebook shows without pyplot, whose import would have IPython show figures."""

    def _repr_png_(self) -> bytes:
        with BytesIO() as file:
            self.savefig(file, format="png")
            return file.getvalue()


def panels(width: float, height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Figure, Any]:
    """A figure of a size in inches, and its axes (rows, columns)."""
    figure = Drawing(figsize=(width, height))
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


@in_style
def save(figure: Figure, stem: Path, rows: Sequence[Mapping[str, Any]] = ()) -> Path:
    """Write `stem`.png and .pdf, and the numbers that the figure shows as .csv, each atomically; returns the PNG's
    path.

    rows: one a point, bar or panel of the figure, {column: number or name}; without any there is no .csv.
    """
    stem.parent.mkdir(parents=True, exist_ok=True)
    csv, pdf, png = (stem.with_name(stem.name + suffix) for suffix in (".csv", ".pdf", ".png"))
    if rows:
        write_text(csv, as_csv(rows))
    # The layout takes most of the time, and is the same for both files.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for path in (pdf, png):
        with atomic_path(path) as partial:
            figure.savefig(partial, dpi=160)
    return png


def plain(text: str, width: int = 40) -> str:
    """A name as it is written, in lines of a width: a $ would begin a formula, a leading _ would leave it out of a
    legend, and a control character has no glyph."""
    printable = "".join(c if c.isprintable() or c == "\n" else "?" for c in text).replace("$", r"\$")
    lines = [part for line in printable.split("\n") for part in textwrap.wrap(line, width) or [""]]
    return "\n".join(lines) if not printable.startswith("_") else " " + "\n".join(lines)


def legend(figure: Figure, handles: Sequence[Any]) -> None:
    """A legend above the axes, of as many columns as fit; the figure grows by its height."""
    if not handles:
        return
    labels = [str(handle.get_label()) for handle in handles]
    longest = max(len(line) for label in labels for line in label.split("\n"))
    columns = max(1, min(len(labels), 8, int(figure.get_figwidth() / (CHARACTER * longest + 0.6))))
    rows = [labels[row::columns] for row in range(columns)]  # of equal height at least
    lines = max(sum(label.count("\n") + 1 for label in row) for row in rows)
    figure.set_figheight(figure.get_figheight() + LINE * lines)
    figure.legend(handles=list(handles), loc="outside upper center", ncols=columns, fontsize=8)


def legend_of_runs(figure: Figure, runs: Sequence[dict[str, Any]], colors: Sequence[Any]) -> None:
    """A legend of the names of runs in their colors."""
    names = [plain(run["run"]) for run in runs]
    legend(figure, [Line2D([], [], color=c, marker="o", markersize=4, label=n) for n, c in zip(names, colors)])


def palette(count: int) -> list[Any]:
    """Colors of a number of runs, in order."""
    return [colormaps["viridis"](0.85 * i / max(count - 1, 1)) for i in range(count)]


def beside(axes: Axes) -> None:
    """A legend of the axes' own labels, to the right of them."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))


def step_axis(axes: Axes, label: str) -> None:
    """An x axis of steps, of the same kind in every figure: 0, 500, 1k, 738k."""
    axes.set_xlabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def name_axis(axes: Axes, names: Sequence[str]) -> None:
    """An x axis of names side by side, slanted where they are long or too many for the axis."""
    labels = [plain(name) for name in names]
    longest = max((len(line) for label in labels for line in label.split("\n")), default=0)
    figure = cast(Figure, axes.figure)
    width = axes.get_position().width * figure.get_figwidth()
    if longest > 14 or len(labels) * (longest + 1) * CHARACTER > width:
        figure.set_figheight(max(figure.get_figheight(), 3.6 + CHARACTER * longest / 2))
        labels = [label.replace("\n", " ") if len(label) <= 24 else label for label in labels]
        axes.set_xticks(range(len(labels)), labels, rotation=30, ha="right", rotation_mode="anchor", fontsize=8)
    else:
        axes.set_xticks(range(len(labels)), labels)


def side_by_side(places: Sequence[float]) -> list[float]:
    """Places on an axis, moved apart where several are one, so that no interval hides another."""
    distinct = sorted(set(places))
    most = max(places.count(place) for place in distinct)
    gap = min((b - a for a, b in itertools.pairwise(distinct)), default=1.0)
    apart = min(0.03 * (distinct[-1] - distinct[0]) if len(distinct) > 1 else 1.0, 0.8 * gap / most)
    seen: dict[float, int] = {}
    moved = []
    for place in places:
        seen[place] = seen.get(place, -1) + 1
        moved.append(place + apart * (seen[place] - (places.count(place) - 1) / 2))
    return moved


def lengths(estimate: dict[str, Any] | None) -> tuple[float, float, float]:
    """(value, length of the interval below it, above it); lengths are 0 where an end is unknown, a value NaN."""
    if estimate is None or estimate["value"] is None:
        return math.nan, 0.0, 0.0
    value = estimate["value"]
    low, high = (value if estimate[end] is None else estimate[end] for end in ("low", "high"))
    return value, max(value - low, 0.0), max(high - value, 0.0)


def bars(
    axes: Axes, names: Sequence[str], estimates: Sequence[dict[str, Any] | None], colors: Sequence[Any], label: str
) -> None:
    """Estimates with their intervals as bars."""
    values, below, above = zip(*map(lengths, estimates))
    axes.bar(range(len(names)), values, yerr=[below, above], color=colors, capsize=4, width=0.7)
    name_axis(axes, names)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_ylabel(label)
