"""The matrix-multiply peak of a device, and the operations of an entropy measurement to compare with it."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from olmo.model import OLMo


def measured_peak(device: torch.device, dtype: torch.dtype, seconds: float = 0.5) -> float:
    """Floating-point operations per second of products of large matrices: the median of several, measured now."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(size, size, device=device, dtype=dtype), torch.randn(size, size, device=device, dtype=dtype)
    rates: list[float] = []
    started = time.perf_counter()
    while len(rates) < 3 or time.perf_counter() - started < seconds:
        before = time.perf_counter()
        F.linear(a, b)[0, 0].item()  # waits for a GPU
        rates.append(2 * size**3 / (time.perf_counter() - before))
    return statistics.median(rates)


def operations_per_token(model: nn.Module, length: int) -> float | None:
    """Floating-point operations per token when memory coefficients are measured on instances of `length` tokens: two
    for each weight of the linear maps, without the vocabulary, and attention to the tokens before. For our models
    without the last down projection, which is not computed. None for a mixture of experts, where it depends on routing.
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
