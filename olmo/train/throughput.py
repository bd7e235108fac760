"""What a training step costs: seconds, floating-point operations, the share of the device's peak, memory."""

from __future__ import annotations

import math
import re
import resource
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..config.schema import TrainConfig
from ..model.causal_lm import CausalLM, Model

# Dense operations per second with bfloat16 and float32 (without TF32), from the manufacturers' data sheets, by a part
# of torch's name of the device; the first match counts.
PEAKS = {
    "B200": (2.25e15, 75e12),
    "H200": (989.4e12, 66.9e12),
    "H100 PCIe": (756e12, 51.2e12),
    "H100 NVL": (835e12, 60e12),
    "H100": (989.4e12, 66.9e12),
    "A100": (312e12, 19.5e12),
    "L40S": (362e12, 91.6e12),
    "L4": (121e12, 30.3e12),
    "A6000": (154.8e12, 38.7e12),
}


def training_operations(model: Model, length: int) -> float:
    """Floating-point operations of training on one token in rows of `length`, forward and backward.

    6 a weight of the linear maps, including the product with the vocabulary, tied or not, and 12 x layers x D x length
    for attention: the count of PaLM (arXiv 2204.02311, appendix B). As usual, masked positions of attention are counted
    and recomputed activations are not.
    """
    if isinstance(model, CausalLM):
        return _operations(model, length)
    maps = (m for block in model.blocks for m in block.modules() if isinstance(m, nn.Linear))
    rows = model.config.embedding_size or model.config.vocab_size
    weights = sum(m.weight.numel() for m in maps) + rows * model.width
    return 6.0 * weights + 12.0 * len(model.blocks) * model.width * length


def _operations(model: CausalLM, length: int) -> float:
    """The same of a model of transformers': the matrices of its layers and its head, routers included and of experts
    those that a token has; and in layers with attention 6 x heads x (width of a key + width of a value) x length.

    Linear attention and state-space mixers count with their matrices alone.
    """
    config, weights, attention = model.network.config.get_text_config(), 0.0, 0.0
    parts = (*model.blocks, model.network.get_output_embeddings() or nn.Identity())
    chosen = _number(config, "num_experts_per_tok", "moe_topk", "top_k_experts")
    for module in (module for part in parts for module in part.modules()):
        routed = getattr(module, "down_proj", None)  # of experts a tensor (E, D, M), with others of E beside it
        share = chosen / len(routed) if chosen and isinstance(routed, torch.Tensor) else 1.0
        matrices = (w for name, w in module.named_parameters(recurse=False) if w.ndim > 1 and "bias" not in name)
        weights += 0 if isinstance(module, nn.Embedding) else share * sum(w.numel() for w in matrices)
    for block in model.blocks:
        for name, module in block.named_children():
            if "att" not in name or "linear" in name or all(w.ndim < 2 for w in module.parameters()):
                continue
            heads = _number(module, "num_heads") or _number(config, "num_attention_heads") or 1.0
            key, other = (_number(place, "qk_head_dim", "head_dim") for place in (module, config))
            key = key or other or model.width / heads
            value = _number(module, "v_head_dim") or _number(config, "v_head_dim") or key
            attention += 6.0 * heads * (key + value) * length
    return 6.0 * weights + attention


def _number(place: Any, *names: str) -> float | None:
    """The first of these attributes that is a number, the mean of one that is a list of them, but 0; else None."""
    for name in names:
        with suppress(AttributeError, RuntimeError):  # the latter of a configuration whose layers differ in it
            value = getattr(place, name)
            if isinstance(value, (int, float, list)) and value:
                return float(np.mean(value))
    return None


def peak_operations(config: TrainConfig, device: torch.device) -> float | None:
    """The device's peak of operations per second in the run's precision; None if unknown.

    `speed_monitor.gpu_flops_available`, or else a table of GPUs.
    """
    given = config.speed_monitor.gpu_flops_available
    if given is not None or device.type != "cuda":
        return None if given is None else float(given)
    name = torch.cuda.get_device_name(device)
    half = config.precision == "amp_bf16"
    return next((peaks[0 if half else 1] for part, peaks in PEAKS.items() if re.search(rf"\b{part}\b", name)), None)


def peak_bytes() -> int:
    """The most memory, in bytes, that this process has held."""
    status = Path("/proc/self/status")
    if status.is_file():  # Linux, where getrusage also counts what the parent held
        return int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) * 1024  # type: ignore[index]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def peak_memory(device: torch.device) -> int:
    """The most bytes that tensors on this GPU, or this process on a CPU, have held.

    On Apple's GPU the bytes that its driver has allocated; it keeps freed ones unless memory runs short.
    """
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_bytes()


class StepTimer:
    """Times steps, each a `with` block.

    On a GPU only logged steps wait for the device, for all steps since the last logged one: the window of
    `speed_monitor.window_size` steps is rounded up to a multiple of `console_log_interval`.
    """

    def __init__(self, config: TrainConfig):
        between = config.console_log_interval
        self._window: deque[float] = deque(maxlen=between * math.ceil(config.speed_monitor.window_size / between))

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._window.append(time.perf_counter() - self._started)

    @property
    def seconds(self) -> float | None:
        """The mean over the window; None before the first step has ended."""
        return sum(self._window) / len(self._window) if self._window else None
