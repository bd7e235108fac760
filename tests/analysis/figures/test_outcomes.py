"""The figures of outcomes draw the numbers that they are given, and nothing else."""

import pytest
from matplotlib.colors import to_hex

from analysis.figures import outcomes
from tests.analysis.drawing import ROWS, bars_with_errors, check_bars, run_summary


def test_acquisition_and_forgetting_draws_estimates_with_their_intervals():
    left, right = outcomes.acquisition_and_forgetting(ROWS, "general").axes
    colors = [r["color"] for r in ROWS]
    check_bars(left, [r["A"] for r in ROWS], colors)
    check_bars(right, [r["loss_rise"] for r in ROWS], colors)
    assert [text.get_text() for text in left.get_xticklabels()] == ["early", "last"]
    assert "general" in right.get_ylabel()


def test_outcomes_stand_at_the_pretraining_steps_of_their_starts():
    """F where a run has it, with as much of its interval as is known."""
    f = {"value": 5.0, "low": None, "high": 6.0}
    runs = [run_summary("one", [], start=18000, downstream={"F": f}), run_summary("two", [], start=738020)]
    figure = outcomes.outcomes_over_pretraining(runs, ["red", "blue"])
    a, forgotten, loss = figure.axes
    assert [axes.get_title() for axes in figure.axes] == ["A, %", "F, %", "rise of held-out general loss, %"]
    assert [bars_with_errors(c) for c in a.containers] == [[(18000, 10, [8, 12])], [(738020, 10, [8, 12])]]
    assert [bars_with_errors(c) for c in forgotten.containers] == [[(18000, 5, [5, 6])]]
    assert len(loss.containers) == 2
    assert [to_hex(c[0].get_color()) for c in a.containers] == ["#ff0000", "#0000ff"]


def test_outcomes_of_one_start_stand_beside_each_other():
    """In order, around their step, and nearer to it than to the next one."""
    starts = (90, 90, 90, 450, 720)
    runs = [run_summary(str(n), [], (), start=start) for n, start in enumerate(starts)]
    [axes] = outcomes.outcomes_over_pretraining(runs, ["red"] * 5).axes
    places = [bars_with_errors(c)[0][0] for c in axes.containers]
    assert places[1] == 90 and places[3:] == [450, 720]
    assert places[2] - places[1] == pytest.approx(places[1] - places[0]) and 10 < places[1] - places[0] < 50


def test_outcomes_of_unknown_starts_stand_side_by_side():
    runs = [run_summary("one", [], (), start=18000), run_summary("two", [], ())]
    [axes] = outcomes.outcomes_over_pretraining(runs, ["red", "blue"]).axes
    assert [bars_with_errors(c)[0][0] for c in axes.containers] == [0, 1]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["one", "two"]
