"""Knowledge entropy of a model of OLMo-1B's shape, in four ways, beside the machine's matrix-multiply peak.

Each way runs in a process of its own, on the same weights and tokens: (a) the obvious script, transformers in float32
with eager attention that computes logits and keeps the activations of every layer; (b) transformers with hooks that
reduce them at once, and no logits; (c) ours in float32 and (d) in bfloat16.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from analysis.measure import measure
from analysis.models import open_model
from olmo.checkpoint.transformers_layout import to_transformers_config, to_transformers_state
from olmo.config import load, save_model_config
from olmo.distributed import Ranks, disable_malloc_trim, pick_device
from olmo.files.tensors import save_tensors, write_tensors
from olmo.model import OLMo
from scripts.benchmarks.peak import measured_peak, operations_per_token
from scripts.benchmarks.processes import forget_peak, peak_bytes, run_in_subprocess

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
    """Puts seconds, peak memory beyond the weights, the machine's peak, operations a token, and H^l."""
    device = pick_device()
    ids = torch.from_numpy(np.load(folder / "ids.npy")).to(device)
    dtype = torch.bfloat16 if way == 3 else torch.float32
    if way < 2:
        run, model = _transformers(folder, ids, keep=way == 0)
        operations = None
    else:
        disable_malloc_trim()
        model = open_model(folder / "olmo", device, dtype)
        operations = operations_per_token(model, LENGTH)
        rows = list(ids.cpu().numpy())

        def run() -> NDArray[np.float64]:
            compiled = device.type == "cuda"
            return measure(model, rows, BATCH, "abs", device, Ranks(), compiled=compiled).layers

    for parameter in model.parameters():  # mapped weights are read now, not in the measurement
        parameter.detach().flatten()[::512].float().sum()
    peak = measured_peak(device, dtype, 2.0)
    weights = forget_peak()
    if device.type == "cuda":
        run()
        torch.cuda.reset_peak_memory_stats()
        weights = torch.cuda.memory_allocated()
    started = time.perf_counter()
    layers = run()
    seconds = time.perf_counter() - started
    most = torch.cuda.max_memory_allocated() if device.type == "cuda" else peak_bytes()
    peak = (peak + measured_peak(device, dtype, 2.0)) / 2  # before and after: other work comes and goes
    queue.put((seconds, most - weights, peak, operations, layers))


def bench_entropy(folder: Path, rounds: int) -> None:
    """Rates of the four ways, as ratios to the obvious script, and as shares of the peak that they had beside them."""
    config = replace(load(Path("configs/official/OLMo-1B.yaml")).model, n_layers=LAYERS)
    torch.manual_seed(0)
    state = OLMo(replace(config, init_device="cpu")).state_dict()
    for kind in ("olmo", "hf"):
        (folder / kind).mkdir()
    save_model_config(folder / "olmo/config.yaml", config)
    write_tensors(folder / "olmo/model.safetensors", state)
    (folder / "hf/config.json").write_text(json.dumps(to_transformers_config(config, torch.float32)))
    save_tensors(folder / "hf/model.safetensors", to_transformers_state(state, config), {"format": "pt"})
    del state
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (BATCH, LENGTH))
    np.save(folder / "ids.npy", ids)
    found: list[list[Any]] = [[] for _ in WAYS]
    for number in range(rounds):
        for way in range(len(WAYS)) if number % 2 else reversed(range(len(WAYS))):
            found[way].append(run_in_subprocess(_run, way, folder))
    first = found[0]
    for way, name in enumerate(WAYS):
        ratios = [obvious[0] / ours[0] for obvious, ours in zip(first, found[way])]
        line = f"entropy {name}: {statistics.median(ratios):.2f} x (a) ({min(ratios):.2f} to {max(ratios):.2f})"
        line += f", {BATCH * LENGTH / statistics.median(f[0] for f in found[way]):,.0f} tokens/s"
        line += f", {max(f[1] for f in found[way]) / 2**30:.2f} GiB beyond the weights"
        if found[way][0][3] is not None:
            shares = [f[3] * BATCH * LENGTH / f[0] / f[2] for f in found[way]]
            peak = statistics.median(f[2] for f in found[way])
            line += (
                f", {statistics.median(shares):.0%} ({min(shares):.0%} to {max(shares):.0%}) of the matrix-multiply "
            )
            line += f"peak of {peak / 1e9:,.0f} GFLOP/s"
        apart_by = np.abs(found[way][0][4] - found[0][0][4]).max()
        print(f"{line}; H of a layer within {apart_by:.1e} of (a)", flush=True)
