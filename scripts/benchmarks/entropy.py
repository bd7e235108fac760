"""Knowledge entropy of a model of OLMo-1B's shape, in four ways.

Each runs in a process of its own, on the same weights and tokens: (a) the obvious script, transformers in float32 with
eager attention that computes logits and keeps the activations of every layer; (b) transformers with hooks that reduce
them at once, and no logits; (c) ours in float32 and (d) in bfloat16.
"""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from analysis.measure import measure
from analysis.models import open_model
from olmo.config import load
from olmo.distributed import Ranks, disable_malloc_trim, pick_device
from olmo.model import OLMo
from scripts.benchmarks.checkpoints import write_checkpoints
from scripts.benchmarks.processes import forget_peak, peak_bytes, run_in_subprocess
from scripts.benchmarks.rounds import alternate, spread

LAYERS = 16 if torch.cuda.is_available() else 4
BATCH, LENGTH = 4, 2048
WAYS = ("(a) obvious script", "(b) transformers with hooks", "(c) ours, float32", "(d) ours, bfloat16")


def entropy_of(averages: list[Tensor]) -> NDArray[np.float64]:
    """H^l of average coefficients, as a script would have it."""
    shares = [average.double() / average.double().sum() for average in averages]
    return np.array([-(share * share.log()).sum().item() for share in shares])


def _transformers(folder: Path, ids: Tensor, keep: bool) -> tuple[Any, Any]:
    """A function that measures with transformers, all activations and logits kept or not, and the model."""
    from transformers import AutoModelForCausalLM

    attention = "eager" if keep else "sdpa"
    model = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32, attn_implementation=attention)
    model = model.to(ids.device).eval()
    kept: dict[int, Tensor] = {}

    def hook(number: int) -> Any:
        def before_down(module: Any, args: tuple[Tensor, ...]) -> None:
            kept[number] = args[0].abs() if keep else args[0].abs().mean(1)

        return before_down

    for number, layer in enumerate(model.model.layers):
        layer.mlp.down_proj.register_forward_pre_hook(hook(number))

    def run() -> NDArray[np.float64]:
        with torch.no_grad():
            logits = model(ids).logits if keep else model.model(ids)
            averages = [kept[n].mean((0, 1)) if keep else kept[n].mean(0) for n in range(LAYERS)]
        del logits
        return entropy_of(averages)

    return run, model


def _run(way: int, folder: Path, queue: Any) -> None:
    """Put seconds, peak memory beyond the weights, and H^l."""
    device = pick_device()
    ids = torch.from_numpy(np.load(folder / "ids.npy")).to(device)
    dtype = torch.bfloat16 if way == 3 else torch.float32
    if way < 2:
        run, model = _transformers(folder, ids, keep=way == 0)
    else:
        disable_malloc_trim()
        model = open_model(folder / "olmo", device, dtype)
        rows = list(ids.cpu().numpy())

        def run() -> NDArray[np.float64]:
            compiled = device.type == "cuda"
            return measure(model, rows, BATCH, "abs", device, Ranks(), compiled=compiled).layers

    for parameter in model.parameters():  # mapped weights are read now, not in the measurement
        parameter.detach().flatten()[::512].float().sum()
    weights = forget_peak()
    if device.type == "cuda":
        run()
        torch.cuda.reset_peak_memory_stats()
        weights = torch.cuda.memory_allocated()
    started = time.perf_counter()
    layers = run()
    seconds = time.perf_counter() - started
    most = torch.cuda.max_memory_allocated() if device.type == "cuda" else peak_bytes()
    queue.put((seconds, most - weights, layers))


def bench_entropy(folder: Path, rounds: int) -> None:
    """Rates of the four ways, as ratios to the obvious script, and their memory."""
    config = replace(load(Path("configs/official/OLMo-1B.yaml")).model, n_layers=LAYERS)
    torch.manual_seed(0)
    write_checkpoints(folder, config, OLMo(replace(config, init_device="cpu")).state_dict())
    np.save(folder / "ids.npy", np.random.default_rng(0).integers(0, config.vocab_size, (BATCH, LENGTH)))
    works = {name: partial(run_in_subprocess, _run, way, folder) for way, name in enumerate(WAYS)}
    found = alternate(rounds, works)
    obvious = np.array([seconds for seconds, *_ in found[WAYS[0]]])
    for name, results in found.items():
        seconds = np.array([seconds for seconds, *_ in results])
        apart = np.abs(results[0][2] - found[WAYS[0]][0][2]).max()
        print(
            f"entropy {name}: {spread(obvious / seconds)} (a), {BATCH * LENGTH / np.median(seconds):,.0f} tokens/s, "
            f"{max(memory for _, memory, _ in results) / 2**30:.2f} GiB beyond the weights; H of a layer within "
            f"{apart:.1e} of (a)",
            flush=True,
        )
