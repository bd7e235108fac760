"""What runs acquired and forgot, by condition and over the steps of pretraining from which they started."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.canvas import bars, in_style, legend_of_runs, lengths, name_axis, panels, side_by_side, step_axis


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


def outcomes_of(runs: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any] | None]]:
    """A and K on both scales, F, and the rise of the first held-out loss: estimates of every run, those measures that
    any run has.

    runs: `A`, `K_after`, `A_published`, `K_published_after`, `downstream`.`F` (each may be None) and `loss_rise`.
    """
    labels = list(dict.fromkeys(label for run in runs for label in run["loss_rise"]))[:1]
    measures = {
        "A, %": [run["A"] for run in runs],
        "F, %": [(run["downstream"] or {}).get("F") for run in runs],
        **{f"rise of held-out {label} loss, %": [run["loss_rise"].get(label) for run in runs] for label in labels},
        "A as published, %": [run.get("A_published") for run in runs],
        "K after training": [run.get("K_after") for run in runs],
        "K after training, as published": [run.get("K_published_after") for run in runs],
    }
    return {name: found for name, found in measures.items() if any(found)}


@in_style
def outcomes_over_pretraining(runs: Sequence[dict[str, Any]], colors: Sequence[Any]) -> Figure:
    """`outcomes_of` runs over the pretraining steps from which they started, several of one step beside each other;
    side by side where a step is unknown. runs: `run` and `start` too."""
    measures = outcomes_of(runs)
    columns = min(len(measures), 3)
    rows = math.ceil(len(measures) / columns)
    figure, grid = panels(1 + 4.2 * columns, 0.4 + 3.4 * rows, rows, columns)
    for axes in grid.flat[len(measures) :]:
        axes.set_visible(False)
    starts = [run["start"] for run in runs]
    known = None not in starts
    places = side_by_side(starts) if known else list(range(len(runs)))
    for axes, (name, estimates) in zip(grid.flat, measures.items()):
        for place, estimate, color in zip(places, estimates, colors):
            if estimate is not None and estimate["value"] is not None:
                value, below, above = lengths(estimate)
                ends = [[below], [above]]
                axes.errorbar([place], [value], ends, color=color, marker="o", markersize=6, capsize=4)
        if not name.startswith("K"):
            axes.axhline(0, color="black", linewidth=0.8)
        axes.set_title(name)
        axes.margins(x=0.1)
        if known:
            step_axis(axes, "pretraining step of the start")
        else:
            name_axis(axes, [run["run"] for run in runs])
    figure.supylabel("95 % interval", fontsize=10)
    legend_of_runs(figure, runs, colors)
    return figure
