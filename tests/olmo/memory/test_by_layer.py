"""How files hold numbers of the memories of each layer: one table of layers that are alike, else a tensor of each."""

from __future__ import annotations

import pytest
import torch

from olmo.memory.by_layer import ByLayer, layers_of, tensors_of


@pytest.mark.parametrize(
    ("sizes", "names"),
    [
        ({0: 3, 1: 3}, {"u"}),
        ({0: 3, 1: 4}, {"u.0", "u.1"}),
        ({1: 3, 2: 3}, {"u.1", "u.2"}),  # without its numbers a table would be that of layers 0 and 1
        ({0: 3, 2: 3, 10: 3}, {"u.0", "u.2", "u.10"}),
        ({0: 5}, {"u"}),
    ],
)
def test_layers_round_trip(sizes: dict[int, int], names: set[str]) -> None:
    layers: ByLayer = {number: torch.rand(size) for number, size in sizes.items()}
    tensors = tensors_of("u", layers)
    assert tensors.keys() == names
    other = {"selected.1": torch.ones(2), "ux.3": torch.ones(2), "u.3.x": torch.ones(2), "u.01": torch.ones(2)}
    found = layers_of("u", {**dict(reversed(tensors.items())), **other})
    assert list(found) == list(sizes) and all(torch.equal(found[number], layers[number]) for number in sizes)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({}, "no tensor u, nor u.0"),
        ({"v": torch.ones(2, 3)}, "no tensor u"),
        ({"u": torch.ones(3)}, r"u: expected layers x memories, not shape \(3,\)"),
        ({"u": torch.ones(0, 3)}, r"u: expected layers x memories, not shape \(0, 3\)"),
        (
            {"u.0": torch.ones(3), "u.2": torch.ones(1, 3)},
            r"u\.2: expected the memories of a layer, not shape \(1, 3\)",
        ),
        ({"u.0": torch.ones(0)}, r"u\.0: expected the memories of a layer"),
    ],
)
def test_tensors_of_another_shape_are_named(tensors: dict[str, torch.Tensor], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        layers_of("u", tensors)
