"""How long saving interrupts training: `step{N}/`, which a thread writes, against `step{N}-unsharded/`, which the loop
waits for.

Measured from the end of an optimizer step to the next forward pass, at steps that save, less the median of steps that
do not; a run saves once every few steps. Where the thread shares the processors with the steps beside it, these take
longer: printed as how much longer it takes from one save to the next than without saving.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook

from olmo.config import load
from olmo.distributed import Ranks, disable_malloc_trim
from olmo.train import Trainer
from scripts.benchmarks.processes import run_in_subprocess
from scripts.benchmarks.training import prepare

INTERVAL = 5  # steps: the thread must finish before the next save, which would wait for it
KINDS = {"asynchronous": "save_interval", "blocking": "save_interval_unsharded", "none": None}


def run(folder: Path, kind: str, saves: int, interval: int, queue: Any) -> None:
    """Put the seconds by which every save delayed the loop, and those from each save to the next."""
    disable_malloc_trim()
    steps = interval * (saves + 1) + 1
    changes = [f"--save_folder={folder / kind}", f"--stop_at={steps}", "--global_train_batch_size=1"]
    changes += ["--device_train_microbatch_size=1", "--save_num_checkpoints_to_keep=1"]
    changes += ["--save_num_unsharded_checkpoints_to_keep=1"]
    if KINDS[kind]:
        changes.append(f"--{KINDS[kind]}={interval}")
    settings = json.loads((folder / "settings.json").read_text())
    ends: list[float] = []
    begins: list[float] = []

    def step_ends(*_: Any) -> None:
        ends.append(time.perf_counter())

    def step_begins(*_: Any) -> None:  # called for every module
        if len(begins) < len(ends):
            begins.append(time.perf_counter())

    register_optimizer_step_post_hook(step_ends)
    register_module_forward_pre_hook(step_begins)
    Trainer(load(settings["config"], [*settings["overrides"], *changes]), torch.device("cpu"), Ranks()).fit()
    still = {step: begin - end for step, (begin, end) in enumerate(zip(begins, ends), start=1)}
    usual = statistics.median(seconds for step, seconds in still.items() if step % interval)
    saving = range(2 * interval, steps, interval)  # the first warms up
    queue.put(
        (
            [still[step] - usual for step in saving],
            [ends[step - 1] - ends[step - 1 - interval] for step in saving],
        )
    )


def bench_saves(folder: Path, saves: int, interval: int = INTERVAL) -> None:
    """Seconds by which a save delays training, asynchronous and blocking, and their ratio."""
    weights = prepare(folder)
    results = {kind: run_in_subprocess(run, folder, kind, saves, interval) for kind in KINDS}
    (asynchronous, beside), (blocking, between), (_, without) = results.values()
    usual = statistics.median(without)
    print(
        f"saving {weights / 1e6:.0f} M weights and their optimizer, asynchronous / blocking: training is delayed "
        f"{statistics.median(asynchronous) / statistics.median(blocking):.3f} x as long ({_seconds(asynchronous)}, "
        f"{_seconds(blocking)}, {saves} saves each); from one save to the next it takes longer than without by "
        f"{statistics.median(beside) - usual:.2f} s and {statistics.median(between) - usual:.2f} s",
        flush=True,
    )


def _seconds(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.3f} s, {min(values):.3f} to {max(values):.3f}"
