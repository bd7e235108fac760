"""The rate of a bfloat16 product of two matrices of 8192 x 8192: what torch can reach here, the denominator of MFU."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

import torch

from scripts.gpu.place import Place
from scripts.gpu.rows import Row

SIZE, SMALL_SIZE = 8192, 256


def measure(place: Place) -> Iterator[Row]:
    """Operations per second, as TFLOP/s, on random numbers: zeros need less power and run faster."""
    size, generator = (SMALL_SIZE if place.small else SIZE), torch.Generator(place.device).manual_seed(0)
    left, right = (
        torch.randn(size, size, device=place.device, generator=generator).to(torch.bfloat16) for _ in range(2)
    )
    out = torch.empty_like(left)
    seconds = place.seconds(lambda: torch.mm(left, right, out=out), repeats=50, warmups=10)
    rates = tuple(2 * size**3 / each / 1e12 for each in seconds)
    yield Row("matmul bf16", statistics.median(rates), "TFLOP/s", note=f"{size}^3, {len(rates)} times", samples=rates)
