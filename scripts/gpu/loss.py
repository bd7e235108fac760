"""The loss of OLMo-1B's vocabulary over 32 x 1024 tokens in bfloat16, ours and others: time, memory, error.

The others are those of scripts/benchmarks/loss.py. If torch's is faster and has z-loss, ours can be deleted.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from functools import partial

from scripts.benchmarks.loss import Case, losses_here
from scripts.gpu.place import Place
from scripts.gpu.rows import Row


def measure(place: Place) -> Iterator[Row]:
    """Milliseconds and peak GB of loss and gradients; relative errors of both against float64, on fewer tokens."""
    tokens, checked, width, vocabulary = (64, 32, 32, 128) if place.small else (32768, 4096, 2048, 50304)
    case, small = (Case(count, width, vocabulary, True, place.device) for count in (tokens, checked))
    medians: dict[str, float] = {}
    for name in losses_here(place.device):
        seconds = place.seconds(partial(case.run, name), repeats=10, warmups=2)
        medians[name] = statistics.median(seconds)
        loss, gradients = small.errors(name)
        note = f"{tokens} tokens; of {checked} relative error of the loss {loss:.0e}, of the gradients {gradients:.0e}"
        samples = tuple(1000 * each for each in seconds)
        yield Row(f"{name}: loss and gradients", 1000 * medians[name], "ms", note=note, samples=samples)
        yield Row(f"{name}: memory", case.peak(name) / 1e9, "GB", note="beyond hidden states and vocabulary")
    ours, *others = medians
    for name in others:
        bar = place.bar(1.0) if name == "torch's" else None  # if torch's is faster, ours needs another reason
        yield Row(f"{name} / ours: time", medians[name] / medians[ours], "x", at_least=bar)
