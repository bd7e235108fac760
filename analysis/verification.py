"""Measure again what an edit of the up projections has made of a model, on the instances of the measurement before."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from analysis.entropy import PRECISIONS, measure, open_model
from analysis.instances import digest_of, read_instances
from analysis.resuscitation import Resuscitation
from analysis.series import RESULT
from olmo.architectures import find_memories
from olmo.distributed import Ranks, keep_large_blocks, pick_device
from olmo.memory import jackknife_error, layer_entropy

# Rows rescaled in bfloat16 are rounded to 8 bits.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


def verify(
    folder: Path,
    edit: Path,
    coefficients_file: Path,
    average: Tensor,
    chosen: Resuscitation,
    args: argparse.Namespace,
) -> Iterator[str]:
    """Lines that say the entropy before and after, and how well the law of algorithm 1 holds (method section 2).

    The law: in an edited layer whose inputs no other edit changes, the mean coefficient of a selected row becomes
    q * mean(Cbar). That is so for the first edited layer, whatever comes after; in a layer without a gate it is not,
    because rows change before the activation. average: Cbar (L, M). `args`: amplifying_factor, batch_size, device.
    Raises FileNotFoundError without the result of analysis.entropy beside the coefficients, ValueError where its
    instances are not to be found again, or the law does not hold within rounding.
    """
    result_file = coefficients_file.with_name(RESULT)
    if not result_file.is_file():
        raise FileNotFoundError(f"{result_file}: missing; --verify measures on the instances that it names")
    before = json.loads(result_file.read_text(encoding="utf-8"))
    data = before["data"]
    named = {"data": data["path"], "order": data.get("order"), "tokenizer": data.get("tokenizer")}
    asked = argparse.Namespace(**named, data_size=before["number_of_instances"])
    rows = read_instances(asked, folder, before["sequence_length"])
    if digest_of(rows) != data["sha256"]:
        raise ValueError(f"{data['path']}: holds other instances than those of {result_file}")
    keep_large_blocks()
    device, dtype = pick_device(args.device), PRECISIONS[before["precision"]]
    model = open_model(folder, device, dtype, edit)
    asked_for = (args.batch_size, before["coefficient"], device, Ranks(), None, "verifying")
    after = measure(model, rows, *asked_for)["knowledge"]
    coefficients = torch.from_numpy(after.average)
    entropy = float(layer_entropy(after.average).sum())
    left_out = after.leave_one_out().sum(1) - np.array(before["leave_one_group_out"]).sum(1)
    yield (
        f"verified on {len(rows)} instances: H {before['knowledge_entropy']:.4f} -> {entropy:.4f}, difference "
        f"{entropy - before['knowledge_entropy']:+.4f} +- {float(jackknife_error(left_out)):.4f}"
    )
    layer = int(chosen.selected.any(1).nonzero()[0])
    law = (chosen.selected & ~chosen.dead & ~chosen.capped)[layer]
    wanted = args.amplifying_factor * average[layer].double().mean()
    error = float((coefficients[layer][law] / wanted - 1).abs().max()) if law.any() else 0.0
    yield (
        f"layer {layer}, the first one edited: mean coefficients of {int(law.sum())} selected memories are "
        f"{args.amplifying_factor} x the mean {float(average[layer].mean()):.6g} within {error:.1e}"
    )
    if error > TOLERANCE[dtype] and all(part.gated for part in find_memories(model)[layer]):
        raise ValueError(f"{edit}: layer {layer} does not follow the law of algorithm 1, it is {error:.1e} off")
