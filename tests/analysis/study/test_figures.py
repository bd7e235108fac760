"""Figures of outcomes: which conditions each shows, with which numbers, and why one cannot be drawn."""

import csv
import re

import pytest

from analysis.study.figures.choice import Lacking
from analysis.study.figures.registry import FIGURES, check_names, draw_all
from tests.analysis.study.rows import joined, rich


@pytest.fixture(scope="module")
def study() -> dict:
    return rich()


def drawn(study: dict, name: str) -> tuple:
    return FIGURES[name].draw(study)


def conditions(rows: list[dict], **of) -> set[str]:
    return {row["condition"] for row in rows if all(row[key] == value for key, value in of.items())}


def check(study: dict, rows: list[dict], measures: dict[str, str]) -> None:
    """Every row is the number of its condition; measures: panel -> key of the outcomes."""
    by_name = {c["name"]: c["common_start"] for c in study["conditions"]}
    for row in rows:
        estimate = by_name[row["condition"]][measures[row["panel"]]]
        assert {end: row[end] for end in ("value", "low", "high")} == estimate


ALL = {"A, %": "A", "F, %": "F", "K": "K_after", "P": "P_after"}


def test_figure_4_has_a_line_for_every_model_and_setting(study):
    figure, rows = drawn(study, "figure_4a")
    check(study, rows, ALL)
    assert {row["line"] for row in rows} == {"1B, baseline", "1B, c4", "7B, baseline", "7B, c4"}
    assert conditions(rows, line="1B, baseline") == {"118k", "369k", "554k", "738k"}
    for axes in figure.axes:
        names = [label.get_text() for label in axes.get_xticklabels()]
        assert names == ["100k", "118k", "369k", "554k", "557k", "738k"]  # by step, whatever the start is called
    assert not any(axes.get_legend() for axes in figure.axes) and len(figure.legends) == 1
    _, rows = drawn(study, "figure_4b")
    check(study, [r for r in rows if r["part"] == "after"], ALL)
    check(study, [r for r in rows if r["part"] == "before"], {"K": "K_before", "P": "P_before"})


def test_figure_11_has_paraphrase_and_once(study):
    _, rows = drawn(study, "figure_11")
    by_name = {c["name"]: c["by_setting"] for c in study["conditions"]}
    assert {row["part"] for row in rows} == {"paraphrase", "once"}
    for row in rows:
        key = {"A, %": "A", "K after training": "K_after"}[row["panel"]]
        assert row["value"] == by_name[row["condition"]][row["part"]][key]["value"]


def test_the_last_start_is_the_last_that_is_trained(study):
    measured = {**study["starts"][0], "name": "900k", "step": 900_000}
    longer = {**study, "starts": [*study["starts"], measured]}
    assert drawn(longer, "figure_5a")[1] == drawn(study, "figure_5a")[1] != []


def test_edits_are_chosen_by_their_keys(study):
    edited = {"738k, half": "0.5", "738k, one": "1", "738k, two": "2"}
    for name in ("figure_5a", "figure_5b"):
        _, rows = drawn(study, name)
        check(study, rows, ALL)
        assert {row["condition"]: row["x"] for row in rows if row["part"] == "resuscitated"} == edited
        assert conditions(rows, part="not edited") == {"738k"}
    _, rows = drawn(study, "figure_15")
    check(study, rows, ALL)
    found = {row["condition"]: row["x"] for row in rows if row["part"] == "resuscitated"}
    assert found == {"738k, few": "25 %", "738k, one": "50 %", "738k, most": "90 %"}
    _, rows = drawn(study, "figure_17")
    check(study, rows, ALL)
    assert conditions(rows) == {start + name for start in ("118k", "369k", "554k") for name in ("", ", one", ", two")}
    _, rows = drawn(study, "figure_16")
    check(study, rows, ALL)
    line = "1B, baseline, resuscitated, p = 50 %, q = 2"
    assert conditions(rows, line=line) == {f"{start}, two" for start in ("118k", "369k", "554k", "738k")}


def test_of_as_many_edits_the_ratio_of_the_paper_is_shown(study):
    changed = {"few": {"ratio": 0.25, "factor": 1.0}, "most": {"ratio": 0.25, "factor": 2.0}}
    kept = [c for c in study["conditions"] if c["intervention"] in ("none", "few", "most", "half", "one")]
    both = {"interventions": {**study["interventions"], **changed}, "conditions": kept[::-1]}
    _, rows = drawn({**study, **both}, "figure_5a")
    assert conditions(rows, part="resuscitated") == {"738k, half", "738k, one"}


def test_temperatures_are_beside_resuscitation_of_the_same_start(study):
    _, rows = drawn(study, "figure_18")
    check(study, rows, ALL)
    a = [row for row in rows if row["panel"] == "A, %"]
    assert [row["x"] for row in a][:3] == ["as saved", "T = 1.5", "T = 3"]
    assert {row["condition"] for row in a} == {
        *("738k", "738k, warm", "738k, hot", "738k, half", "738k, one", "738k, two", "738k, few", "738k, most")
    }


def test_families_have_panels_of_entropy_of_their_own(study):
    _, rows = drawn(study, "figure_14")
    entropies = {e["start"]: e["H"]["value"] for e in study["entropies"] if e["intervention"] == "none"}
    of_h = {row["condition"]: (row["panel"], row["value"]) for row in rows if row["panel"].startswith("H")}
    assert of_h == {
        start: (f"H of {'7B' if start[0] == 's' else '1B'}, nats", value) for start, value in entropies.items()
    }


def test_without_accuracies_forgetting_is_the_rise_of_a_held_out_loss(study):
    without = [{**c, "common_start": {**c["common_start"], "F": None, "P_after": None}} for c in study["conditions"]]
    _, rows = drawn({**study, "conditions": without}, "figure_13")
    assert {row["panel"] for row in rows} == {"A, %", "rise of held-out general loss, %", "K"}
    by_name = {c["name"]: c["common_start"]["loss_rise"]["general"]["value"] for c in without}
    for row in rows:
        if row["panel"].startswith("rise"):
            assert row["value"] == by_name[row["condition"]]


def test_the_scatter_has_every_point_with_its_coefficients():
    study = joined()
    figure, rows = drawn(study, "joined")
    assert rows == study["joined"]["points"]
    assert [axes.get_title() for axes in figure.axes] == ["A, %", "F, %", "K after training", "P after training"]
    labels = [axes.get_xlabel() for axes in figure.axes]
    assert labels[0].split("\n")[1:] == ["r +0.90 [+0.80, +1.00]", "over 4 starts, baseline"] and "r " not in labels[3]
    points = [line for line in figure.axes[0].lines if line.get_marker() in "osD^vPX"]
    drawn_at = {(line.get_xdata()[0], line.get_ydata()[0]) for line in points}
    assert drawn_at == {(p["H"], p["A"]) for p in study["joined"]["points"]}


def test_effects_and_probes_have_the_numbers_of_the_study(study):
    _, rows = drawn(study, "effects")
    for row, of_study in zip(rows, study["effects"], strict=True):
        assert row["kind"] == of_study["kind"]
        assert [row["H"], row["H low"], row["A high"]] == [
            of_study[name][end] for name, end in (("H", "value"), ("H", "low"), ("A", "high"))
        ]
    _, rows = drawn(study, "probes_once")
    assert len(rows) == 3 * len(study["conditions"])
    assert [row["K_once"] for row in rows if row["condition"] == "369k, two"] == [-7.0, -6.5, -6.0]


@pytest.mark.parametrize(
    ("name", "keep", "reason"),
    [
        ("figure_4a", lambda c: c["start"] == "738k", "training without an intervention from two starts"),
        ("figure_13", lambda c: c["setting"] == "baseline", "two settings"),
        ("figure_5a", lambda c: c["intervention"] in ("none", "one"), "two amplifying factors at these starts"),
        ("figure_5a", lambda c: c["intervention"] == "none", "resuscitations at these starts"),
        ("figure_15", lambda c: c["intervention"] in ("none", "half", "two"), "two ratios at these starts"),
        ("figure_16", lambda c: c["start"] == "738k", "one resuscitation at two starts"),
        ("figure_17", lambda c: c["start"] == "738k", "resuscitations at starts before the last"),
        ("figure_18", lambda c: c["intervention"] != "hot" and c["intervention"] != "warm", "attention temperatures"),
        ("probes_once", lambda c: False, "probes of setting once"),
    ],
)
def test_what_a_figure_lacks_is_named(study, name, keep, reason):
    kept = [c for c in study["conditions"] if keep(c)]
    with pytest.raises(Lacking, match=reason):
        drawn({**study, "conditions": kept}, name)


def test_figures_are_files_and_those_that_lack_something_are_not_drawn(tmp_path, study):
    found = draw_all({**study, "conditions": study["conditions"][:2]}, ["effects", "figure_16"], tmp_path)
    assert found[0]["files"] == [f"figures/effects{suffix}" for suffix in (".png", ".pdf", ".csv")]
    assert all((tmp_path / file).stat().st_size for file in found[0]["files"])
    with (tmp_path / "figures/effects.csv").open() as file:
        assert [row["name"] for row in csv.DictReader(file)] == [row["name"] for row in study["effects"]]
    assert found[1]["files"] == [] and found[1]["missing"] == "needs one resuscitation at two starts"
    assert {path.stem for path in (tmp_path / "figures").iterdir()} == {"effects"}


def test_an_unknown_figure_is_named_with_the_nearest():
    with pytest.raises(ValueError, match=re.escape("unknown figure 'figure_4c', did you mean 'figure_4")):
        check_names(["figure_4a", "figure_4c"])
