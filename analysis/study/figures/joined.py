"""Entropy against outcomes: a scatter over starts and interventions, and the effects of each intervention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis.canvas import GREY, in_style, legend, lengths, palette, panels, plain
from analysis.study.figures.choice import Lacking, Study, in_order, loss_label, need
from analysis.study.figures.points import Row
from analysis.study.interventions import KINDS, kind
from analysis.summary_table import signed, with_interval

MARKERS = dict(zip(KINDS, "osD^vPXh"))  # of kinds of interventions
_TITLES = {"A": "A, %", "F": "F, %", "K_after": "K after training", "P_after": "P after training"}


def _outcomes(study: Study) -> list[str]:
    """The outcomes that are shown: A, forgetting, K, P, as far as the study has them."""
    label = f"loss_rise.{loss_label(study['conditions'])}"
    known = {name for row in (*(study["joined"] or {"points": []})["points"], *study["effects"]) for name in row}
    forgotten = "F" if any(c["common_start"]["F"] is not None for c in study["conditions"]) else label
    return [name for name in ("A", forgotten, "K_after", "P_after") if name in known]


def _title(name: str) -> str:
    return _TITLES.get(name, f"rise of held-out {name.partition('.')[2]} loss, %")


@in_style
def scatter(study: Study) -> tuple[Figure, list[Row]]:
    """H and outcomes, a point a condition: starts by color, interventions by marker."""
    joined = study["joined"]
    need(joined, "entropies of conditions that were trained")
    points = joined["points"]
    need(len(points) > 1, "entropies of two conditions that were trained")
    kinds = [kind(study["interventions"][p["intervention"]]) for p in points]
    colors = _colors(study, points)
    outcomes = _outcomes(study)
    figure, [grid] = panels(1 + 3.4 * len(outcomes), 3.7, columns=len(outcomes))
    for axes, name in zip(grid, outcomes):
        for p, of_kind in zip(points, kinds):
            if name in p:
                _cross(
                    axes, {"H": _entropy(study, p), name: _outcome(study, p, name)}, name, of_kind, colors[p["start"]]
                )
        axes.set(title=_title(name))
        # As part of the label, so that the layout makes room for it.
        label = "\n".join(["H at the start (nats)", *_coefficients(joined["correlations"], name)])
        axes.set_xlabel(label, fontsize=9)
        axes.locator_params(axis="x", nbins=4)
        axes.margins(0.15)
    legend(figure, [*_starts(colors), *_kinds(kinds)])
    keys = ("name", "start", "intervention", "setting", "H", *outcomes)
    return figure, [{key: p[key] for key in keys if key in p} for p in points]


def _coefficients(correlations: Sequence[Mapping[str, Any]], name: str) -> list[str]:
    """Pearson's coefficients of H and an outcome, a line each."""
    found = [c for c in correlations if (c["x"], c["y"]) == ("H", name) and c["pearson"]["value"] is not None]
    return [f"r {_coefficient(c['pearson'])}\nover {c['points']} {plain(c['over'])}" for c in found]


def _coefficient(found: dict[str, Any]) -> str:
    return signed(found["value"], 2) if found["low"] is None else with_interval(found, 2)


def _colors(study: Study, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of the starts of rows, light as they are later."""
    starts = list(dict.fromkeys(row["start"] for row in in_order(study, rows)))
    return dict(zip(starts, palette(len(starts))))


def _starts(colors: Mapping[str, Any]) -> list[Line2D]:
    return [Line2D([], [], color=color, marker="o", linestyle="", label=plain(name)) for name, color in colors.items()]


def _kinds(kinds: Sequence[str]) -> list[Line2D]:
    named = [name for name in KINDS if name in kinds] if len(set(kinds)) > 1 else []
    return [Line2D([], [], color=GREY, marker=MARKERS[name], linestyle="", label=name) for name in named]


@in_style
def effects(study: Study) -> tuple[Figure, list[Row]]:
    """What each intervention did to A, forgetting and K against the change of H that it made at the start."""
    rows = [row for row in study["effects"] if row["H"] is not None]
    if not rows:
        raise Lacking("interventions whose entropy was measured beside that of their start")
    kinds = [row["kind"] for row in rows]
    colors = _colors(study, rows)
    outcomes = [name for name in _outcomes(study) if any(row.get(name) for row in rows)]
    figure, [grid] = panels(1 + 3.6 * len(outcomes), 3.5, columns=len(outcomes))
    for axes, name in zip(grid, outcomes):
        for row in rows:
            if row.get(name) is not None:
                _cross(axes, row, name, row["kind"], colors[row["start"]])
        axes.axhline(0, color="black", linewidth=0.8)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set(xlabel="change of H at the start (nats)", title=f"effect on {_title(name)}")
        axes.locator_params(axis="x", nbins=5)
        axes.margins(0.15)
    legend(figure, [*_starts(colors), *_kinds(kinds)])
    return figure, [
        {
            **{key: row[key] for key in ("name", "start", "setting", "intervention", "kind")},
            **{
                f"{name} {end}".removesuffix(" value"): row[name][end]
                for name in ("H", *outcomes)
                if row.get(name)
                for end in ("value", "low", "high")
            },
        }
        for row in rows
    ]


def _cross(axes: Axes, of: Mapping[str, Any], name: str, kind: str, color: Any) -> None:
    """A point with the intervals of H and an outcome."""
    x, left, right = lengths(of["H"])
    y, below, above = lengths(of[name])
    ends = ([[below], [above]], [[left], [right]])
    axes.errorbar([x], [y], *ends, color=color, marker=MARKERS[kind], markersize=6, elinewidth=1.0)


def _entropy(study: Study, point: Mapping[str, Any]) -> dict[str, Any]:
    """The estimate of a point's H."""
    key = (study["joined"]["data"], study["joined"]["coefficient"], point["start"], point["intervention"])
    return next(
        e["H"] for e in study["entropies"] if (e["data"], e["coefficient"], e["start"], e["intervention"]) == key
    )


def _outcome(study: Study, point: Mapping[str, Any], name: str) -> dict[str, Any]:
    outcomes = next(c["common_start"] for c in study["conditions"] if c["name"] == point["name"])
    return outcomes["loss_rise"][name.partition(".")[2]] if name.startswith("loss_rise.") else outcomes[name]
