"""Writing the whole edited state dict of a model of OLMo-1B's shape, against the obvious script that loads, edits and
saves it; each in a process of its own. And the size of the multiplier file that says the same."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import torch

from analysis.edit import Edit, write_edit
from analysis.results import find_coefficients, read_coefficients
from olmo.config import load, save_model_config
from olmo.model import OLMo
from scripts.benchmarks.processes import forget_peak, peak_bytes, run_in_subprocess

EDIT = Edit(resuscitation_ratio=0.5, amplifying_factor=2.0)


def _ours(folder: Path, form: str, queue: Any) -> None:
    """Puts seconds, and bytes at the peak beyond those before."""
    before, started = forget_peak(), time.perf_counter()
    coefficients = read_coefficients(find_coefficients(folder))
    write_edit(folder, EDIT, EDIT.of(coefficients.average), coefficients, folder / EDIT.file_name(form), form)
    queue.put((time.perf_counter() - started, peak_bytes() - before))


def _load_modify_save(folder: Path, queue: Any) -> None:
    before, started = forget_peak(), time.perf_counter()
    state = torch.load(folder / "model.pt", weights_only=True)
    average = torch.load(folder / "mlp_average_coefficients.pt", weights_only=True)
    for layer, row in enumerate(average):
        weight = state[f"transformer.blocks.{layer}.ff_proj.weight"]
        up, mask = weight[: len(row)], row <= torch.quantile(row, EDIT.resuscitation_ratio)
        up[mask] = up[mask] * (row.mean() / row * EDIT.amplifying_factor)[mask][:, None]
    torch.save(state, folder / "obvious.pt")
    queue.put((time.perf_counter() - started, peak_bytes() - before))


def bench_resuscitation(folder: Path, rounds: int) -> None:
    """Seconds and memory of `--format full`, as ratios; the files hold the same numbers."""
    config = load(Path("configs/official/OLMo-1B.yaml")).model
    save_model_config(folder / "config.yaml", config)
    state = OLMo.empty(config).to_empty(device="cpu").state_dict()
    for tensor in state.values():
        tensor.uniform_(-0.02, 0.02)
    torch.save(state, folder / "model.pt")
    del state
    torch.save(torch.rand(config.n_layers, config.inner_size) + 0.01, folder / "mlp_average_coefficients.pt")
    name = EDIT.file_name("full").removesuffix(".pt")
    run_in_subprocess(_ours, folder, "multipliers")
    times = []
    for number in range(min(rounds, 3)):
        works = [lambda: run_in_subprocess(_load_modify_save, folder), lambda: run_in_subprocess(_ours, folder, "full")]
        results = [work() for work in (works if number % 2 else works[::-1])]
        times.append(results if number % 2 else results[::-1])
        ours, obvious = (
            torch.load(folder / file, weights_only=True, mmap=True) for file in (f"{name}.pt", "obvious.pt")
        )
        assert ours.keys() == obvious.keys() and all(torch.equal(ours[key], obvious[key]) for key in ours)
        del ours, obvious
        for file in (f"{name}.pt", "obvious.pt"):
            (folder / file).unlink()
    seconds = sorted(ours[0] / obvious[0] for obvious, ours in times)
    memory = statistics.median(ours[1] / obvious[1] for obvious, ours in times)
    print(
        f"resuscitation of 1B, full: {statistics.median(seconds):.2f} x the time of load, modify, save "
        f"({seconds[0]:.2f} to {seconds[-1]:.2f}; {statistics.median(t[1][0] for t in times):.1f} s), "
        f"{memory:.2f} x its peak memory ({statistics.median(t[1][1] for t in times) / 2**30:.2f} GiB); multipliers: "
        f"{(folder / f'{name}.safetensors').stat().st_size / 1e6:.2f} MB",
        flush=True,
    )
