"""Training OLMo-1B's shape on rows of 1024 tokens in bfloat16, as `scripts.train` does: rate and peak memory.

Micro-batches of 32 rows, two a step. Compiled or not, activations kept or recomputed, beside the usual loop over
transformers' model, whose logits limit it to micro-batches of 16. MFU counts operations as `training_operations` does
(6 a weight and token, the vocabulary's product included, and 12 x layers x width x length for attention) and divides by
the rate of the matrix product that this run of `make gpu` has measured first.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook

from olmo.train.throughput import training_operations
from scripts.gpu.place import Place, cannot_compile
from scripts.gpu.rows import Row, Skipped
from scripts.gpu.runs import open_trainer, release

WARM, STEPS = 2, 4  # steps before those measured, and these
COMPILED = {"compile.mode": "default"}
COMPILED_SMALL = {"compile.backend": "aot_eager"}  # without a compiler of C++
RECOMPUTED = {"activation_checkpointing": "fine_grained"}
WHOLE = {"activation_checkpointing": "whole_layer"}


def measure(place: Place) -> Iterator[Row]:
    """Tokens per second, MFU and peak memory of every kind of run, the one that the docs recommend first."""
    rows, micro = (8, 4) if place.small else (64, 32)
    compiled = COMPILED_SMALL if place.small else COMPILED
    rate, peak = place.bar(1.0), place.bar(80.0)
    reason = "" if place.small else cannot_compile()
    first, bars = ("eager", {}) if reason else ("compiled", {"mfu": 50.0, "peak": peak})
    seconds, held, length, operations = run(place, rows, micro, {} if reason else compiled)
    tokens, ours = rows * length, statistics.median(seconds)
    yield from _rows(first, place, tokens, operations, seconds, held, **bars)
    seconds, held = plain_loop(place, rows, micro // 2, length)
    yield from _rows("plain torch loop", place, tokens, operations, seconds, held)
    faster = statistics.median(seconds) / ours
    bar = None if reason else rate
    yield Row(f"{first} / plain torch loop", faster, "x", at_least=bar, note="tokens per second")
    seconds, held, *_ = run(place, rows, micro, RECOMPUTED)
    yield from _rows("eager, fine_grained", place, tokens, operations, seconds, held, peak=peak)
    if reason:
        raise Skipped(f"compiled: {reason}")
    seconds, held, *_ = run(place, rows, micro, {})
    yield from _rows("eager", place, tokens, operations, seconds, held)
    seconds, held, *_ = run(place, rows, micro, {**compiled, **WHOLE})
    yield from _rows("compiled, whole_layer", place, tokens, operations, seconds, held)


def run(place: Place, rows: int, micro: int, settings: dict[str, str]) -> tuple[list[float], float, int, float]:
    """Seconds of each measured step of a Trainer, from the end of one to the end of the next, loading, logging and
    clipping included; peak GB; the length of rows; operations a token."""
    trainer = open_trainer(place, rows, micro, stop_at=WARM + STEPS, **settings)
    length = trainer.config.model.max_sequence_length
    return *timed_steps(place, trainer.fit), length, training_operations(trainer.model, length)


def timed_steps(place: Place, train: Callable[[], Any]) -> tuple[list[float], float]:
    """Seconds of each step that `train` does after the first WARM ones, and the most memory held meanwhile, in GB.

    Between ends of optimizer steps, by CUDA events on a GPU, so that measuring makes no step wait.
    """
    gpu = place.device.type == "cuda"
    ends: list[Any] = []

    def step_ends(*_: Any) -> None:
        if gpu:
            ends.append(torch.cuda.Event(enable_timing=True))
            ends[-1].record()
        else:
            ends.append(time.perf_counter())

    hook = register_optimizer_step_post_hook(step_ends)
    try:
        held = place.peak_gib(train) * 2**30 / 1e9
    finally:
        hook.remove()
    counted = pairwise(ends[WARM - 1 :])
    if gpu:
        return [before.elapsed_time(after) / 1000 for before, after in counted], held
    return [after - before for before, after in counted], held


def plain_loop(place: Place, rows: int, micro: int, length: int) -> tuple[list[float], float]:
    """Seconds of each step of the usual loop over transformers' OLMo, and peak GB: autocast, the mean loss of the
    next tokens, the gradient clipped, fused AdamW, the loss read after every step."""
    from transformers import OlmoConfig, OlmoForCausalLM

    release()
    shape: dict[str, Any] = {
        **{"vocab_size": 50304, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16},
        **{"num_attention_heads": 16, "max_position_embeddings": length, "tie_word_embeddings": True},
    }
    if place.small:
        shape.update(vocab_size=128, hidden_size=32, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2)
    with place.device:
        model = OlmoForCausalLM(OlmoConfig(**shape)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)
    generator = torch.Generator().manual_seed(0)
    batch = torch.randint(shape["vocab_size"], (rows, length), generator=generator).to(place.device)

    def train() -> None:
        for _ in range(WARM + STEPS):
            optimizer.zero_grad()
            losses = []
            for ids in batch.split(micro):
                labels = F.pad(ids[:, 1:], (0, 1), value=-100)  # the last position predicts nothing
                with torch.autocast(place.device.type, torch.bfloat16):
                    logits = model(ids, use_cache=False).logits
                loss = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten()) * len(ids) / rows
                del logits
                loss.backward()
                losses.append(loss.detach())
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            torch.stack(losses).sum().item()

    return timed_steps(place, train)


def _rows(
    name: str,
    place: Place,
    tokens: int,
    operations: float,
    seconds: list[float],
    held: float,
    mfu: float | None = None,
    peak: float | None = None,
) -> Iterator[Row]:
    """The rows of a run: `tokens` a step, of so many operations each."""
    rates = tuple(tokens / each for each in seconds)
    yield Row(f"{name}: rate", statistics.median(rates), "tokens/s", samples=rates)
    note = f"{operations / 1e9:.2f} GFLOP a token, {len(rates)} steps of {tokens:,} tokens"
    yield place.mfu(operations * tokens, seconds, f"{name}: MFU", mfu, note)
    yield Row(f"{name}: peak memory", held, "GB", at_most=peak)
