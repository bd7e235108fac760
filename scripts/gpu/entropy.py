"""Knowledge entropy of OLMo-1B's shape in bfloat16, as `analysis.entropy` measures it on a GPU: compiled layers."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch

from analysis.measure import measure as measure_entropy
from olmo.distributed import Ranks, to_device
from olmo.memory import instance_means, observe
from scripts.gpu.models import entropy_operations, random_model, random_rows, shape
from scripts.gpu.place import Place, cannot_compile
from scripts.gpu.rows import Row, Skipped

BATCH = 4  # instances, the default of analysis.entropy
RATE = "tokens/s, compiled"


def measure(place: Place) -> Iterator[Row]:
    """Tokens per second of a whole measurement, its share of the peak, that of the forward pass alone, memory."""
    if place.device.type == "cuda" and (reason := cannot_compile()):
        raise Skipped(reason)
    config = shape(place, "OLMo-1B")
    model = random_model(place, config, torch.bfloat16)
    rows = random_rows(config, 16 if place.small else 2048)
    tokens, operations = BATCH * config.max_sequence_length, entropy_operations(model)

    def whole(instances: int) -> None:
        measure_entropy(model, rows[:instances], BATCH, "abs", place.device, Ranks(), compiled=True)

    started = time.perf_counter()
    whole(2 * BATCH)
    first = time.perf_counter() - started
    seconds: list[float] = []

    def timed() -> None:
        started = time.perf_counter()
        whole(len(rows))  # ends with numbers on the host
        seconds.append(time.perf_counter() - started)

    peak = place.peak_gib(timed)
    size = f"{len(rows):,} x {config.max_sequence_length:,} tokens, {BATCH} instances a pass"
    rate = len(rows) * config.max_sequence_length / seconds[0]
    yield Row(RATE, rate, "tokens/s", note=f"{size}, whole measurement", samples=(rate,))
    yield place.mfu(operations * len(rows) * config.max_sequence_length, seconds, "MFU, compiled", 60, "the same")
    yield Row("peak memory, compiled", peak, "GiB", samples=(peak,), note=f"weights {weights_gib(model):.2f} GiB")
    yield Row("first two passes", first, "s", samples=(first,), note="compilation")

    ids = to_device(torch.from_numpy(random_rows(config, BATCH)[0]).expand(BATCH, -1).contiguous(), place.device)
    with observe(model) as observation:
        observation.compiled = True
        passes = place.seconds(lambda: instance_means(model, observation, ids), repeats=20, warmups=3)
    yield place.mfu(operations * tokens, passes, "MFU, compiled, forward pass alone", 60, f"{len(passes)} passes")


def weights_gib(model: torch.nn.Module) -> float:
    return sum(weight.numel() * weight.element_size() for weight in model.parameters()) / 2**30
