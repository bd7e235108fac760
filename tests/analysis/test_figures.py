"""Every figure draws the numbers that it is given, and nothing else."""

import importlib
import re

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_hex

from analysis import figures


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def entropy_result(step: int, layers: list[float], errors: list[float | None]) -> dict:
    known = [e for e in errors if e is not None]
    return {
        "checkpoint": {"step": step},
        "knowledge_entropy": sum(layers),
        "standard_error": sum(known) if known else None,
        "layers": layers,
        "layer_standard_errors": errors,
    }


SERIES = [
    entropy_result(90, [6.0, 6.5], [0.01, 0.02]),
    entropy_result(450, [5.8, 6.6], [0.03, 0.04]),
    entropy_result(720, [5.5, 6.4], [None, None]),  # measured on one instance
]


def estimate(value: float, low: float, high: float) -> dict[str, float]:
    return {"value": value, "low": low, "high": high}


ROWS = [
    {"name": "early", "color": "#9ecae1", "A": estimate(20, 18, 23), "loss_rise": estimate(-1, -2, 0.5)},
    {"name": "last", "color": "#08306b", "A": estimate(-5, -6, -1), "loss_rise": estimate(3, 2.5, 3.25)},
]
CURVES = [
    {"name": "early", "color": "#9ecae1", "curve": [{"step": 0, "K": -6.0, "K_once": -7.0}, {"step": 15, "K": -5.0}]},
    {"name": "last,\nq = 1", "color": "#08306b", "curve": [{"step": 0, "K": -6.5}, {"step": 30, "K": -4.0}]},
]


def bars_with_errors(container) -> list[tuple]:
    """(low, data line) of an errorbar container: points, and the ends of every bar."""
    line, _, (segments,) = container
    ends = [segment[:, 1].tolist() for segment in segments.get_segments()]
    return list(zip(line.get_xdata(), line.get_ydata(), ends))


def check_entropy(axes, results: list[dict], number: int = 0) -> None:
    points = bars_with_errors(axes.containers[number])
    assert [p[0] for p in points] == [r["checkpoint"]["step"] for r in results]
    assert [p[1] for p in points] == [r["knowledge_entropy"] for r in results]
    for (_, height, ends), r in zip(points, results):
        error = 2 * (r["standard_error"] or 0)
        assert ends == pytest.approx([height - error, height + error])


def legend_of(figure) -> list[str]:
    [legend] = figure.legends
    return [text.get_text() for text in legend.get_texts()]


def check_bars(axes, estimates: list[dict], colors: list[str]) -> None:
    [container] = [c for c in axes.containers if hasattr(c, "errorbar") and c.errorbar is not None]
    assert [bar.get_height() for bar in container] == [e["value"] for e in estimates]
    assert [to_hex(bar.get_facecolor()) for bar in container] == colors
    _, _, (segments,) = container.errorbar
    for segment, e in zip(segments.get_segments(), estimates, strict=True):
        assert segment[:, 1].tolist() == pytest.approx([e["low"], e["high"]])


def test_entropy_over_steps_draws_every_checkpoint_with_two_standard_errors():
    figure = figures.entropy_over_steps([SERIES])
    check_entropy(figure.axes[0], SERIES)


def test_marked_checkpoints_stand_where_they_were_measured():
    figure = figures.entropy_over_steps([SERIES], [90, 720])
    [axes] = figure.axes
    marks = [line for line in axes.lines if line.get_markersize() > 10]
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in marks] == [(90, 12.5), (720, 11.9)]
    assert [to_hex(line.get_color()) for line in marks] == list(figures.BLUES[:2])
    assert legend_of(figure) == ["start at step 90", "start at step 720"]


def test_any_number_of_seeds_can_be_seen():
    """One line a seed, the later ones fainter, none invisible."""
    shifted = [[{**r, "knowledge_entropy": r["knowledge_entropy"] + s} for r in SERIES] for s in range(7)]
    figure = figures.entropy_over_steps(shifted, [90])
    assert len(figure.axes[0].containers) == 7
    for number, results in enumerate(shifted):
        check_entropy(figure.axes[0], results, number)
    alphas = [c[0].get_alpha() for c in figure.axes[0].containers]
    assert alphas == sorted(alphas, reverse=True) and alphas[0] == 1 and alphas[-1] >= 0.2


def test_entropy_of_every_layer():
    figure = figures.layer_entropy_over_steps(SERIES)
    [axes] = figure.axes
    assert legend_of(figure) == ["layer 0", "layer 1"]  # as in flags and JSON
    for layer, container in enumerate(axes.containers):
        points = bars_with_errors(container)
        assert [p[1] for p in points] == [r["layers"][layer] for r in SERIES]
        for (_, height, ends), r in zip(points, SERIES):
            error = 2 * (r["layer_standard_errors"][layer] or 0)
            assert ends == pytest.approx([height - error, height + error])
    assert len({to_hex(c[0].get_color()) for c in axes.containers}) == 2


def test_layers_have_their_numbers_in_the_model():
    figure = figures.layer_entropy_over_steps([{**result, "layer_numbers": [1, 5]} for result in SERIES])
    assert legend_of(figure) == ["layer 1", "layer 5"]
    curve = {"name": "step1", "ranks": [0, 1], "shares": [[0.5, 0.1], [0.6, 0.1]], "layer_numbers": [1, 5]}
    assert [axes.get_title() for axes in figures.coefficient_distributions([curve]).axes] == ["layer 1", "layer 5"]


@pytest.mark.parametrize("per_layer", [False, True])
def test_checkpoints_without_a_step_stand_side_by_side_by_name(per_layer):
    results = [{**entropy_result(step, [6.0, 6.5], [0.01, 0.02]), "name": f"model {step}"} for step in (90, -1)]
    figure = figures.layer_entropy_over_steps(results) if per_layer else figures.entropy_over_steps([results])
    [axes] = figure.axes
    assert [text.get_text() for text in axes.get_xticklabels()] == ["model 90", "model -1"]
    assert [p[0] for p in bars_with_errors(axes.containers[0])] == [0, 1]


def test_many_layers_are_told_apart_beside_the_axes():
    figure = figures.layer_entropy_over_steps([entropy_result(step, [6.0] * 16, [0.01] * 16) for step in (1, 2)])
    [axes] = figure.axes
    assert legend_of(figure) == [f"layer {layer}" for layer in range(16)]
    assert len({to_hex(container[0].get_color()) for container in axes.containers}) == 16


@pytest.mark.parametrize("layers", [1, 2, 6])
def test_coefficients_of_every_layer_in_order(layers):
    shares = [[[0.5, 0.25, 0.01 / (k + layer + 1)] for layer in range(layers)] for k in range(3)]
    checkpoints = [{"name": f"step{k}", "ranks": [0, 0.5, 1], "shares": shares[k]} for k in range(3)]
    figure = figures.coefficient_distributions(checkpoints)
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert len(panels) == layers
    for layer, axes in enumerate(panels):
        assert axes.get_yscale() == "log"
        assert [line.get_ydata().tolist() for line in axes.lines] == [shares[k][layer] for k in range(3)]
        assert [to_hex(line.get_color()) for line in axes.lines] == list(figures.BLUES)
    assert [axes.get_title() for axes in panels] == [f"layer {layer}" for layer in range(layers)]
    assert legend_of(figure) == ["step0", "step1", "step2"]


def test_one_layer_is_enough():
    [axes] = figures.layer_entropy_over_steps([entropy_result(1, [3.0], [0.1])]).axes
    assert len(axes.containers) == 1


def test_acquisition_and_forgetting_draws_estimates_with_their_intervals():
    left, right = figures.acquisition_and_forgetting(ROWS, "general").axes
    colors = [r["color"] for r in ROWS]
    check_bars(left, [r["A"] for r in ROWS], colors)
    check_bars(right, [r["loss_rise"] for r in ROWS], colors)
    assert [text.get_text() for text in left.get_xticklabels()] == ["early", "last"]
    assert "general" in right.get_ylabel()


def test_an_interval_that_leaves_its_value_out_is_drawn_all_the_same():
    """A percentile interval may; matplotlib refuses bars of negative length."""
    axes = plt.figure().subplots()
    figures.bars(axes, ["a"], [estimate(1.0, 1.2, 1.5)], ["red"], "x")
    [[low, high]] = [s[:, 1].tolist() for s in axes.containers[-1].errorbar[2][0].get_segments()]
    assert (low, high) == (1.0, 1.5)


def test_the_overview_shows_the_same_numbers():
    entropy, left, right = figures.overview([SERIES], [90], ROWS, "general").axes
    check_entropy(entropy, SERIES)
    check_bars(left, [r["A"] for r in ROWS], [r["color"] for r in ROWS])
    check_bars(right, [r["loss_rise"] for r in ROWS], [r["color"] for r in ROWS])


@pytest.mark.parametrize("measure", ["K", "K_once"])
def test_probes_over_steps_draws_the_curves_and_the_injections(measure):
    """Evaluations without the measure leave no point."""
    figure = figures.probes_over_steps(CURVES, [10, 20], measure, "A title")
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
    [axes] = figures.probes_over_steps(CURVES, []).axes
    assert len(axes.lines) == 2


def test_a_figure_is_saved_as_png_and_pdf_and_not_kept(tmp_path):
    figure = figures.probes_over_steps(CURVES, [10])
    path = figures.save(figure, tmp_path / "new" / "probes_q0.5")
    assert path == tmp_path / "new" / "probes_q0.5.png"
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.with_suffix(".pdf").read_bytes().startswith(b"%PDF")
    assert not path.with_suffix(".csv").exists(), "no numbers were given"
    assert not plt.get_fignums()
    assert plt.imread(path).std() > 0.01  # not blank


def test_importing_and_drawing_leave_matplotlib_as_it_was(monkeypatch, tmp_path):
    monkeypatch.setattr(matplotlib, "use", lambda *_, **__: pytest.fail("the backend is not ours to choose"))
    before = dict(plt.rcParams)
    importlib.reload(figures)
    figures.save(figures.entropy_over_steps([SERIES]), tmp_path / "figure")
    assert dict(plt.rcParams) == before and not plt.get_fignums()


def dynamics(settings: tuple[str, ...], times: tuple[int, ...] = (1, 2, 40), decay: bool = True) -> dict:
    """As in acquisition.json: one kind is not measured."""
    group = {
        "retainability": {
            "at": list(times),
            "mean": [0.9, 0.8, 0.5][: len(times)],
            "low": [0.8, None, 0.4][: len(times)],
            "high": [0.95, None, 0.6][: len(times)],
            "values": [10, 5, 1][: len(times)],
        },
        "decay": {"a": estimate(0.25, 0.2, 0.3), "line": [[1, 0.9], [40, 0.5]]} if decay else None,
    }
    names = [f"{s}{kind}" for s in settings for kind in ("", "_memorization", "_composition")]
    return {"groups": dict.fromkeys(["all", *names], group)}


def run_summary(name: str, injections: list[int], labels: tuple[str, ...] = ("general", "science"), **more) -> dict:
    return {
        "run": name,
        "start": None,
        "A": estimate(10, 8, 12),
        "downstream": None,
        "loss_rise": {label: estimate(3, 2, 4) for label in labels},
        "curve": [
            {"step": 0, "K": -6.0, "K_once": -7.0, "K_once_semantic": -7.5, "K_once_composition": -7.0},
            {"step": 15, "K": -5.0, "K_once": -6.0, "K_once_semantic": -6.5},
        ],
        "injections": injections,
        "dynamics": None,
        **more,
    }


@pytest.fixture
def drawn(monkeypatch) -> dict:
    """The figures that save_acquisition saves, by the name of their file."""
    found = {}
    monkeypatch.setattr(figures, "save", lambda figure, stem: found.update({stem.name: figure}))
    return found


def marks(axes) -> list[float]:
    return [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == ":"]


def test_save_acquisition_draws_every_run(tmp_path, drawn):
    runs = [run_summary("one", [10, 20]), run_summary("two", [10, 20])]
    figures.save_acquisition({"runs": runs}, tmp_path)
    assert set(drawn) == {"acquisition_and_forgetting", "outcomes_over_pretraining", "probes_over_steps"}
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
    figures.save_acquisition({"runs": runs}, tmp_path)
    assert re.search("science", drawn["acquisition_and_forgetting"].axes[1].get_ylabel())


def test_save_acquisition_without_a_common_loss_draws_the_probes_alone(tmp_path, drawn):
    figures.save_acquisition({"runs": [run_summary("one", [], ())]}, tmp_path)
    assert set(drawn) == {"probes_over_steps"}


def test_injections_are_marked_when_the_first_run_has_none(tmp_path, drawn):
    """A control without injection may stand first."""
    figures.save_acquisition({"runs": [run_summary("control", []), run_summary("two", [10, 20])]}, tmp_path)
    assert marks(drawn["probes_over_steps"].axes[0]) == [10, 20]


def test_outcomes_stand_at_the_pretraining_steps_of_their_starts():
    """F where a run has it, with as much of its interval as is known."""
    f = {"value": 5.0, "low": None, "high": 6.0}
    runs = [run_summary("one", [], start=18000, downstream={"F": f}), run_summary("two", [], start=738020)]
    figure = figures.outcomes_over_pretraining(runs, ["red", "blue"])
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
    [axes] = figures.outcomes_over_pretraining(runs, ["red"] * 5).axes
    places = [bars_with_errors(c)[0][0] for c in axes.containers]
    assert places[1] == 90 and places[3:] == [450, 720]
    assert places[2] - places[1] == pytest.approx(places[1] - places[0]) and 10 < places[1] - places[0] < 50


def test_steps_are_counted_from_the_start_of_each_run():
    """A run that counts on from its checkpoint beside one that does not."""
    one = run_summary("one", [10])
    other = {**run_summary("other", [100]), "begins": 90, "curve": [{"step": 90, "K": -6.0}, {"step": 105, "K": -5.0}]}
    [axes] = figures.probes_by_part([one, other], ["red", "blue"], [["K"]]).axes
    assert marks(axes) == [10]
    assert [list(line.get_xdata()) for line in axes.lines[1:]] == [[0, 15], [0, 15]]


def test_outcomes_of_unknown_starts_stand_side_by_side():
    runs = [run_summary("one", [], (), start=18000), run_summary("two", [], ())]
    [axes] = figures.outcomes_over_pretraining(runs, ["red", "blue"]).axes
    assert [bars_with_errors(c)[0][0] for c in axes.containers] == [0, 1]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["one", "two"]


def test_retainability_is_drawn_with_its_fit_on_a_log_axis(tmp_path, drawn):
    """A row a run that was measured, a column a setting that has any."""
    runs = [
        run_summary("one", [10], dynamics=dynamics(("once", "paraphrase"))),
        run_summary("control", []),
        run_summary("two", [10], dynamics=dynamics(("once",), decay=False)),
    ]
    figures.save_acquisition({"runs": runs}, tmp_path)
    panels = drawn["retainability"].axes
    titles = ["one: paraphrase", "one: once", "two: paraphrase", "two: once"]
    assert [axes.get_title() for axes in panels] == titles
    assert {axes.get_xscale() for axes in panels} == {"log"}
    labels = [[text.get_text() for text in axes.get_legend().get_texts()] for axes in panels if axes.get_legend()]
    with_fit = ["memorization, a = 0.250", "composition, a = 0.250"]
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
    figures.save_acquisition({"runs": [run_summary("one", [10], dynamics=dynamics(("once",), ()))]}, tmp_path)
    assert "retainability" not in drawn
