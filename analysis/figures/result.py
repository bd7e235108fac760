"""One result: the entropy of its layers, and how each spreads its coefficients over its memories."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from analysis.canvas import BLUES, in_style, panels
from analysis.figures.entropy import numbers_of_layers


@in_style
def draw_result(content: Mapping[str, Any], ranks: Sequence[float], shares: Sequence[Sequence[float]]) -> Figure:
    """H^l of each layer with bars of two standard errors, and the shares of the memories of each, largest first.

    content: of `knowledge_entropy.json`. ranks: 0 for the most used memory of a layer, 1 for the least; shares:
    (layers, ranks).
    """
    figure, [[left, right]] = panels(9.6, 3.6, columns=2)
    numbers = numbers_of_layers(content)
    errors = [2 * (error or 0.0) for error in content["layer_standard_errors"]]
    left.errorbar(numbers, content["layers"], errors, color=BLUES[2], marker="o", markersize=4, capsize=3)
    left.xaxis.get_major_locator().set_params(integer=True)
    left.set(xlabel="layer", ylabel="entropy of the layer (nats)", title="Knowledge entropy per layer")
    for place, (number, values) in enumerate(zip(numbers, shares)):
        color = colormaps["viridis"](0.85 * place / max(len(numbers) - 1, 1))
        shown = np.array(values, float)
        right.plot(ranks, np.where(shown > 0, shown, np.nan), color=color, label=f"layer {number}")
    right.set_yscale("log")
    right.set(xlabel="memories, most used first", ylabel="share of the layer", title="Coefficients of each layer")
    if len(numbers) <= 8:
        right.legend(fontsize=8)
    return figure
