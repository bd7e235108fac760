"""Measure a model again after an edit of its up projections, on the instances of the measurement before."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from analysis.instances import Instances, digest_of
from analysis.measure import measure
from analysis.models import PRECISIONS, open_model
from analysis.results import RESULT, Coefficients
from analysis.resuscitation import Resuscitation
from olmo.console import fixed
from olmo.distributed import Ranks, disable_malloc_trim, pick_device
from olmo.files.paths import read_json
from olmo.memory import jackknife_error, layer_entropy
from olmo.memory.by_layer import ByLayer
from olmo.memory.locate import find_layers

# Relative error of a mean coefficient that rounding of the rescaled rows, or of coefficients, may cause.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 3e-3, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Before:
    """The measurement of a model before its edit, and the instances that were measured."""

    rows: list[NDArray[np.int64]]
    entropy: float
    left_out: NDArray[np.float64]  # H^l without group g, (G, L)
    coefficient: str
    precision: torch.dtype


def measured_before(coefficients: Coefficients, folder: Path) -> Before:
    """The measurement of average coefficients, read from the result beside their file.

    Raises FileNotFoundError without that result, ValueError if it belongs to other coefficients, or if its instances
    cannot be found again.
    """
    result_file = coefficients.path.with_name(RESULT)
    if not result_file.is_file():
        raise FileNotFoundError(f"{result_file}: missing; --verify measures on the instances that it names")
    try:
        result = read_json(result_file)
        data, count, layers = result["data"], result["number_of_instances"], np.array(result["layers"])
        # A measurement with a tolerance may have ended before the last instance that it asked for.
        asked, length = data.get("instances", count), result["sequence_length"]
        pack = bool(data.get("pack"))  # earlier versions took each text as an instance
        instances = Instances(data["path"], asked, length, data.get("order"), data.get("tokenizer"), pack)
        digest, left_out = data["sha256"], np.array(result["leave_one_group_out"]).reshape(-1, len(layers))
        how = (float(result["knowledge_entropy"]), left_out, result["coefficient"], PRECISIONS[result["precision"]])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{result_file}: not a result of analysis.entropy: {error!r}") from error
    entropies = layer_entropy(values.double().numpy() for values in coefficients.average.values())
    # Coefficients are saved in float32.
    if entropies.shape != layers.shape or not np.allclose(entropies, layers, rtol=0, atol=1e-4):
        raise ValueError(f"{coefficients.path}: not the coefficients that {result_file} was computed from")
    rows = instances.read(folder)
    if digest_of(rows) != digest:
        raise ValueError(f"{instances.data}: holds other instances than those of {result_file}")
    return Before(rows[:count], *how)


def verify(
    before: Before,
    folder: Path,
    edit: Path,
    stored: torch.dtype,
    average: ByLayer,
    chosen: Resuscitation,
    factor: float,
    batch_size: int,
    device: str | None,
) -> Iterator[str]:
    """Lines about the entropy before and after, and how exactly the law of algorithm 1 holds.

    The law: in an edited layer whose inputs no other edit changes, the mean coefficient of a selected row becomes
    q * mean(Cbar). This holds for the first edited layer, but not in a layer without a gate, where rows change before
    the activation.

    edit: file of multipliers or full state dict; stored: type of the checkpoint's weights; average: Cbar;
    factor: q.
    Raises ValueError if the law does not hold within rounding.
    """
    disable_malloc_trim()
    torch_device = pick_device(device)
    model = open_model(folder, torch_device, before.precision, edit)
    after = measure(model, before.rows, batch_size, before.coefficient, torch_device, Ranks(), description="verifying")
    change = after.knowledge_entropy - before.entropy
    error = float(jackknife_error(after.left_out.sum(1) - before.left_out.sum(1)))
    yield (
        f"verified on {len(before.rows)} instances: H {fixed(before.entropy, 4)} -> "
        f"{fixed(after.knowledge_entropy, 4)}, difference {fixed(change, 4, '+')} +- "
        f"{'unknown (one instance)' if math.isnan(error) else f'{error:.4f}'}"
    )
    layer = next(n for n, selected in chosen.selected.items() if (selected & ~chosen.dead[n]).any())
    bound = chosen.selected[layer] & ~chosen.dead[layer] & ~chosen.capped[layer]
    if not bound.any():
        yield f"layer {layer}, the first one edited: no memory to compare with the law, all multipliers are capped"
        return
    wanted = factor * average[layer].double().mean()
    found = torch.from_numpy(after.coefficients[layer])[bound]
    if not all(part.gated for part in find_layers(model)[layer].parts):
        yield (
            f"layer {layer}, the first one edited, has no gate and need not follow the law: mean coefficients of "
            f"{int(bound.sum())} selected memories average {float(found.mean()):.6g}, the law gives {factor} x the "
            f"mean {float(average[layer].mean()):.6g}"
        )
        return
    error = float((found / wanted - 1).abs().max())
    yield (
        f"layer {layer}, the first one edited: mean coefficients of {int(bound.sum())} selected memories are "
        f"{factor} x the mean {float(average[layer].mean()):.6g} within {error:.1e}"
    )
    if not error <= max(TOLERANCE[before.precision], TOLERANCE.get(stored, 0.0)):
        raise ValueError(
            f"layer {layer} does not follow the law of algorithm 1, it is {error:.1e} off; nothing is kept"
        )
