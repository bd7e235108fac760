"""The figures of probes along a run draw the numbers that they are given, and nothing else."""

import pytest
from matplotlib.colors import to_hex

from analysis.canvas import KIND_COLORS
from analysis.figures import dynamics
from tests.analysis import drawing
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


def measured(name: str, settings: tuple[str, ...] = ("once",), tokens: int | None = 2048) -> dict:
    return run_summary(name, [10, 20], dynamics=drawing.dynamics(settings), tokens_per_step=tokens)


def points_of(rows: list[dict], *columns: str, **chosen: str) -> list[tuple]:
    return [tuple(row[c] for c in columns) for row in rows if all(row[key] == value for key, value in chosen.items())]


def test_the_change_of_each_kind_since_the_start_with_every_injection():
    """A row of panels a run, a column a setting; steps are counted from the start of each run."""
    other = {**measured("other"), "begins": 90, "injections": [100], "curve": []}
    other["curve"] = [{"step": step, "K_paraphrase_semantic": -9.0 + step / 15} for step in (90, 105)]
    figure, rows = dynamics.probes_by_kind([measured("one"), other])
    assert [axes.get_title() for axes in figure.axes] == [
        f"{run}: {setting}" for run in ("one", "other") for setting in ("paraphrase", "once")
    ]
    _, once, paraphrase, _ = figure.axes
    assert marks(once) == [10, 20] and marks(paraphrase) == [10]
    lines = [line for line in once.lines if line.get_linestyle() == "-" and len(line.get_xdata())]
    drawn = {to_hex(line.get_color()): list(zip(line.get_xdata(), line.get_ydata())) for line in lines}
    assert drawn[KIND_COLORS["semantic"]] == [(0, 0.0), (15, 1.0)]
    assert points_of(rows, "step", "change", run="one", setting="once", kind="semantic") == [(0, 0.0), (15, 1.0)]
    assert points_of(rows, "step", "change", run="other") == [(90, 0.0), (105, 1.0)]
    assert legend_of(figure) == ["memorization", "semantic", "composition", "injection"]


def test_effectivity_by_the_number_of_the_injection():
    figure, rows = dynamics.effectivity_by_injection([measured("small"), measured("large", ("once", "duplicate"))])
    assert [axes.get_title() for axes in figure.axes] == [
        f"{run}: {setting}" for run in ("small", "large") for setting in ("once", "duplicate")
    ]
    lines = [line for line in figure.axes[0].lines if len(line.get_xdata()) == 2 and line.get_marker() == "o"]
    assert [list(zip(*line.get_data())) for line in lines] == [[(1, 1.0), (2, 0.5)]] * 2, "semantic was not measured"
    assert [to_hex(line.get_color()) for line in lines] == [KIND_COLORS[k] for k in ("memorization", "composition")]
    assert points_of(rows, "injection", "mean", "values", run="large", setting="duplicate", kind="composition") == [
        (1, 1.0, 10),
        (2, 0.5, 5),
    ]
    assert not [line for line in figure.axes[1].lines if line.get_marker() == "o"], "small has no duplicates"


def test_retainability_in_tokens_has_the_slope_of_that_in_steps():
    """Tokens are steps times the tokens of a step; a is the slope against log10 of either."""
    runs = [measured("small", tokens=2048), measured("large", tokens=4096)]
    figure, rows = dynamics.retainability(runs, in_tokens=True)
    points = figure.axes[1].collections[1]
    assert points.get_offsets().tolist() == [[4096, 0.9], [8192, 0.8], [40 * 4096, 0.5]]
    [fit, _] = [line for line in figure.axes[1].lines if line.get_linestyle() == "--"]
    assert list(zip(*fit.get_data())) == [(4096, 0.9), (40 * 4096, 0.5)]
    texts = [text.get_text() for text in figure.axes[1].get_legend().get_texts()]
    assert texts[0].endswith("a = 0.250 (standard error 0.010)\n$R^2$ = 0.95, x-intercept 8.6e+06 tokens")
    one = points_of(rows, "tokens", "a", "R^2", "x-intercept", run="large", kind="memorization")[0]
    assert one == (4096, 0.25, 0.95, 2100 * 4096)
    in_steps = dynamics.retainability(runs)[1]
    assert {row["steps"] for row in in_steps} == {1, 2, 40} and {row["a"] for row in in_steps} == {0.25}
