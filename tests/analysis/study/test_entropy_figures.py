"""Figures of entropy: every point is a number of study.json, in the line and panel that it belongs to."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
from matplotlib.figure import Figure

from analysis.study.figures.choice import Lacking
from analysis.study.figures.registry import FIGURES
from tests.analysis.test_canvas import check

STARTS = {"1B": {"118k": 118_000, "369k": 369_000, "738k": 738_000}, "7B": {"s1": 100_000, "s2": 557_000}}
CEILINGS = {"1B": (16, 144.1744), "7B": (32, 297.8042)}


def e(value: float, half: float = 0.02) -> dict[str, float]:
    return {"value": value, "low": value - half, "high": value + half}


def row(model: str, start: str, data: str, coefficient: str, intervention: str = "none") -> dict[str, Any]:
    layers, maximum = CEILINGS[model]
    step = STARTS[model][start]
    h = maximum - 0.1 - step / 2e6 - (data == "c4") * 0.05 - (coefficient == "relu") * 4 - (intervention != "none")
    return {
        **{"model": model, "start": start, "data": data, "coefficient": coefficient, "intervention": intervention},
        **{"precision": "fp32", "step": step, "tokens": step * 4_000_000, "H": e(h), "maximum": maximum},
        "layers": [h / layers - n / 1000 for n in range(layers)],
        "layer_standard_errors": [0.001] * layers,
        "layer_numbers": list(range(layers)),
        "attention": e(40 - step / 1e5) if coefficient == "abs" and data == "dolma" else None,
        "next_token": e(3 - step / 1e6) if coefficient == "abs" and data == "dolma" else None,
        "breadth": {
            name: {"value": n + step / 1e7, "standard_error": None if n == 2 else 0.01}
            for n, name in enumerate(("effective", "gini", "dead"))
        },
    }


def study(**changed: Any) -> dict[str, Any]:
    kinds = product(("dolma", "c4"), ("abs", "relu"), ("none", "q1"))
    rows = [row(m, s, d, c, i) for d, c, i in kinds for m, starts in STARTS.items() for s in reversed(starts)]
    starts = [{"name": s, "step": step, "model": m} for m, of in STARTS.items() for s, step in of.items()]
    interventions = {"none": {}, "q1": {"ratio": 0.5, "factor": 1.0}}
    return {"repeats": None, "starts": starts, "interventions": interventions, "entropies": rows, **changed}


def drawn(content: dict[str, Any], name: str) -> tuple[Figure, list[dict[str, Any]], dict[tuple[str, str], list]]:
    """The figure, its rows, and (x, y, ends) of every line by (title of the panel, legend)."""
    figure, rows = FIGURES[name].draw(content)
    lines: dict[tuple[str, str], list] = {}
    for axes in (axes for axes in figure.axes if axes.get_visible()):
        for container in axes.containers:
            line, _, (segments,) = container
            ends = [segment[:, 1].tolist() for segment in segments.get_segments()]
            label = container.get_label()
            key = (axes.get_title() or axes.get_ylabel(), "" if label.startswith("_") else label)
            lines[key] = list(zip(line.get_xdata(), line.get_ydata(), ends))
    return figure, rows, lines


def numbers(model: str, key: str, data: str = "dolma", coefficient: str = "abs") -> list[dict[str, float]]:
    return [row(model, start, data, coefficient)[key] for start in STARTS[model]]


def same(points: list, xs: list[float], estimates: list[dict[str, float]]) -> None:
    assert [x for x, _, _ in points] == pytest.approx(xs)
    assert [y for _, y, _ in points] == [one["value"] for one in estimates]
    assert [end for _, _, ends in points for end in ends] == pytest.approx(
        [one[end] for one in estimates for end in ("low", "high")]
    )


def test_figure_2_has_a_panel_a_model_over_the_share_of_its_last_step():
    figure, rows, lines = drawn(study(), "figure_2")
    check(figure)
    assert list(lines) == [("1B", ""), ("7B", "")] and len(rows) == 5
    same(lines["1B", ""], [118 / 738, 0.5, 1.0], numbers("1B", "H"))
    same(lines["7B", ""], [100 / 557, 1.0], numbers("7B", "H"))


def test_figure_2_has_the_published_ends_where_a_study_repeats_one_with_a_model_of_this_size():
    figure, rows, lines = drawn(study(repeats="paper_1b"), "figure_2")
    check(figure)
    assert [(x, y) for x, y, _ in lines["1B", "published, about"]] == [(118 / 738, 144.0), (1.0, 143.6)]
    assert [y for _, y, _ in lines["7B", "published, about"]] == [297.6, 297.0]
    assert {r["value"] for r in rows if r["line"]} == {144.0, 143.6, 297.6, 297.0}
    tiny = [{**r, "maximum": 13.86} for r in study()["entropies"]]
    assert "published, about" not in {
        r["line"] for r in drawn(study(repeats="paper_1b", entropies=tiny), "figure_2")[1]
    }


def test_figure_3_has_a_panel_a_measure_and_each_point_once():
    _, rows, lines = drawn(study(), "figure_3")
    assert len(rows) == 2 * 5
    same(lines["attention entropy (nats), 1B", ""], [118e3, 369e3, 738e3], numbers("1B", "attention"))
    same(lines["next-token entropy (nats), 7B", ""], [100e3, 557e3], numbers("7B", "next_token"))
    without = [{**r, "attention": None, "next_token": None} for r in study()["entropies"]]
    with pytest.raises(Lacking, match="attention or next-token entropy"):
        FIGURES["figure_3"].draw(study(entropies=without))


def test_figures_7_and_9_have_a_line_for_each_text_and_coefficient():
    figure, rows, lines = drawn(study(), "figure_7")
    check(figure)
    assert set(lines) == {(model, data) for model in STARTS for data in ("dolma", "c4")} and len(rows) == 10
    same(lines["1B", "c4"], [118e3, 369e3, 738e3], numbers("1B", "H", "c4"))
    figure, rows, lines = drawn(study(), "figure_9")
    assert set(lines) == {(f"{model}, {c}", c) for model in STARTS for c in ("abs", "relu")} and len(rows) == 10
    same(lines["7B, relu", "relu"], [100e3, 557e3], numbers("7B", "H", coefficient="relu"))
    one = [r for r in study()["entropies"] if r["data"] == "c4" and r["coefficient"] == "abs"]
    for name, lacking in (("figure_7", "entropies on two texts"), ("figure_9", "entropies of two coefficients")):
        with pytest.raises(Lacking, match=lacking):
            FIGURES[name].draw(study(entropies=one))


def test_figure_6_names_ceilings_and_a_model_measured_on_another_text_is_shown():
    rows = [r for r in study()["entropies"] if r["data"] == ("dolma" if r["model"] == "1B" else "c4")]
    _, _, lines = drawn(study(entropies=rows), "figure_6")
    same(lines["1B (at most 144.17)", ""], [118e3, 369e3, 738e3], numbers("1B", "H"))
    same(lines["7B (at most 297.80)", ""], [100e3, 557e3], numbers("7B", "H", "c4"))


def test_figure_8_has_a_line_a_layer():
    figure, rows, lines = drawn(study(), "figure_8")
    check(figure)
    assert len(lines) == 16 + 32 and len(rows) == 16 * 3 + 32 * 2
    value = row("1B", "369k", "dolma", "abs")["layers"][15]
    x, y, ends = lines["1B", "layer 15"][1]
    assert (x, y) == (369e3, value) and ends == pytest.approx([value - 1.96e-3, value + 1.96e-3])


def test_breadth_has_a_panel_a_measure_and_no_bar_without_an_error():
    _, rows, lines = drawn(study(), "breadth")
    assert len(rows) == 3 * 5 and len(lines) == 6
    [first, *_] = lines["share of dead memories", "1B"]
    assert first == (118e3, 2 + 118e3 / 1e7, [first[1], first[1]])
    with pytest.raises(Lacking, match="earlier versions"):
        FIGURES["breadth"].draw(study(entropies=[{**r, "breadth": None} for r in study()["entropies"]]))


def test_starts_without_steps_stand_side_by_side_by_name():
    rows = [{**r, "step": None, "tokens": None} for r in study()["entropies"] if r["model"] == "1B"]
    starts = [{**start, "step": None} for start in study()["starts"] if start["model"] == "1B"]
    figure, _, lines = drawn(study(entropies=rows, starts=starts), "figure_2")
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["118k", "369k", "738k"]
    [line] = lines.values()
    same(line, [0, 1, 2], numbers("1B", "H"))
    only_edited = [r for r in rows if r["intervention"] == "q1"]
    with pytest.raises(Lacking, match="entropies of checkpoints without an intervention"):
        FIGURES["figure_2"].draw(study(entropies=only_edited, starts=starts))
