"""Resuscitate inactive memories of a model in memory (paper, algorithm 1), and take the edit back."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

import olmo.memory
from analysis.result import Result
from analysis.resuscitation import resuscitate as algorithm
from olmo.checkpoint import MODEL, identity_of_model
from olmo.memory import Observation
from olmo.memory.by_layer import ByLayer, count
from olmo.memory.rescaling import check_held, multiply, row_factors
from olmo.memory.unwrap import unwrapped

from .measuring import naming_arguments

# The edits of each model that have not been undone, the last one at the end. Models are not kept alive by it.
_edits: WeakKeyDictionary[nn.Module, list[object]] = WeakKeyDictionary()


def observe(model: Any, coefficient: str = "abs") -> AbstractContextManager[Observation]:
    """Observe the memory coefficients of every forward pass inside the block; its hooks are removed when it ends.

        with ke.observe(model) as observation:
            observation.mask, observation.shape = attention_mask, input_ids.shape
            model(input_ids, attention_mask=attention_mask)
        observation.means  # of every layer that has memories, float32 (instances, memories)

    Args:
        model: a module, also wrapped.
        coefficient: "abs": |act(gate) * up|, the absolute input of the down projection; "relu": relu(gate) * up with
            negatives set to 0.

    Raises:
        ValueError: as `measure` does.
    """
    return olmo.memory.observe(model, coefficient)


def resuscitate(
    model: Any,
    result: Result,
    ratio: float,
    factor: float,
    *,
    select: str = "lowest",
    seed: int = 0,
    threshold: str = "layer",
    layers: Sequence[int] | None = None,
    cap: float | None = None,
) -> Edit:
    """Multiply the up-projection rows of inactive memories of a model, in place and at once (paper, algorithm 1).

    Parameters stay the same objects, so an optimizer that has them continues to have them. `edit.undo()`, or the end of
    a `with` block, restores every bit. Warns where the result was measured on other weights than the model has.

    Args:
        model: a module, also wrapped.
        result: of `measure` on the model.
        ratio: the share p in (0, 1] of the memories of each layer that change, those of the lowest coefficients.
        factor: q > 0; after the edit, each of them has q times the layer's mean coefficient.
        select: "lowest", or the controls "random" and "highest".
        seed: of `select` "random".
        threshold: "layer", or "global" for the quantile over all layers together.
        layers: numbers of the layers that change; by default all.
        cap: the largest multiplier; by default there is none.

    Raises:
        ValueError: with nothing changed, for a setting out of range, a result of other layers, a model whose up
            projections cannot be rescaled, an edit that would change nothing, and weights that would overflow.
    """
    with naming_arguments():
        model = unwrapped(model)
        if not isinstance(result, Result):
            raise ValueError(f"result: {type(result).__name__}; expected a Result of measure, or Result.load(folder)")
        if seed and select != "random":
            warnings.warn(f"resuscitate: seed has no effect with select {select!r}", stacklevel=2)
        average = {number: torch.from_numpy(values).float() for number, values in result.coefficients.items()}
        chosen = algorithm(average, ratio, factor, select, seed, threshold, layers, cap)
        if count(chosen.selected) == count(chosen.dead):
            raise ValueError(
                f"resuscitate: all {count(chosen.selected)} selected memories are dead (coefficient 0), so nothing "
                "would change; use a larger ratio"
            )
        changed = {
            name: factors for name, factors in row_factors(model, chosen.multipliers).items() if (factors != 1).any()
        }
        measured = str(result.content["checkpoint"]["fingerprint"])
        now = identity_of_model(model)
        # A folder of another family is identified by its files, with which a model in memory cannot be compared.
        if measured != now and (measured.startswith(MODEL) or not now.startswith(MODEL)):
            warnings.warn(
                "resuscitate: the result was measured on other weights than the model has now; measure it again unless "
                "that is intended",
                stacklevel=2,
            )
        return Edit(model, changed, chosen.selected, chosen.dead)


class Edit:
    """An edit of the weights of a model, which can be undone; also as a context manager, which undoes it at its end.
    `resuscitate` makes it.

    Attributes:
        selected: which memories were selected, bool (M_l,) by the number of the layer.
        dead: those of them whose coefficient is 0, whose rows did not change.
    """

    def __init__(self, model: nn.Module, factors: dict[str, Tensor], selected: ByLayer, dead: ByLayer):
        self.selected, self.dead = selected, dead
        self._model, self._factors = model, factors
        self._before: dict[str, Tensor] = {}  # the numbers of each parameter whose factor is not 1, (n,)
        self._mark = object()
        try:
            with torch.no_grad():
                for name, own in factors.items():
                    parameter = model.get_parameter(name)
                    check_held(name, parameter)
                    self._before[name] = parameter[_places(parameter, own)].clone()
                    multiply(parameter, own, name)
        except BaseException:
            self._restore()
            raise
        _edits.setdefault(model, []).append(self._mark)

    def undo(self) -> None:
        """Restore the weights as they were before the edit, every bit.

        Raises:
            ValueError: and nothing is restored, where the edit is undone already, where a later edit of the model is
                not, and where the edited weights have changed since, by training or loading.
        """
        marks = _edits.get(self._model, [])
        if self._mark not in marks:
            raise ValueError("undo: this edit has been undone already")
        if marks[-1] is not self._mark:
            later = len(marks) - 1 - marks.index(self._mark)
            raise ValueError(f"undo: {later} later edit{'s' if later > 1 else ''} of this model must be undone first")
        with torch.no_grad():
            for name, own in self._factors.items():
                parameter = self._model.get_parameter(name)
                edited, before = parameter.detach().clone(), self._before[name].to(parameter)
                edited[_places(parameter, own)] = before
                multiply(edited, own, name)
                if before.dtype != self._before[name].dtype or not torch.equal(edited, parameter):
                    raise ValueError(
                        f"undo: {name} has changed since the edit, by training or loading; load the model again"
                    )
        self._restore()
        marks.remove(self._mark)

    @torch.no_grad()
    def _restore(self) -> None:
        for name, values in self._before.items():
            parameter = self._model.get_parameter(name)
            parameter[_places(parameter, self._factors[name])] = values.to(parameter.device)

    def __enter__(self) -> Edit:
        return self

    def __exit__(self, *_: object) -> None:
        if self._mark in _edits.get(self._model, []):
            self.undo()

    def __repr__(self) -> str:
        rows = count(self.selected) - count(self.dead)
        undone = "" if self._mark in _edits.get(self._model, []) else ", undone"
        return f"Edit({rows} of {sum(map(len, self.selected.values()))} memories multiplied{undone})"


def _places(parameter: Tensor, factors: Tensor) -> Tensor:
    """Where a factor that broadcasts to a parameter is not 1, bool of the parameter's shape."""
    return (factors != 1).to(parameter.device).expand_as(parameter)
