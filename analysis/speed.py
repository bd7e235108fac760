"""How fast a measurement runs, beside how fast this machine multiplies matrices."""

from __future__ import annotations

import statistics
import time
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from olmo.model import OLMo

WORTH_A_PEAK = 10.0  # seconds of work


def measured_peak(device: torch.device, dtype: torch.dtype, seconds: float = 0.5) -> float:
    """Floating-point operations a second of products of large matrices, the median of several, measured now."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(size, size, device=device, dtype=dtype), torch.randn(size, size, device=device, dtype=dtype)
    rates: list[float] = []
    started = time.perf_counter()
    while len(rates) < 3 or time.perf_counter() - started < seconds:
        before = time.perf_counter()
        F.linear(a, b)[0, 0].item()  # waits for a GPU
        rates.append(2 * size**3 / (time.perf_counter() - before))
    return statistics.median(rates)


matmul_peak = cache(measured_peak)  # measured once a process


def operations_a_token(model: nn.Module, length: int) -> float | None:
    """Floating-point operations that measuring memory coefficients takes for a token of instances of `length`: two a
    weight of the linear maps, without the vocabulary, and attention to the tokens before. Of our models without the
    last down projection, too, which is not computed. None for mixtures of experts, where it depends on the routes.
    """
    if isinstance(model, OLMo):
        maps = [m.weight for block in model.blocks for m in block.modules() if isinstance(m, nn.Linear)]
        weights = sum(weight.numel() for weight in maps) - model.blocks[-1].ff_out.weight.numel()
        return 2.0 * weights + 2.0 * length * model.config.d_model * model.config.n_layers
    if any(parameter.ndim == 3 for parameter in model.parameters()):
        return None
    config: Any = model.config
    head = model.get_output_embeddings()  # type: ignore[operator]
    linear = [m for m in model.modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"]
    weights = sum(m.get_parameter("weight").numel() for m in linear if m is not head)
    return 2.0 * weights + 2.0 * length * config.hidden_size * config.num_hidden_layers


class Speed:
    """The rate of a measurement, and its share of what `matmul_peak` says is possible, for a progress line."""

    def __init__(self, model: nn.Module, length: int, device: torch.device, processes: int):
        self.operations, self.device, self.processes = operations_a_token(model, length), device, processes
        self.dtype = next(model.parameters()).dtype
        self.tokens, self.started = 0, time.perf_counter()
        self._before: torch.cuda.Event | None = None

    def advance(self, tokens: int) -> None:
        """Count tokens of all processes. A GPU may be one batch behind, so that it never waits for this process, and
        no more, so that the rate is that of its work."""
        if self.device.type == "cuda":
            now = torch.cuda.Event()
            now.record()
            if self._before is not None:
                self._before.synchronize()
            self._before = now
        self.tokens += tokens

    def __str__(self) -> str:
        seconds = time.perf_counter() - self.started
        rate = self.tokens / max(seconds, 1e-9)
        text = f", {rate:,.0f} tokens/s"
        # Measuring the peak takes half a second, too long for work that is about to end.
        if self.operations is not None and seconds > WORTH_A_PEAK:
            before = time.perf_counter()
            peak = matmul_peak(self.device, self.dtype) * self.processes
            self.started += time.perf_counter() - before
            text += f", {self.operations * rate / peak:.0%} of the matrix-multiply peak"
        return text
