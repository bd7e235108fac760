"""Every figure, rendered: no legend or text covers the data, other text, or the border of the figure."""

import importlib
import itertools
import warnings

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from analysis.canvas import bars, save
from analysis.figures import dynamics, entropy, outcomes
from analysis.study.figures.registry import FIGURES
from tests.analysis import drawing
from tests.analysis.drawing import ROWS, SERIES, entropy_result, estimate, run_summary
from tests.analysis.study.rows import joined, rich

LONG = "OLMo-1B_bs128_lr4e4_pubmed_1ep_738k_resuscitation_with_everything_else_that_was_changed"
HOSTILE = ("_hidden", r"$\frac{$", "a$b$c", "tab\tand\nnewline", "<b>", LONG)


@pytest.fixture(autouse=True)
def _figures() -> None:
    """Here they are saved as for readers."""


def check(figure: Figure) -> None:
    """Render it and look at where everything is."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a layout that does not fit is a warning
        FigureCanvasAgg(figure).draw()
    renderer = figure.canvas.get_renderer()
    data = [axes.get_window_extent(renderer) for axes in figure.axes if axes.get_visible()]
    legends = [*figure.legends, *(axes.get_legend() for axes in figure.axes if axes.get_legend())]
    boxes = [(legend, legend.get_window_extent(renderer)) for legend in legends]
    inside = {text for legend in legends for text in legend.get_texts()}
    written = [
        (text, text.get_window_extent(renderer))
        for text in figure.findobj(Text)
        if text.get_text() and text.get_visible() and text not in inside and is_drawn(text, figure)
    ]
    assert legends or len(written) > 3
    for artist, box in [*boxes, *written]:
        name = artist.get_text() if isinstance(artist, Text) else "legend"
        assert box.x0 >= -1 and box.y0 >= -1, (name, box)
        assert box.x1 <= figure.bbox.x1 + 1 and box.y1 <= figure.bbox.y1 + 1, (name, box)
        assert not any(overlap(box, area) for area in data), name
    for (one, first), (other, second) in itertools.combinations([*boxes, *written], 2):
        slanted = all(isinstance(a, Text) and a.get_rotation() not in (0, 90) for a in (one, other))
        assert slanted or not overlap(first, second), (one, other)


def is_drawn(text: Text, figure: Figure) -> bool:
    """Tick labels beyond the limits of an axis, and those of hidden axes, exist but are not drawn."""
    for axes in figure.axes:
        for axis, low, high in ((axes.xaxis, *axes.get_xlim()), (axes.yaxis, *axes.get_ylim())):
            for tick in axis.get_major_ticks() + axis.get_minor_ticks():
                if text in (tick.label1, tick.label2):
                    return axes.get_visible() and min(low, high) <= tick.get_loc() <= max(low, high)
        if text in axes.findobj(Text):
            return axes.get_visible()
    return True


def overlap(one, other) -> bool:
    """By more than a pixel."""
    width = min(one.x1, other.x1) - max(one.x0, other.x0)
    return width > 1 and min(one.y1, other.y1) - max(one.y0, other.y0) > 1


def runs(names, **more) -> list[dict]:
    return [run_summary(name, [10, 20], start=90 * (n // 2), **more) for n, name in enumerate(names)]


def measured(names) -> list[dict]:
    return runs(names, dynamics=drawing.dynamics(("paraphrase", "once", "duplicate")), tokens_per_step=2**22)


def many_layers(count: int) -> list[dict]:
    layers = np.linspace(8.8, 9.0, count).tolist()
    return [entropy_result(step, layers, [0.01] * count) for step in (1000, 369000, 738020)]


def kinds() -> list[dict]:
    named = ("coefficient abs, data dolma", "coefficient relu, data dolma", "coefficient abs, data " + "pubmed " * 9)
    return [{**result, "kind": kind, "name": "x"} for kind in named for result in SERIES]


def shares(layers: int) -> list[dict]:
    return [
        {"name": f"step{n}-unsharded {LONG}", "ranks": [0, 0.5, 1], "shares": [[0.5, 0.25, 0.01]] * layers}
        for n in range(3)
    ]


CONDITIONS = ("early", "middle", "last", "last,\nq = 1", "last,\nq = 2", "last,\nno injection")
DEMO = [{"name": n, "color": "red", "A": estimate(20, 18, 23), "loss_rise": estimate(-1, -2, 0.5)} for n in CONDITIONS]
CURVES = [{"name": n, "color": "red", "curve": [{"step": s, "K": -s} for s in range(0, 151, 15)]} for n in CONDITIONS]


@pytest.mark.parametrize(
    "draw",
    [
        lambda: entropy.entropy_over_steps([SERIES, SERIES], [90, 450, 720]),
        lambda: entropy.entropy_over_steps([[{**r, "name": LONG[:n]} for n, r in enumerate(SERIES, 60)]]),
        lambda: entropy.entropy_over_steps(entropy.by_kind(kinds())),
        lambda: entropy.layer_entropy_over_steps(SERIES),
        lambda: entropy.layer_entropy_over_steps(many_layers(16)),
        lambda: entropy.layer_entropy_over_steps(kinds()),
        lambda: entropy.coefficient_distributions(shares(3)),
        lambda: FIGURES["overview"].draw(rich())[0],
        lambda: FIGURES["figure_4b"].draw(rich())[0],
        lambda: FIGURES["figure_18"].draw(rich())[0],
        lambda: FIGURES["effects"].draw(rich())[0],
        lambda: FIGURES["joined"].draw(joined())[0],
        lambda: outcomes.acquisition_and_forgetting(DEMO, "general"),
        lambda: outcomes.acquisition_and_forgetting([{**ROWS[0], "name": name} for name in HOSTILE], "general"),
        lambda: dynamics.probes_over_steps(CURVES, range(15, 151, 15), "K", "Setting once: every entry in one round"),
        lambda: dynamics.probes_by_part(runs(HOSTILE), ["red"] * 6, [["K_once"], ["K"]]),
        lambda: dynamics.probes_by_part(runs(map(str, range(40))), ["red"] * 40, [["K"]]),
        lambda: outcomes.outcomes_over_pretraining(runs(HOSTILE), ["red"] * 6),
        lambda: outcomes.outcomes_over_pretraining([run_summary(n, []) for n in HOSTILE], ["red"] * 6),
        lambda: dynamics.retainability(measured(HOSTILE[-2:]))[0],
        lambda: dynamics.retainability(measured(["1B", "7B"]), in_tokens=True)[0],
        lambda: dynamics.effectivity_by_injection(measured(HOSTILE[-2:]))[0],
        lambda: dynamics.probes_by_kind(runs(HOSTILE[-2:]))[0],
    ],
)
def test_nothing_covers_the_data(draw):
    check(draw())


def test_a_legend_names_every_run():
    """Also one whose name begins with an underscore, which matplotlib leaves out, or looks like a formula."""
    figure = outcomes.outcomes_over_pretraining(runs(HOSTILE), ["red"] * 6)
    texts = [text.get_text().replace("\n", "").replace("\\", "") for text in figure.legends[0].get_texts()]
    expected = [name.replace("\t", "?").replace("\n", "").replace("\\", "") for name in HOSTILE]
    assert [text.strip() for text in texts] == expected


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def test_an_interval_that_leaves_its_value_out_is_drawn_all_the_same():
    """A percentile interval may; matplotlib refuses bars of negative length."""
    axes = plt.figure().subplots()
    bars(axes, ["a"], [estimate(1.0, 1.2, 1.5)], ["red"], "x")
    [[low, high]] = [s[:, 1].tolist() for s in axes.containers[-1].errorbar[2][0].get_segments()]
    assert (low, high) == (1.0, 1.5)


def test_a_figure_is_saved_as_png_and_pdf_and_not_kept(tmp_path):
    figure = dynamics.probes_over_steps(drawing.CURVES, [10])
    path = save(figure, tmp_path / "new" / "probes_q0.5")
    assert path == tmp_path / "new" / "probes_q0.5.png"
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.with_suffix(".pdf").read_bytes().startswith(b"%PDF")
    assert not path.with_suffix(".csv").exists(), "no numbers were given"
    assert not plt.get_fignums()
    assert plt.imread(path).std() > 0.01  # not blank


def test_importing_and_drawing_leave_matplotlib_as_it_was(monkeypatch, tmp_path):
    monkeypatch.setattr(matplotlib, "use", lambda *_, **__: pytest.fail("the backend is not ours to choose"))
    before = dict(plt.rcParams)
    importlib.reload(entropy)
    save(entropy.entropy_over_steps([SERIES]), tmp_path / "figure")
    assert dict(plt.rcParams) == before and not plt.get_fignums()
