"""The figures of probes along a run draw the numbers that they are given, and nothing else."""

import pytest
from matplotlib.colors import to_hex

from analysis.figures import dynamics
from tests.analysis.drawing import CURVES, legend_of, marks, run_summary


@pytest.mark.parametrize("measure", ["K", "K_once"])
def test_probes_over_steps_draws_the_curves_and_the_injections(measure):
    """Evaluations without the measure leave no point."""
    figure = dynamics.probes_over_steps(CURVES, [10, 20], measure, "A title")
    [axes] = figure.axes
    rounds = [line for line in axes.lines if line.get_linestyle() == ":"]
    assert [line.get_xdata()[0] for line in rounds] == [10, 20]
    curves = [line for line in axes.lines if line not in rounds]
    for line, curve in zip(curves, CURVES, strict=True):
        wanted = [(p["step"], p[measure]) for p in curve["curve"] if measure in p]
        assert list(zip(line.get_xdata(), line.get_ydata())) == wanted
        assert to_hex(line.get_color()) == curve["color"]
    assert legend_of(figure) == ["injection round", "early", "last, q = 1"]  # the rounds once, names on one line
    assert axes.get_title() == "A title"


def test_probes_over_steps_without_an_injection():
    [axes] = dynamics.probes_over_steps(CURVES, []).axes
    assert len(axes.lines) == 2


def test_steps_are_counted_from_the_start_of_each_run():
    """A run that counts on from its checkpoint beside one that does not."""
    one = run_summary("one", [10])
    other = {**run_summary("other", [100]), "begins": 90, "curve": [{"step": 90, "K": -6.0}, {"step": 105, "K": -5.0}]}
    [axes] = dynamics.probes_by_part([one, other], ["red", "blue"], [["K"]]).axes
    assert marks(axes) == [10]
    assert [list(line.get_xdata()) for line in axes.lines[1:]] == [[0, 15], [0, 15]]
