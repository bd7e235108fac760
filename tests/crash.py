"""Kill training again and again (SIGKILL), go on with the same command, and compare with a run that was never killed.

    python -m tests.crash FOLDER --kills 40                  # processes of `python -m scripts.train`
    python -m tests.crash FOLDER --kills 10 --processes 2    # of torchrun; a kill hits one of its two ranks
    python -m tests.crash FOLDER --kills 5 --fork --small    # forks of this process, which has imported everything
    python -m tests.crash FOLDER --kills 10 --family Qwen2                    # transformers' class, tied weights
    python -m tests.crash FOLDER --processes 2 --distributed_strategy=fsdp    # any other flag is one of the run

Half of the kills come at any time of a process's life, from its start on; the others come within a save or just after
it, which the folder that is being written gives away. A run that has survived a few kills ends undisturbed; then
weights, optimizer, metrics, injections, probes, losses, instances and the checkpoints that are there must be those of
the unbroken run, bit for bit. The last line of the output is JSON: what was killed where, and what differed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import pyarrow.parquet
import torch

from olmo.checkpoint import sharded
from olmo.checkpoint.saves import is_sharded
from olmo.distributed import exit_process
from olmo.exceptions import exit_status
from olmo.files.tensors import read_tensors, read_training_state
from scripts.train import main as train_command
from tests.running import ROOT, checkpoints, indices, metrics, write_family, write_world

MODEL = ("d_model=64", "mlp_hidden_size=2048", "embedding_size=4096", "residual_dropout=0.1", "init_device=meta")
SETTINGS = (
    *("--max_duration=12", "--eval_interval=5", "--eval_on_load", "--no_pre_train_checkpoint=false"),
    *("--save_interval=4", "--save_interval_ephemeral=2", "--save_num_checkpoints_to_keep=2"),
    *("--save_interval_unsharded=6", "--try_load_latest_save"),
)
PATIENCE = 60.0  # seconds in which every process of a run must be gone after one was killed


class Attempt:
    """One start of the command, which lives until it is done or killed."""

    def __init__(self, config: Path, folder: Path, processes: int, fork: bool, small: bool, settings: Sequence[str]):
        self.processes, self.fork, self.folder = processes, fork, folder
        arguments = [str(config), f"--save_folder={folder}", *SETTINGS]
        if small:
            arguments.append("--max_duration=7")
        elif config.name == "config.yaml":
            arguments += [f"--model.{setting}" for setting in MODEL]
        arguments += settings
        self.log = folder.with_suffix(".log")
        if fork:
            self.pid = os.fork()
            if self.pid == 0:
                log = os.open(self.log, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
                os.dup2(log, 1)
                os.dup2(log, 2)
                exit_process(exit_status(train_command, arguments))
            return
        launcher = [sys.executable, "-m"]
        if processes > 1:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            launcher += ["torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={port}", "-m"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        with self.log.open("a") as log:
            command = [*launcher, "scripts.train", *arguments]
            self.process = subprocess.Popen(command, cwd=config.parent, env=environment, stdout=log, stderr=log)
        self.pid = self.process.pid

    def ranks(self) -> list[int]:
        """The processes that train."""
        if self.processes == 1:
            return [self.pid]
        try:
            return list(map(int, Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()))
        except OSError:
            return []

    def ended(self, wait: bool = False) -> int | None:
        """The exit status (minus the signal), None while it lives."""
        if not self.fork:
            return self.process.wait() if wait else self.process.poll()
        pid, status = os.waitpid(self.pid, 0 if wait else os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if pid else None

    def kill(self, chance: random.Random) -> float:
        """Kill one of the processes that train; the seconds until all are gone."""
        started, ranks = time.monotonic(), self.ranks()
        for victim in chance.sample(ranks, 1) if ranks else [self.pid]:
            os.kill(victim, signal.SIGKILL)
        self.ended(wait=True)
        while any(Path(f"/proc/{rank}").exists() for rank in ranks):
            time.sleep(0.01)
        return time.monotonic() - started


def place(folder: Path) -> str:
    """Where a killed run was, by what it left."""
    if list(folder.glob(".step*.partial")):
        return "while saving"
    if list(folder.glob(".step*.removed")):
        return "while removing a checkpoint"
    if not (folder / "metrics.jsonl").is_file():
        return "before the first metrics"
    return "elsewhere" if list(folder.glob("step*")) else "before the first checkpoint"


def differences(mine: Path, whole: Path) -> list[str]:
    """What of a run is not as in the other; nothing where all is the same, bit for bit."""
    differs = [what.__name__ for what in (metrics, indices, checkpoints) if what(mine) != what(whole)]
    if (mine / "injections.jsonl").read_bytes() != (whole / "injections.jsonl").read_bytes():
        differs.append("injections")
    for name in ("probes", "losses"):
        tables = [{p.name: pyarrow.parquet.read_table(p) for p in (run / name).iterdir()} for run in (mine, whole)]
        if tables[0].keys() != tables[1].keys() or not all(t.equals(tables[1][n]) for n, t in tables[0].items()):
            differs.append(name)
    for link in ("latest", "latest-unsharded"):
        if os.readlink(mine / link) != os.readlink(whole / link):
            differs.append(link)
    for folder in sorted(checkpoints(whole) & checkpoints(mine)):
        if not same(weights(mine / folder), weights(whole / folder)):
            differs.append(f"weights of {folder}")
        if not same(moments(mine / folder), moments(whole / folder)):
            differs.append(f"optim of {folder}")
        if not same(read_training_state(mine / folder, "train"), read_training_state(whole / folder, "train")):
            differs.append(f"train of {folder}")
    return differs


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint under the names that they have in it."""
    if is_sharded(folder):
        return sharded.Reader(folder).read(sharded.WEIGHTS)
    return read_tensors(folder / "model.safetensors")


def moments(folder: Path) -> dict[str, Any]:
    """What the optimizer kept."""
    if is_sharded(folder):
        return sharded.Reader(folder).read(sharded.MOMENTS)
    return read_training_state(folder, "optim")


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.equal(other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def crash(folder: Path, kills: int, each: int, seed: int, family: str | None, *how: Any) -> dict[str, Any]:
    """Kill `kills` times, at most `each` times a run, which starts as `how` says (`Attempt`); the report."""
    chance = random.Random(seed)
    config = write_world(folder / "world") / "config.yaml"
    if family is not None:
        config = write_family(config.parent, family, tie_word_embeddings=True)
    started = time.monotonic()
    whole = folder / "unbroken"
    status = Attempt(config, whole, *how).ended(wait=True)
    assert status == 0, whole.with_suffix(".log").read_text()[-3000:]
    length = time.monotonic() - started
    places: Counter[str] = Counter()
    report: dict[str, Any] = {"kills": 0, "runs": 0, "differences": [], "slowest_end_of_all_ranks": 0.0}
    while report["kills"] < kills:
        report["runs"] += 1
        run, left = folder / f"run{report['runs']}", min(each, kills - report["kills"])
        while True:
            attempt = Attempt(config, run, *how)
            born, aimed = time.monotonic(), chance.random() < 0.5
            at, saves = born + chance.uniform(0, length), chance.randrange(3)
            after, saving = chance.uniform(0, 0.15), False
            while left and (status := attempt.ended()) is None:
                if aimed:  # wait for some saves to begin, then a little
                    now = bool(list(run.glob(".step*.partial")))
                    saves -= now and not saving
                    saving = now
                    if saves < 0:
                        time.sleep(after)
                        break
                elif time.monotonic() >= at:
                    break
                time.sleep(0.001)
            if not left:
                status = attempt.ended(wait=True)
            if status is not None:
                break
            seconds = attempt.kill(chance)
            assert seconds < PATIENCE, f"{seconds} seconds until all processes were gone"
            report["slowest_end_of_all_ranks"] = max(report["slowest_end_of_all_ranks"], round(seconds, 1))
            report["kills"] += 1
            left -= 1
            places[place(run)] += 1
            print(f"kill {report['kills']}, run {report['runs']}: {place(run)}", flush=True)
        differs = [f"exit status {status}"] if status else differences(run, whole)
        print(f"run {report['runs']}: {differs or 'the same, bit for bit'}", flush=True)
        report["differences"] += [f"run {report['runs']}: {what}" for what in differs]
    return {**report, "places": dict(places)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of all runs; anew each time")
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--each", type=int, default=8, help="most kills of one run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--family", help="a model of tests/architectures.py instead of ours")
    parser.add_argument("--fork", action="store_true")
    parser.add_argument("--small", action="store_true", help="a model of 21,504 parameters instead of 688,128")
    options, settings = parser.parse_known_args()
    shutil.rmtree(options.folder, ignore_errors=True)
    options.folder.mkdir(parents=True)
    if options.fork:
        for name in ("torch._dynamo", "pandas"):  # every fork would anew
            import_module(name)
    folder = options.folder.resolve()
    how = (options.processes, options.fork, options.small, settings)
    report = crash(folder, options.kills, options.each, options.seed, options.family, *how)
    print(json.dumps(report))
    sys.exit(bool(report["differences"]))


if __name__ == "__main__":
    main()
