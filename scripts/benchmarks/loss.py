"""The loss in parts against the loss of all logits at once: time, and memory. More than 1.00 x is faster in parts."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from olmo.config import ModelConfig
from olmo.distributed import disable_malloc_trim, pick_device
from olmo.model import OLMo
from olmo.train.loss import Objective, linear_cross_entropy, predictions
from olmo.train.throughput import peak_memory
from scripts.benchmarks.processes import forget_peak, run_in_subprocess
from scripts.benchmarks.rounds import alternate, spread

VOCABULARY = 50304


def in_parts(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    places = torch.arange(len(targets), device=targets.device)
    return linear_cross_entropy(hidden, weight, None, places, targets)[0]


def at_once(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum")


LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"parts": in_parts, "whole": at_once}


def peak_of_loss(name: str, tokens: int, width: int, vocabulary: int, queue: Any) -> None:
    """Bytes that a loss and its gradient take at most, beyond what they are given; in a process of its own,
    with the allocator of training."""
    disable_malloc_trim()
    device = pick_device()
    hidden = torch.randn(tokens, width, device=device, requires_grad=True)
    weight = torch.randn(vocabulary, width, device=device, requires_grad=True)
    targets = torch.randint(vocabulary, (tokens,), device=device)
    LOSSES[name](hidden[:8], weight, targets[:8]).backward()  # torch brings in what it needs
    before = peak_memory(device) if device.type == "cuda" else forget_peak()
    LOSSES[name](hidden, weight, targets).backward()
    queue.put(peak_memory(device) - before)


def bench_loss(folder: Path, rounds: int) -> None:
    """A training step (forward, loss, backward) of a model with OLMo's vocabulary, and the memory of the loss alone."""
    device = pick_device()
    gpu = device.type == "cuda"
    config = ModelConfig(
        d_model=2048 if gpu else 256,
        n_heads=16 if gpu else 8,
        n_layers=16 if gpu else 4,
        mlp_hidden_size=16384 if gpu else 2048,
        rope=True,
        include_bias=False,
        layer_norm_with_affine=False,
        attention_dropout=0.0,
        residual_dropout=0.0,
        embedding_dropout=0.0,
        vocab_size=50280,
        embedding_size=VOCABULARY,
    )
    torch.manual_seed(0)
    model = OLMo(config).to(device)
    host_ids = torch.randint(config.vocab_size, (8 if gpu else 4, 1024 if gpu else 512))
    ids = host_ids.to(device)
    places, targets = (t.to(device) for t in predictions(host_ids))
    objective = Objective(model)

    def step(name: str) -> tuple[float, float]:
        """Seconds, and the processor's seconds, of all threads."""
        model.zero_grad()
        started, processor = time.perf_counter(), time.process_time()
        with torch.autocast(device.type, torch.bfloat16, enabled=gpu):
            if name == "parts":
                loss = objective(ids, places, targets)[0]
            else:
                logits = model(ids)[:, :-1].flatten(0, 1)
                loss = F.cross_entropy(logits.float(), ids[:, 1:].flatten(), reduction="sum")
                del logits
        (loss / ids.numel()).backward()
        if gpu:
            torch.cuda.synchronize(device)
        return time.perf_counter() - started, time.process_time() - processor

    works = {name: partial(step, name) for name in LOSSES}
    alternate(1, works)  # warm up
    parts, whole = (np.array(results) for results in alternate(2 * rounds, works).values())
    print(
        f"loss, a training step with the logits in parts / whole: {spread(whole[:, 0] / parts[:, 0])} over "
        f"{len(parts)} rounds; ours {ids.numel() / np.median(parts[:, 0]):,.0f} tokens/s; by processor time "
        f"{spread(whole[:, 1] / parts[:, 1])}",
        flush=True,
    )
    tokens, width = 8192, 256
    peak, peak_whole = (run_in_subprocess(peak_of_loss, name, tokens, width, VOCABULARY) / 2**20 for name in LOSSES)
    print(
        f"loss, memory for {tokens} tokens in parts / whole: {peak / peak_whole:.2f} x ({peak:,.0f} MiB, "
        f"{peak_whole:,.0f} MiB; the logits in float32 are {tokens * VOCABULARY * 4 / 2**20:,.0f} MiB, the gradient of "
        f"the vocabulary {width * VOCABULARY * 4 / 2**20:,.0f})",
        flush=True,
    )
