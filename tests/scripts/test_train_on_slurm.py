"""scripts/train.slurm on a real SLURM: warned and queued again, cancelled, and queued by hand, as if uninterrupted."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.running import ROOT, metrics, series, write_world
from tests.slurm import Slurm

pytestmark = pytest.mark.slurm
# A node without GPUs. SLURM looks twice a minute at whose warning is due, from two seconds after the start on.
NODE = ["--ntasks-per-node=2", "--cpus-per-task=1", "--gpus-per-node=0"]
WARNED = ["--time=1", "--signal=B:USR1@58"]
ENDLESS = ["plain.yaml", "--max_duration=1000000", "--scheduler.name=constant", "--scheduler.t_warmup=0"]


def step(folder: Path) -> int:
    """The last step that a run has logged."""
    path = folder / "metrics.jsonl"
    return max(series(folder)) if path.is_file() and path.stat().st_size else 0


def test_a_run_is_queued_again_and_ends_for_good(slurm: Slurm, tmp_path: Path) -> None:
    world, run = write_world(tmp_path / "world"), tmp_path / "run"
    node = [*NODE, f"--output={tmp_path}/%j.log"]
    train = [str(ROOT / "scripts/train.slurm"), *ENDLESS, f"--save_folder={run}"]
    job = slurm.sbatch(*node, *WARNED, *train, cwd=world)
    slurm.wait(lambda: slurm.job(job)["Restarts"] == "1")
    log = tmp_path / f"{job}.log"
    saved = int(re.findall(r"SIGUSR1 at step (\d+); saved", log.read_text())[0])
    slurm.wait(lambda: step(run) > saved + 20)
    slurm.call("scancel", job)
    assert slurm.ended(job)["JobState"] == "CANCELLED"
    assert slurm.job(job)["Restarts"] == "1"
    cancelled = int(re.findall(r"SIGTERM at step (\d+); saved", log.read_text())[0])
    assert cancelled > saved + 20 and step(run) == cancelled

    last = f"--stop_at={cancelled + 10}"
    job = slurm.sbatch(*node, *train, last, cwd=world)
    assert slurm.ended(job)["JobState"] == "COMPLETED"
    command = ["srun", "--ntasks=2", "python3", "-m", "scripts.train", *ENDLESS, last]
    slurm.call(*command, f"--save_folder={tmp_path}/unbroken", cwd=world)
    assert step(run) == cancelled + 10
    assert metrics(run) == metrics(tmp_path / "unbroken")
