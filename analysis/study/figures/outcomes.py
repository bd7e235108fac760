"""The paper's figures of acquisition and forgetting, each from the rows of study.json: (figure, rows of its CSV)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.canvas import BLUES, GREY, LINES, bars, in_style, lengths, name_axis, palette, panels
from analysis.figures.dynamics import probes_over_steps
from analysis.study.figures.choice import (
    Condition,
    Study,
    acquisition,
    edit_of,
    in_order,
    kind_of,
    knowledge,
    last_starts,
    line_of,
    need,
    order_of_starts,
    outcome,
    rows_of,
    start_labels,
    unchanged,
)
from analysis.study.figures.points import Row, draw, point
from analysis.study.interventions import ATTENTION, EDITS, NO_INJECTION, UNCHANGED, attention_temperature, kind

Drawn = tuple[Figure, list[Row]]


def _over_starts(study: Study, conditions: Sequence[Condition], measures: Any, part: str = "", *more: str) -> list[Row]:
    labels = start_labels(study)
    return rows_of(measures, conditions, lambda c: line_of(study, c, *more), lambda c: labels[c["start"]], part)


def _need_starts(study: Study) -> list[Condition]:
    conditions = unchanged(study)
    need(len({c["start"] for c in conditions}) > 1, "training without an intervention from two starts")
    return conditions


def figure_4a(study: Study) -> Drawn:
    """A and forgetting by start."""
    rows = _over_starts(study, _need_starts(study), acquisition(study))
    return draw(rows, "start", order_of_starts(study)), rows


def figure_4b(study: Study) -> Drawn:
    """K and P at the end and before, by start."""
    conditions = _need_starts(study)
    rows = [row for which in ("after", "before") for row in _over_starts(study, conditions, knowledge(which), which)]
    return draw(rows, "start", order_of_starts(study)), rows


def figure_13(study: Study) -> Drawn:
    """A, forgetting, K and P by start, a line a setting, such as the text that is trained on."""
    conditions = _need_starts(study)
    need(len({c["setting"] for c in conditions}) > 1, "two settings")
    rows = _over_starts(study, conditions, {**acquisition(study), **knowledge("after")})
    return draw(rows, "start", order_of_starts(study)), rows


def figure_11(study: Study) -> Drawn:
    """A and K by start, a line a setting of probes."""
    labels, conditions = start_labels(study), _need_starts(study)
    rows = [
        point(panel, line_of(study, c), labels[c["start"]], found[name], setting, condition=c["name"])
        for panel, name in (("A, %", "A"), ("K after training", "K_after"))
        for setting in ("paraphrase", "once", "duplicate")
        for c in conditions
        if (found := c["by_setting"].get(setting)) is not None
    ]
    need(len({row["part"] for row in rows}) > 1, "probes of two settings (paraphrase, once)")
    return draw(rows, "start", order_of_starts(study)), rows


def figure_14(study: Study) -> Drawn:
    """H and A by start, a panel of H a model, since these have other maxima."""
    labels, conditions = start_labels(study), _need_starts(study)
    places = [(c["start"], c["intervention"]) for c in conditions]
    measured = [e for e in study["entropies"] if (e["start"], e["intervention"]) in places]
    need(measured, "entropies of the starts")
    first = (measured[0]["data"], measured[0]["coefficient"])
    models = list(dict.fromkeys(c["model"] for c in conditions))
    rows = [
        point(f"H of {model}, nats", model if len(models) > 1 else "", labels[e["start"]], e["H"], condition=e["start"])
        for model in models
        for e in in_order(study, [e for e in measured if e["model"] == model])
        if (e["data"], e["coefficient"]) == first
    ]
    rows += _over_starts(study, conditions, {"A, %": outcome("A")})
    return draw(rows, "start", order_of_starts(study)), rows


# --- edits ---


def _edits(study: Study, starts: set[str], place: int) -> tuple[list[Condition], float]:
    """Resuscitations at some of the starts that differ in one of (ratio, factor), `place`, and the value of the other
    one: that with which most conditions were made, the paper's where two have as many."""
    found = [c for c in study["conditions"] if c["start"] in starts and edit_of(study, c) is not None]
    edits = [edit for c in found if (edit := edit_of(study, c)) is not None]
    need(edits, "resuscitations at these starts")
    counts = Counter(edit[1 - place] for edit in dict.fromkeys(edits))
    published = (1.0, 0.5)[place]  # q where p differs, p where q differs
    other = max(counts, key=lambda value: (counts[value], value == published))
    chosen = [c for c in found if (edit := edit_of(study, c)) is not None and edit[1 - place] == other]
    distinct = {edit[place] for edit in edits if edit[1 - place] == other}
    need(len(distinct) > 1, f"resuscitations with two {('ratios', 'amplifying factors')[place]} at these starts")
    return sorted(chosen, key=lambda c: (edit_of(study, c) or (0.0, 0.0))[place]), other


def _over_edits(study: Study, starts: set[str], place: int, measures: Any) -> Drawn:
    conditions, other = _edits(study, starts, place)
    several = len(starts) > 1

    def line(c: Condition) -> str:
        return line_of(study, c, *((f"from {c['start']}",) if several else ()))

    def x(c: Condition) -> str:
        value = (edit_of(study, c) or (0.0, 0.0))[place]
        return f"{value:g}" if place else f"{100 * value:g} %"

    plain = [c for c in unchanged(study) if c["start"] in {e["start"] for e in conditions}]
    settings = {(c["start"], c["setting"]) for c in conditions}
    rows = rows_of(measures, conditions, line, x, "resuscitated")
    rows += rows_of(
        measures, [c for c in plain if (c["start"], c["setting"]) in settings], line, lambda c: None, "not edited"
    )
    fixed = f"p = {100 * other:g} %" if place else f"q = {other:g}"
    return draw(rows, f"{('ratio p', 'amplifying factor q')[place]} ({fixed})"), rows


def _last(study: Study) -> set[str]:
    return set(last_starts(study).values())


def figure_5a(study: Study) -> Drawn:
    """A and forgetting over the amplifying factor, from the last start."""
    return _over_edits(study, _last(study), 1, acquisition(study))


def figure_5b(study: Study) -> Drawn:
    """K and P after training over the amplifying factor, from the last start."""
    return _over_edits(study, _last(study), 1, knowledge("after"))


def figure_15(study: Study) -> Drawn:
    """A, forgetting, K and P over the ratio, from the last start."""
    return _over_edits(study, _last(study), 0, {**acquisition(study), **knowledge("after")})


def figure_17(study: Study) -> Drawn:
    """A, forgetting, K and P over the amplifying factor, from the other starts."""
    others = {c["start"] for c in study["conditions"] if edit_of(study, c) is not None} - _last(study)
    need(others, "resuscitations at starts before the last")
    return _over_edits(study, others, 1, {**acquisition(study), **knowledge("after")})


def figure_16(study: Study) -> Drawn:
    """A, forgetting, K and P by start, as saved and resuscitated."""
    by_edit: dict[tuple[float, float], list[Condition]] = {}
    for c in in_order(study, study["conditions"]):
        if (edit := edit_of(study, c)) is not None:
            by_edit.setdefault(edit, []).append(c)
    several = {edit: found for edit, found in by_edit.items() if len({c["start"] for c in found}) > 1}
    need(several, "one resuscitation at two starts")
    ratio, factor = max(several, key=lambda edit: (len(several[edit]), edit == (0.5, 2.0)))
    measures = {**acquisition(study), **knowledge("after")}
    edited = f"resuscitated, p = {100 * ratio:g} %, q = {factor:g}"
    rows = _over_starts(study, _need_starts(study), measures, "", "as saved")
    rows += _over_starts(study, several[ratio, factor], measures, "", edited)
    return draw(rows, "start", order_of_starts(study)), rows


def figure_18(study: Study) -> Drawn:
    """A, forgetting, K and P of attention temperatures beside resuscitation and neither, from the last start."""
    last = [c for c in study["conditions"] if c["start"] in _last(study)]
    warm = [c for c in last if kind_of(study, c) == ATTENTION]
    need(warm, "attention temperatures at the last start")
    places = {(c["start"], c["setting"]) for c in warm}
    found = [c for c in last if (c["start"], c["setting"]) in places]
    edits = [c for c in found if kind_of(study, c) == EDITS["lowest"]]
    plain = [c for c in found if kind_of(study, c) == UNCHANGED]
    warm.sort(key=lambda c: attention_temperature(study["interventions"][c["intervention"]]) or 0.0)

    def x(c: Condition) -> str:
        temperature = attention_temperature(study["interventions"][c["intervention"]])
        if temperature is not None:
            return f"T = {temperature:g}"
        edit = edit_of(study, c)
        return "as saved" if edit is None else f"p {100 * edit[0]:g} %,\nq {edit[1]:g}"

    rows = rows_of(
        {**acquisition(study), **knowledge("after")}, [*plain, *warm, *edits], lambda c: line_of(study, c), x
    )
    return draw(rows, "", joined=False), rows


# --- all conditions ---


@in_style
def acquisition_and_forgetting(study: Study) -> Drawn:
    """A and forgetting of every condition, as bars."""
    conditions = in_order(study, study["conditions"])
    need(conditions, "a condition that was trained")
    rows = rows_of(acquisition(study), conditions, lambda c: line_of(study, c), lambda c: c["name"])
    figure, [grid] = panels(max(10.5, 0.8 * len(conditions)), 3.8, columns=2)
    _bars(grid, study, conditions)
    return figure, rows


def _bars(grid: Sequence[Axes], study: Study, conditions: Sequence[Condition]) -> None:
    names, colors = [c["name"].replace(", ", ",\n") for c in conditions], _colors(study, conditions)
    for axes, (title, measure) in zip(grid, acquisition(study).items()):
        bars(axes, names, [measure(c) for c in conditions], [colors[c["name"]] for c in conditions], title)
    grid[0].set_title("Knowledge acquired")
    grid[1].set_title("Knowledge forgotten")


@in_style
def overview(study: Study) -> Drawn:
    """The study in one row: entropy by step, and what each start acquires and forgets."""
    conditions = unchanged(study)
    measured = [e for e in study["entropies"] if kind(study["interventions"][e["intervention"]]) == UNCHANGED]
    need(conditions and measured, "entropies, and training without an intervention")
    first = (measured[0]["data"], measured[0]["coefficient"], measured[0]["model"])
    shown = in_order(study, [e for e in measured if (e["data"], e["coefficient"], e["model"]) == first])
    figure, [[left, *grid]] = panels(13.5, 3.7, columns=3, width_ratios=(1.3, 1, 1))
    colors, labels = _colors(study, conditions), start_labels(study)
    values, below, above = zip(*(lengths(e["H"]) for e in shown))
    left.errorbar(range(len(shown)), values, [below, above], color=BLUES[2], marker="o", markersize=4, capsize=3)
    for condition in conditions:
        for place in [number for number, e in enumerate(shown) if e["start"] == condition["start"]]:
            left.plot([place], [values[place]], "o", color=colors[condition["name"]], markersize=11, zorder=5)
    name_axis(left, [labels[e["start"]] for e in shown])
    left.set(ylabel="knowledge entropy H (nats)", title="Knowledge entropy over pretraining")
    left.margins(x=0.08, y=0.2)
    _bars(grid, study, conditions)
    rows = [point("H, nats", "", labels[e["start"]], e["H"]) for e in shown]
    return figure, rows + rows_of(acquisition(study), conditions, lambda c: line_of(study, c), lambda c: c["name"])


def _colors(study: Study, conditions: Sequence[Condition]) -> dict[str, Any]:
    """Blues of three starts, a palette of more; other colors of interventions; grey without injection."""
    plain = [c["name"] for c in conditions if kind_of(study, c) == UNCHANGED]
    blues = BLUES if len(plain) == 3 else palette(len(plain))
    others = [c["name"] for c in conditions if kind_of(study, c) not in (UNCHANGED, NO_INJECTION)]
    cycle = [LINES[1 + number % (len(LINES) - 1)] for number in range(len(others))]
    none = [c["name"] for c in conditions if kind_of(study, c) == NO_INJECTION]
    return {**dict(zip(plain, blues)), **dict(zip(others, cycle)), **dict.fromkeys(none, GREY)}


def probes(study: Study, setting: str) -> Drawn:
    """Log-probability of the probes of a setting over steps, a line a condition."""
    measure = f"K_{setting}"
    conditions = [c for c in in_order(study, study["conditions"]) if any(measure in p for p in c["curve"])]
    need(conditions, f"probes of setting {setting}")
    colors = _colors(study, conditions)
    curves = [{"name": c["name"], "color": colors[c["name"]], "curve": c["curve"]} for c in conditions]
    injections = sorted({step for c in conditions for step in c["injections"]})
    rows = [
        {"condition": c["name"], "step": p["step"], measure: p[measure]}
        for c in conditions
        for p in c["curve"]
        if measure in p
    ]
    return probes_over_steps(curves, injections, measure, f"Setting {setting}"), rows
