"""Which figures acquisition.json has."""

import re

import numpy as np
import pytest

from analysis.figures import acquisition
from tests.analysis.drawing import dynamics, marks, run_summary


@pytest.fixture
def drawn(monkeypatch) -> dict:
    """The figures that save_acquisition saves, by the name of their file; each with rows for its CSV."""
    found = {}

    def save(figure, stem, rows):
        assert rows
        found[stem.name] = figure

    monkeypatch.setattr(acquisition, "save", save)
    return found


def test_save_acquisition_draws_every_run(tmp_path, drawn):
    runs = [run_summary("one", [10, 20]), run_summary("two", [10, 20])]
    acquisition.save_acquisition({"runs": runs}, tmp_path)
    assert set(drawn) == {
        "acquisition_and_forgetting",
        "outcomes_over_pretraining",
        "probes_by_kind",
        "probes_over_steps",
    }
    left, right = drawn["acquisition_and_forgetting"].axes
    assert [bar.get_height() for bar in left.containers[-1]] == [10, 10]
    assert [bar.get_height() for bar in right.containers[-1]] == [3, 3]
    memorization, semantic, composition = drawn["probes_over_steps"].axes
    assert [axes.get_title() for axes in (memorization, semantic, composition)] == [
        f"once, {kind}" for kind in ("memorization", "semantic", "composition")
    ]
    for axes, wanted in ((memorization, []), (semantic, [(0, -7.5), (15, -6.5)]), (composition, [(0, -7.0)])):
        assert marks(axes) == [10, 20]
        curves = [list(zip(line.get_xdata(), line.get_ydata())) for line in axes.lines[2:]]
        assert curves == [wanted, wanted]
    assert [text.get_text() for text in drawn["probes_over_steps"].legends[0].get_texts()] == ["one", "two"]


def test_save_acquisition_draws_a_loss_that_all_runs_have(tmp_path, drawn):
    """`general` only one of them has."""
    runs = [run_summary("one", []), run_summary("two", [], ("science",))]
    acquisition.save_acquisition({"runs": runs}, tmp_path)
    assert re.search("science", drawn["acquisition_and_forgetting"].axes[1].get_ylabel())


def test_save_acquisition_without_a_common_loss_draws_the_probes_alone(tmp_path, drawn):
    acquisition.save_acquisition({"runs": [run_summary("one", [], ())]}, tmp_path)
    assert set(drawn) == {"probes_over_steps", "probes_by_kind"}


def test_injections_are_marked_when_the_first_run_has_none(tmp_path, drawn):
    """A control without injection may stand first."""
    acquisition.save_acquisition({"runs": [run_summary("control", []), run_summary("two", [10, 20])]}, tmp_path)
    assert marks(drawn["probes_over_steps"].axes[0]) == [10, 20]


def test_retainability_is_drawn_with_its_fit_on_a_log_axis(tmp_path, drawn):
    """A row a run that was measured, a column a setting that has any."""
    runs = [
        run_summary("one", [10], dynamics=dynamics(("once", "paraphrase"))),
        run_summary("control", []),
        run_summary("two", [10], dynamics=dynamics(("once",), decay=False)),
    ]
    acquisition.save_acquisition({"runs": runs}, tmp_path)
    panels = drawn["retainability"].axes
    titles = ["one: paraphrase", "one: once", "two: paraphrase", "two: once"]
    assert [axes.get_title() for axes in panels] == titles
    assert {axes.get_xscale() for axes in panels} == {"log"}
    labels = [[text.get_text() for text in axes.get_legend().get_texts()] for axes in panels if axes.get_legend()]
    fit = "a = 0.250 (standard error 0.010)\n$R^2$ = 0.95, x-intercept 2.1e+03 steps"
    with_fit = [f"{kind}\n{fit}" for kind in ("memorization", "composition")]
    assert labels == [with_fit, with_fit, ["memorization", "composition"]]
    intervals, points = panels[0].collections[:2]
    assert points.get_offsets().tolist() == [[1, 0.9], [2, 0.8], [40, 0.5]]
    assert points.get_sizes().tolist() == pytest.approx([12, 6, 1.2])
    ends = [segment[:, 1].tolist() for segment in map(np.asarray, intervals.get_segments()) if segment.ndim == 2]
    assert ends == [[0.8, 0.95], [0.4, 0.6]]
    fits = [line for line in panels[0].lines if line.get_linestyle() == "--"]
    assert [list(zip(*line.get_data())) for line in fits] == [[(1, 0.9), (40, 0.5)]] * 2
    assert not panels[2].collections


def test_nothing_retained_is_no_figure(tmp_path, drawn):
    """A run whose last injection was at its last step."""
    acquisition.save_acquisition({"runs": [run_summary("one", [10], dynamics=dynamics(("once",), ()))]}, tmp_path)
    assert "retainability" not in drawn


def test_runs_whose_tokens_are_known_have_a_figure_over_tokens(tmp_path, drawn):
    one, two = (run_summary(name, [10], dynamics=dynamics(("once",))) for name in ("one", "two"))
    acquisition.save_acquisition({"runs": [{**one, "tokens_per_step": 128}, two]}, tmp_path)
    assert {"effectivity", "retainability"} <= drawn.keys()
    assert len(drawn["retainability"].axes) == 2 and len(drawn["retainability_tokens"].axes) == 1
