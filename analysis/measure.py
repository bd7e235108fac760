"""Measure the knowledge entropy of a model on given instances (paper, section 3.1, equation 2).

    rows -> padded batches -> memory coefficients of each instance -> their averages -> H and its standard error

Shapes: B instances, L layers that have memories, M_l memories of layer l, G jackknife groups that hold instances (at
most 64).
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from analysis.breadth import Breadth
from analysis.choices import MEASURES
from analysis.finite import check_finite
from analysis.other_entropies import instance_entropies
from olmo.console import Progress
from olmo.data.masks import padded
from olmo.distributed import Ranks
from olmo.memory import CoefficientAverages, GroupedMeans, jackknife_error, layer_entropy, observe
from olmo.memory.unwrap import is_sharded, unwrapped

_FIRST_CHECK = 64  # instances after which the standard error is first computed; then after every further quarter
_PAUSE = 50  # times what an estimate took: until then none is made for the progress line alone, as a GPU waits for it


@dataclass(frozen=True)
class Measurement:
    """Averages over instances: of the coefficients, and of "attention" (layers,) and "next_token" () where they were
    measured."""

    knowledge: CoefficientAverages
    others: Mapping[str, GroupedMeans] = field(default_factory=dict)

    @property
    def coefficients(self) -> dict[int, NDArray[np.float64]]:
        """Average coefficients Cbar^l, (M_l,), by the number of the layer in the model."""
        return self.knowledge.layers

    @property
    def layers(self) -> NDArray[np.float64]:
        """H^l of each layer, (L,), natural log."""
        return layer_entropy(self.coefficients.values())

    @property
    def knowledge_entropy(self) -> float:
        return float(self.layers.sum())

    @property
    def left_out(self) -> NDArray[np.float64]:
        """H^l without the instances of one group at a time, (G, L)."""
        return self.knowledge.leave_one_out()

    @cached_property
    def breadth(self) -> Breadth:
        return Breadth.of(self.knowledge)

    def to_dict(self) -> dict[str, Any]:
        """The numbers of `knowledge_entropy.json` that follow from the averages alone, ready for JSON."""
        layers, left_out, sizes = self.layers, self.left_out, self.knowledge.sizes
        numbers = {
            "knowledge_entropy": float(layers.sum()),
            "standard_error": _json_errors(left_out.sum(1)),
            "layers": layers.tolist(),
            "layer_standard_errors": _json_errors(left_out),
            "entropy_avg_act_abs": layers.tolist(),
            "maximum": math.fsum(map(math.log, sizes.values())),
            "number_of_instances": self.knowledge.instances,
            "leave_one_group_out": left_out.tolist(),
            "measures": [name for name in MEASURES if name == "knowledge" or name in self.others],
        }
        if self.knowledge.without or len(set(sizes.values())) > 1:
            numbers["layer_numbers"], numbers["layer_sizes"] = list(sizes), list(sizes.values())
            numbers["layers_without_memories"] = self.knowledge.without
        for name in numbers["measures"][1:]:
            average, left_out = self.others[name].average, self.others[name].leave_one_out()
            by_layer = average.ndim == 1
            numbers[f"{name}_entropy"] = float(average.sum())
            numbers[f"{name}_standard_error"] = _json_errors(left_out.sum(1) if by_layer else left_out)
            if by_layer:
                numbers[f"{name}_layers"] = average.tolist()
                numbers[f"{name}_layer_standard_errors"] = _json_errors(left_out)
            numbers[f"{name}_leave_one_group_out"] = left_out.tolist()
        numbers["breadth"] = self.breadth.to_dict()
        return numbers


def _json_errors(left_out: NDArray[np.float64]) -> Any:
    """Jackknife standard errors for JSON: None where a single instance gives none."""
    errors = jackknife_error(left_out)
    return np.where(np.isnan(errors), None, errors).tolist()  # type: ignore[call-overload]


def measure(
    model: nn.Module,
    rows: Sequence[NDArray[np.int64]],
    batch_size: int,
    coefficient: str,
    device: torch.device,
    ranks: Ranks,
    tolerance: float | None = None,
    description: str = "entropy",
    measures: Sequence[str] = ("knowledge",),
    compiled: bool = False,
) -> Measurement:
    """Measure a model on `rows`, token ids of each instance (ragged), shared out among `ranks`; a collective. One that
    FSDP has sharded, whose passes gather weights from all processes, is measured on all rows by each.

    coefficient: "abs" or "relu", as in `observe`. compiled: where most rows have the largest length and only `abs`
    coefficients are measured, our own model's layers go through torch.compile for full batches of that length; every
    other shape would be compiled anew. tolerance: stop at the first check at which the standard error of H is below it;
    checks are made after 64 instances, then whenever their number has grown by a quarter.
    Raises ValueError for tokens that the model does not know and for fewer instances than processes.
    """
    model, show = unwrapped(model), ranks.is_first
    ranks = Ranks() if is_sharded(model) else ranks
    if len(rows) < ranks.world_size:  # on every rank, as none may wait for the others
        raise ValueError(f"{len(rows)} instances, fewer than the {ranks.world_size} processes")
    others: dict[str, GroupedMeans] = {}
    next_check, rested, tokens, estimate = _FIRST_CHECK, 0.0, 0, ""
    lengths = [len(row) for row in rows]
    usual = (batch_size, max(lengths)) if 2 * lengths.count(max(lengths)) > len(rows) else None
    vocabulary = next(module for module in model.modules() if isinstance(module, nn.Embedding)).num_embeddings
    largest = max(int(row.max()) for row in rows)
    if largest >= vocabulary:
        raise ValueError(f"token {largest} in the data, the model's vocabulary has {vocabulary}")
    with (
        observe(model, coefficient) as observation,
        Progress(description, len(rows), "instances", show=show) as progress,
    ):
        knowledge = CoefficientAverages(observation.sizes)
        may_compile = compiled and tuple(measures) == ("knowledge",)
        for start in range(0, len(rows), batch_size * ranks.world_size):
            stop = min(start + batch_size * ranks.world_size, len(rows))
            mine = np.arange(start + ranks.rank, stop, ranks.world_size)
            if len(mine):
                chosen = [rows[i] for i in mine.tolist()]
                ids, mask = padded(chosen, device)
                observation.compiled = may_compile and ids.shape == usual
                values_of = instance_entropies(model, observation, ids, mask, measures)
                knowledge.add(values_of.pop("knowledge"), mine)
                for name, values in values_of.items():
                    others.setdefault(name, GroupedMeans(*values.shape[1:])).add(values, mine)
            tokens += sum(lengths[start:stop])
            now = time.monotonic()
            progress.note = f", {tokens / max(now - progress.started, 1e-9):,.0f} tokens/s{estimate}"
            progress.advance(stop - start)
            wanted = tolerance is not None or (ranks.is_first and now >= rested)
            if stop >= next_check and knowledge.instances and wanted:
                check_finite("knowledge", knowledge.layers.items(), description)
                so_far = copy(knowledge)
                if tolerance is not None:
                    so_far.reduce(ranks)  # all ranks decide alike; for the progress line, what this one has is enough
                error = float(jackknife_error(so_far.leave_one_out().sum(1)))
                estimate = f", H {layer_entropy(so_far.layers.values()).sum():.4f} +- {error:.1e}"
                if tolerance is not None and error < tolerance:
                    break
                next_check = math.ceil(stop * 1.25)
                rested = time.monotonic() + _PAUSE * (time.monotonic() - now)
    for average in (knowledge, *others.values()):
        average.reduce(ranks)
    check_finite("knowledge", knowledge.layers.items(), description)
    for name, of_others in others.items():
        means = of_others.average
        check_finite(name, enumerate(means) if means.ndim else [(None, means)], description)
    return Measurement(knowledge, others)
