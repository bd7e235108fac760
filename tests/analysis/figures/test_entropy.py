"""The figures of entropy draw the numbers that they are given, and nothing else."""

import pytest
from matplotlib.colors import to_hex

from analysis.canvas import BLUES
from analysis.figures import entropy
from tests.analysis.drawing import SERIES, bars_with_errors, check_entropy, entropy_result, legend_of


def test_entropy_over_steps_draws_every_checkpoint_with_two_standard_errors():
    figure = entropy.entropy_over_steps([SERIES])
    check_entropy(figure.axes[0], SERIES)


def test_marked_checkpoints_stand_where_they_were_measured():
    figure = entropy.entropy_over_steps([SERIES], [90, 720])
    [axes] = figure.axes
    marks = [line for line in axes.lines if line.get_markersize() > 10]
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in marks] == [(90, 12.5), (720, 11.9)]
    assert [to_hex(line.get_color()) for line in marks] == list(BLUES[:2])
    assert legend_of(figure) == ["start at step 90", "start at step 720"]


def test_any_number_of_seeds_can_be_seen():
    """One line a seed, the later ones fainter, none invisible."""
    shifted = [[{**r, "knowledge_entropy": r["knowledge_entropy"] + s} for r in SERIES] for s in range(7)]
    figure = entropy.entropy_over_steps(shifted, [90])
    assert len(figure.axes[0].containers) == 7
    for number, results in enumerate(shifted):
        check_entropy(figure.axes[0], results, number)
    alphas = [c[0].get_alpha() for c in figure.axes[0].containers]
    assert alphas == sorted(alphas, reverse=True) and alphas[0] == 1 and alphas[-1] >= 0.2


def test_entropy_of_every_layer():
    figure = entropy.layer_entropy_over_steps(SERIES)
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
    figure = entropy.layer_entropy_over_steps([{**result, "layer_numbers": [1, 5]} for result in SERIES])
    assert legend_of(figure) == ["layer 1", "layer 5"]
    curve = {"name": "step1", "ranks": [0, 1], "shares": [[0.5, 0.1], [0.6, 0.1]], "layer_numbers": [1, 5]}
    assert [axes.get_title() for axes in entropy.coefficient_distributions([curve]).axes] == ["layer 1", "layer 5"]


@pytest.mark.parametrize("per_layer", [False, True])
def test_checkpoints_without_a_step_stand_side_by_side_by_name(per_layer):
    results = [{**entropy_result(step, [6.0, 6.5], [0.01, 0.02]), "name": f"model {step}"} for step in (90, -1)]
    figure = entropy.layer_entropy_over_steps(results) if per_layer else entropy.entropy_over_steps([results])
    [axes] = figure.axes
    assert [text.get_text() for text in axes.get_xticklabels()] == ["model 90", "model -1"]
    assert [p[0] for p in bars_with_errors(axes.containers[0])] == [0, 1]


def test_many_layers_are_told_apart_beside_the_axes():
    figure = entropy.layer_entropy_over_steps([entropy_result(step, [6.0] * 16, [0.01] * 16) for step in (1, 2)])
    [axes] = figure.axes
    assert legend_of(figure) == [f"layer {layer}" for layer in range(16)]
    assert len({to_hex(container[0].get_color()) for container in axes.containers}) == 16


@pytest.mark.parametrize("layers", [1, 2, 6])
def test_coefficients_of_every_layer_in_order(layers):
    shares = [[[0.5, 0.25, 0.01 / (k + layer + 1)] for layer in range(layers)] for k in range(3)]
    checkpoints = [{"name": f"step{k}", "ranks": [0, 0.5, 1], "shares": shares[k]} for k in range(3)]
    figure = entropy.coefficient_distributions(checkpoints)
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert len(panels) == layers
    for layer, axes in enumerate(panels):
        assert axes.get_yscale() == "log"
        assert [line.get_ydata().tolist() for line in axes.lines] == [shares[k][layer] for k in range(3)]
        assert [to_hex(line.get_color()) for line in axes.lines] == list(BLUES)
    assert [axes.get_title() for axes in panels] == [f"layer {layer}" for layer in range(layers)]
    assert legend_of(figure) == ["step0", "step1", "step2"]


def test_one_layer_is_enough():
    [axes] = entropy.layer_entropy_over_steps([entropy_result(1, [3.0], [0.1])]).axes
    assert len(axes.containers) == 1
