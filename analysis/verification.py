"""Measure again what an edit of the up projections has made of a model, on the instances of the measurement before."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from analysis.entropy import PRECISIONS, measure, open_model
from analysis.instances import digest_of, read_instances
from analysis.resuscitation import Resuscitation
from analysis.series import RESULT
from olmo.distributed import Ranks, disable_malloc_trim, pick_device
from olmo.memory import jackknife_error, layer_entropy
from olmo.memory.locate import find_memories

# What rounding of rescaled rows, or of coefficients, may make of a mean coefficient.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 3e-3, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Before:
    """What analysis.entropy wrote of a model before its edit, and the instances that it measured."""

    rows: list[NDArray[np.int64]]
    entropy: float
    left_out: NDArray[np.float64]  # H^l without group g, (G, L)
    coefficient: str
    precision: torch.dtype


def measured_before(coefficients_file: Path, average: Tensor, folder: Path) -> Before:
    """The measurement that gave the average coefficients (L, M) of a file, from the result that lies beside it.

    Raises FileNotFoundError without that result, ValueError where it is one of other coefficients, or where its
    instances are not to be found again.
    """
    result_file = coefficients_file.with_name(RESULT)
    if not result_file.is_file():
        raise FileNotFoundError(f"{result_file}: missing; --verify measures on the instances that it names")
    try:
        result = json.loads(result_file.read_text(encoding="utf-8"))
        data, count, length = result["data"], result["number_of_instances"], result["sequence_length"]
        path, digest, layers = data["path"], data["sha256"], np.array(result["layers"])
        left_out = np.array(result["leave_one_group_out"]).reshape(-1, len(layers))
        how = (float(result["knowledge_entropy"]), left_out, result["coefficient"], PRECISIONS[result["precision"]])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{result_file}: no result of analysis.entropy: {error!r}") from error
    found = layer_entropy(average.double().numpy())
    if found.shape != layers.shape or not np.allclose(found, layers, rtol=0, atol=1e-4):  # they are written in float32
        raise ValueError(f"{coefficients_file}: not the coefficients that {result_file} was computed from")
    # A measurement with a tolerance may have ended before the last instance that it asked for.
    named = {"data": path, "order": data.get("order"), "tokenizer": data.get("tokenizer")}
    rows = read_instances(argparse.Namespace(**named, data_size=data.get("instances", count)), folder, length)
    if digest_of(rows) != digest:
        raise ValueError(f"{path}: holds other instances than those of {result_file}")
    return Before(rows[:count], *how)


def verify(
    before: Before,
    folder: Path,
    edit: Path,
    stored: torch.dtype,
    average: Tensor,
    chosen: Resuscitation,
    args: argparse.Namespace,
) -> Iterator[str]:
    """Lines that say the entropy before and after, and how well the law of algorithm 1 holds (method section 2).

    The law: in an edited layer whose inputs no other edit changes, the mean coefficient of a selected row becomes
    q * mean(Cbar). That is so for the first edited layer, whatever comes after; in a layer without a gate it need not
    be, because rows change before the activation. `edit`: file of multipliers or full state dict; `stored`: type of
    the checkpoint's weights; average: Cbar (L, M); `args`: amplifying_factor, batch_size, device.
    Raises ValueError where the law does not hold within rounding.
    """
    disable_malloc_trim()
    device = pick_device(args.device)
    model = open_model(folder, device, before.precision, edit)
    asked_for = (args.batch_size, before.coefficient, device, Ranks(), None, "verifying")
    after = measure(model, before.rows, *asked_for)["knowledge"]
    coefficients = torch.from_numpy(after.average)
    entropy = float(layer_entropy(after.average).sum())
    error = float(jackknife_error(after.leave_one_out().sum(1) - before.left_out.sum(1)))
    yield (
        f"verified on {len(before.rows)} instances: H {before.entropy:.4f} -> {entropy:.4f}, difference "
        f"{entropy - before.entropy:+.4f} +- {'unknown (one instance)' if math.isnan(error) else f'{error:.4f}'}"
    )
    edited = (chosen.selected & ~chosen.dead).any(1)
    if not edited.any():
        yield "no memory was edited, all that were selected are dead"
        return
    layer = int(edited.nonzero()[0])
    bound = (chosen.selected & ~chosen.dead & ~chosen.capped)[layer]
    if not bound.any():
        yield f"layer {layer}, the first one edited: no memory to hold to the law, their multipliers are cut to the cap"
        return
    wanted = args.amplifying_factor * average[layer].double().mean()
    error = float((coefficients[layer][bound] / wanted - 1).abs().max())
    gated = all(part.gated for part in find_memories(model)[layer])
    yield (
        f"layer {layer}, the first one edited{'' if gated else ', which has no gate and need not follow the law'}: "
        f"mean coefficients of {int(bound.sum())} selected memories are {args.amplifying_factor} x the mean "
        f"{float(average[layer].mean()):.6g} within {error:.1e}"
    )
    if gated and not error <= max(TOLERANCE[before.precision], TOLERANCE.get(stored, 0.0)):
        raise ValueError(
            f"layer {layer} does not follow the law of algorithm 1, it is {error:.1e} off; nothing is kept"
        )
