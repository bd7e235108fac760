"""Memory of the knowledge entropy of OLMo-7B's shape in bfloat16: does it fit a GPU of 24 GiB?"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from analysis.measure import measure as measure_entropy
from olmo.distributed import Ranks
from scripts.gpu.entropy import BATCH, weights_gib
from scripts.gpu.models import entropy_operations, random_model, random_rows, shape
from scripts.gpu.place import Place
from scripts.gpu.rows import Row


def measure(place: Place) -> Iterator[Row]:
    """Peak memory at the default batch of analysis.entropy and at four times it, and MFU at the latter."""
    config = shape(place, "OLMo-7B")
    model = random_model(place, config, torch.bfloat16)
    operations = entropy_operations(model) * config.max_sequence_length
    for batch, bar in ((BATCH, place.bar(24)), (4 * BATCH, None)):
        rows = random_rows(config, batch)

        def work(rows=rows, batch=batch) -> None:
            measure_entropy(model, rows, batch, "abs", place.device, Ranks())

        work()
        peak = place.peak_gib(work)
        note = f"eager, {batch} x {config.max_sequence_length:,} tokens; weights {weights_gib(model):.1f} GiB"
        yield Row(f"peak memory, {batch} instances", peak, "GiB", at_most=bar, samples=(peak,), note=note)
    seconds = place.seconds(work, repeats=3)
    yield place.mfu(operations * 4 * BATCH, seconds, "MFU, eager", None, f"{4 * BATCH} instances, whole measurement")
