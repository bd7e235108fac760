"""The loss in parts, as training computes it, beside other ways: time, memory, and error against float64.

The others: all logits at once; torch's `linear_cross_entropy` (2.13), in parts of the same size; on a GPU Liger Kernel.
Torch's has neither z-loss nor soft cap, and not autocast: weights and states are rounded for it. With bfloat16 it adds
up the losses, and on a GPU the parts of the vocabulary's gradient, in bfloat16.
"""

from __future__ import annotations

import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from olmo.config import ModelConfig
from olmo.distributed import disable_malloc_trim, pick_device
from olmo.model import OLMo
from olmo.train.fused_loss import fused_linear_cross_entropy
from olmo.train.loss import (
    TOKENS,
    TOKENS_ELSEWHERE,
    Losses,
    LossFunction,
    Objective,
    cross_entropy,
    linear_cross_entropy,
    predictions,
)
from olmo.train.throughput import peak_memory
from scripts.benchmarks.processes import forget_peak, run_in_subprocess
from scripts.benchmarks.rounds import alternate, spread

VOCABULARY = 50304


def at_once(hidden: Tensor, weight: Tensor, bias: Tensor | None, places: Tensor, targets: Tensor, **_: Any) -> Losses:
    return cross_entropy(F.linear(hidden.index_select(0, places), weight, bias), targets)


def by_torch(hidden: Tensor, weight: Tensor, bias: Tensor | None, places: Tensor, targets: Tensor, **_: Any) -> Losses:
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=TOKENS.get(kind, TOKENS_ELSEWHERE))
    states, offset = hidden.index_select(0, places).to(dtype), None if bias is None else bias.to(dtype)
    loss = F.linear_cross_entropy(
        states, weight.to(dtype), targets, linear_bias=offset, reduction="sum", options=options
    ).float()
    return loss, loss.detach(), loss.new_zeros(())


LOSSES: dict[str, LossFunction] = {
    "ours, in parts": linear_cross_entropy,
    "all at once": at_once,
    "torch's": by_torch,
    "Liger's": fused_linear_cross_entropy,
}


def losses_here(device: torch.device) -> dict[str, LossFunction]:
    """Those that this installation has, ours first."""
    missing = set() if hasattr(F, "linear_cross_entropy") else {"torch's"}
    if device.type != "cuda" or find_spec("liger_kernel") is None:
        missing.add("Liger's")
    return {name: function for name, function in LOSSES.items() if name not in missing}


class Case:
    """Hidden states of `tokens` tokens, a vocabulary, and targets on a device: float32, in autocast where `half`."""

    def __init__(self, tokens: int, width: int, vocabulary: int, half: bool, device: torch.device):
        generator = torch.Generator().manual_seed(0)
        self.hidden = torch.randn(tokens, width, generator=generator).to(device).requires_grad_()
        weight = torch.randn(vocabulary, width, generator=generator) / width**0.5
        self.weight = weight.to(device).requires_grad_()
        self.targets = torch.randint(vocabulary, (tokens,), generator=generator).to(device)
        self.places, self.half, self.device = torch.arange(tokens, device=device), half, device

    def run(self, name: str) -> Tensor:
        """The mean loss, float32; its gradients are those of `hidden` and `weight`."""
        self.hidden.grad = self.weight.grad = None
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            loss = LOSSES[name](self.hidden, self.weight, None, self.places, self.targets)[0]
        loss = loss / len(self.places)
        loss.backward()
        return loss.detach()

    def seconds(self, name: str) -> tuple[float, float]:
        """Seconds of loss and gradients, and the processor's seconds, of all threads."""
        self._wait()
        started, processor = time.perf_counter(), time.process_time()
        self.run(name)
        self._wait()
        return time.perf_counter() - started, time.process_time() - processor

    def peak(self, name: str) -> int:
        """Bytes that loss and gradients take at most, beyond what they are given."""
        Case(8, 16, 32, self.half, self.device).run(name)  # torch brings in what it needs
        self.hidden.grad = self.weight.grad = None
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
        else:
            before = forget_peak()
        self.run(name)
        return peak_memory(self.device) - before

    def errors(self, name: str) -> tuple[float, float]:
        """Relative error of the loss, and the larger one of the gradients, by their norms; against float64."""
        leaves = [tensor.detach().double().requires_grad_() for tensor in (self.hidden, self.weight)]
        expected = 0.0
        for rows in self.places.split(512):  # all at once take 8 bytes a logit
            loss = F.cross_entropy(F.linear(leaves[0][rows], leaves[1]), self.targets[rows], reduction="sum")
            (loss / len(self.places)).backward()
            expected += loss.item() / len(self.places)
        found = self.run(name).item()
        pairs = ((leaf.grad, given.grad) for leaf, given in zip(leaves, (self.hidden, self.weight)))
        gradients = (((mine - wanted).norm() / wanted.norm()).item() for wanted, mine in pairs)  # type: ignore[union-attr]
        return abs(found / expected - 1), max(gradients)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def peak_of_loss(name: str, tokens: int, width: int, vocabulary: int, half: bool, queue: Any) -> None:
    """Put `Case.peak`, in a process of its own, with the allocator of training."""
    disable_malloc_trim()
    queue.put(Case(tokens, width, vocabulary, half, pick_device()).peak(name))


def bench_loss(folder: Path, rounds: int) -> None:
    """A training step (forward, loss, backward) of a model with OLMo's vocabulary; then the loss alone."""
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

    def step(loss: LossFunction) -> tuple[float, float]:
        """Seconds, and the processor's seconds, of all threads."""
        model.zero_grad()
        started, processor = time.perf_counter(), time.process_time()
        with torch.autocast(device.type, torch.bfloat16, enabled=gpu):
            total = Objective(model, loss=loss)(ids, places, targets)[0]
        (total / ids.numel()).backward()
        if gpu:
            torch.cuda.synchronize(device)
        return time.perf_counter() - started, time.process_time() - processor

    here = losses_here(device)
    works = {name: partial(step, loss) for name, loss in here.items()}
    alternate(1, works)  # warm up
    ours, *others = (np.array(results) for results in alternate(2 * rounds, works).values())
    print(f"loss, a training step in parts of our own: {ids.numel() / np.median(ours[:, 0]):,.0f} tokens/s", flush=True)
    for name, other in zip(list(here)[1:], others):
        print(
            f"  {name} / ours: {spread(other[:, 0] / ours[:, 0])} as long over {len(ours)} rounds, by processor time "
            f"{spread(other[:, 1] / ours[:, 1])}",
            flush=True,
        )
    tokens, width = 8192 if gpu else 2048, config.d_model
    for half in (False, True):
        case = Case(tokens, width, VOCABULARY, half, device)
        results = alternate(rounds, {name: partial(case.seconds, name) for name in here})
        ours = np.array(results["ours, in parts"])
        logits, gradient = (size * VOCABULARY * 4 / 2**20 for size in (tokens, width))
        print(
            f"loss alone and its gradients, {tokens} tokens, width {width}, {'bfloat16' if half else 'float32'} (the "
            f"logits in float32 are {logits:,.0f} MiB, the gradient of the vocabulary {gradient:,.0f}):",
            flush=True,
        )
        for name in here:
            other = np.array(results[name])
            peak = run_in_subprocess(peak_of_loss, name, tokens, width, VOCABULARY, half) / 2**20
            loss, gradients = case.errors(name)
            print(
                f"  {name}: {spread(other[:, 1] / ours[:, 1])} ours by processor time, {np.median(other[:, 0]):.3f} s; "
                f"{peak:,.0f} MiB; relative error of the loss {loss:.0e}, of the gradients {gradients:.0e}",
                flush=True,
            )
