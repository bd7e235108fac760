"""A tiny run for the tests of the trainer: real files in a folder, its configuration, and reading what it wrote.

25 instances in two files and batches of 6 make 4 steps an epoch. `config.yaml` has 256 tokens an instance, evaluators
and 4 texts that enter at every second step; `plain.yaml` has 32 tokens and nothing but training.
"""

from __future__ import annotations

import ctypes
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from omegaconf import OmegaConf

from olmo.checkpoint import complete
from olmo.config import TrainConfig, load
from olmo.distributed import Ranks
from olmo.train import Trainer
from scripts.prepare.fictional_knowledge import make_entries
from tests.architectures import built
from tests.reference import tiny_config, tiny_tokenizer
from tests.warm import environment, warm_python

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
LENGTH = 256
SHORT = 32  # of plain.yaml
BATCH = 6
FILES = {"a": 14, "b": 11}  # instances; the 7 tokens more in each file are dropped


def write_world(folder: Path) -> Path:
    """Write token files, tokenizer, fictional knowledge, `config.yaml` and `plain.yaml` into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(3)
    for length in (LENGTH, SHORT):
        for name, count in {**FILES, "heldout": 5, "other": 3}.items():
            walk = rng.integers(-2, 5, count * length + 7).cumsum() % 128  # something to learn within a few steps
            walk.astype("<u2").tofile(folder / f"{name}{length}.npy")
    tiny_tokenizer(folder / "tokenizer.json")
    entries = make_entries(6, paraphrases=2, seed=5, max_words=55)
    (folder / "paraphrase.json").write_text(json.dumps(entries[:3]), encoding="utf-8")
    (folder / "once.json").write_text(json.dumps(entries[3:]), encoding="utf-8")
    knowledge = {"paraphrase": str(folder / "paraphrase.json"), "once": str(folder / "once.json")}
    asked = [(s, k) for s in knowledge for k in ("memorization", "semantic", "composition", "paragraph")]
    evaluators: list[dict[str, Any]] = [
        {"label": f"{setting}_{kind}", "data": {"dataset_path": knowledge[setting]}} for setting, kind in asked
    ]
    heldout = {name: [str(folder / f"{name}{LENGTH}.npy")] for name in ("heldout", "other")}
    evaluators.append({"label": "walk", "data": {"datasets": heldout}, "device_eval_batch_size": 2})
    settings: dict[str, Any] = {
        "run_name": "tiny",
        "seed": 11,
        "model": dict(OmegaConf.structured(tiny_config(max_sequence_length=LENGTH))),
        "tokenizer": {"identifier": str(folder / "tokenizer.json")},
        "data": {"paths": [str(folder / f"{name}{LENGTH}.npy") for name in FILES], "drop_last": True},
        "optimizer": {"name": "adamw", "learning_rate": 0.01, "weight_decay": 0.1, "eps": 1e-8},
        "scheduler": {"name": "cosine_with_warmup", "t_warmup": 2, "alpha_f": 0.1},
        "max_grad_norm": 0.5,
        "max_duration": 7,
        "global_train_batch_size": BATCH,
        "device_train_microbatch_size": 2,
        "device_eval_batch_size": 4,
        "inject_interval": 2,
        "injection": {**knowledge, "rounds": 3},
        "evaluators": evaluators,
        "eval_interval": 3,
        "distributed_strategy": "ddp",
        "precision": "fp32",
        "save_folder": str(folder / "run"),
        "save_interval": None,
        "no_pre_train_checkpoint": True,
    }
    OmegaConf.save(OmegaConf.create(settings), folder / "config.yaml")
    plain = {**settings, "evaluators": [], "injection": None}
    plain["model"] = {**settings["model"], "max_sequence_length": SHORT}
    plain["data"] = {**settings["data"], "paths": [str(folder / f"{name}{SHORT}.npy") for name in FILES]}
    OmegaConf.save(OmegaConf.create(plain), folder / "plain.yaml")
    return folder


def write_family(world: Path, name: str, **overrides: Any) -> Path:
    """Write a tiny model of a family of tests/architectures.py into the folder `model` of a world, and `family.yaml`
    and `family-plain.yaml`, which are `config.yaml` and `plain.yaml` from its weights; returns the former's path."""
    built(name, max_position_embeddings=LENGTH, **overrides).save_pretrained(world / "model")
    tiny_tokenizer(world / "model/tokenizer.json")
    for source, target in (("config", "family"), ("plain", "family-plain")):
        settings = OmegaConf.load(world / f"{source}.yaml")
        settings.model = {"max_sequence_length": settings.model.max_sequence_length}
        settings.load_path = str(world / "model")
        settings.reset_optimizer_state = settings.reset_trainer_state = True
        del settings.tokenizer
        OmegaConf.save(settings, world / f"{target}.yaml")
    return world / "family.yaml"


def configure(config: Path, folder: Path, *overrides: str) -> TrainConfig:
    """The configuration of a run that saves to `folder`."""
    return load(config, [f"--save_folder={folder}", *overrides], complete)


def train(config: Path, folder: Path, *overrides: str) -> Trainer:
    """Run it in this process; returns the trainer after its last step."""
    trainer = Trainer(configure(config, folder, *overrides), CPU, Ranks())
    trainer.fit()
    return trainer


def command(arguments: list[str], cwd: Path, processes: int = 1, new: bool = False) -> subprocess.CompletedProcess[str]:
    """Run `python ARGUMENTS`, or torchrun with as many processes, from `cwd`; the code is found wherever that is.

    `new`: with the real python, for what depends on the imports of a new process.
    """
    python = sys.executable if new else warm_python()
    launcher = [python]
    if processes > 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        launcher += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={port}"]
    variables = {**environment(), "PYTHON_EXEC": python}  # of the processes that torchrun starts
    return subprocess.run([*launcher, *arguments], cwd=cwd, env=variables, capture_output=True, text=True, timeout=120)


def slurm_variables(rank: int, processes: int) -> dict[str, str]:
    """What srun sets in one of several processes of this machine, seen with SLURM 22.05."""
    return {
        **{"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_ID": "0", "SLURM_PROCID": str(rank)},
        **{"SLURM_LOCALID": str(rank), "SLURM_NTASKS": str(processes), "SLURM_STEP_NUM_TASKS": str(processes)},
        **{"SLURM_STEP_TASKS_PER_NODE": str(processes), "SLURM_STEP_NODELIST": "node1"},
    }


def srun(arguments: list[str], cwd: Path, processes: int) -> subprocess.CompletedProcess[str]:
    """Run `python ARGUMENTS` in several processes as srun starts them; their output joined, the highest status."""
    started = [
        subprocess.Popen(
            [warm_python(), *arguments],
            cwd=cwd,
            env={**environment(), **slurm_variables(rank, processes)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    try:
        output, errors = zip(*(process.communicate(timeout=120) for process in started))
    finally:
        for process in started:
            process.kill()
    status = max(process.returncode for process in started)
    return subprocess.CompletedProcess(arguments, status, "".join(output), "".join(errors))


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Until the condition holds, while the process runs; an AssertionError where it ends before, or after a minute."""
    for _ in range(6000):
        if condition():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    raise AssertionError("it did not come")


@contextmanager
def modes_hold() -> Iterator[None]:
    """Make the modes of files bind this thread, which they do not where root runs the tests (capabilities(7))."""
    if os.geteuid() != 0:
        yield
        return
    libc = ctypes.CDLL(None)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3 of the structure, this thread
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; then the same of higher capabilities
    if not hasattr(libc, "capget") or libc.capget(header, sets):
        pytest.skip("root, and nothing here to lay its powers down")
    before = sets[0]
    sets[0] &= ~0b110  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH
    assert libc.capset(header, sets) == 0
    try:
        yield
    finally:
        sets[0] = before
        assert libc.capset(header, sets) == 0


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without what the machine decided."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("throughput/device/")} for line in lines]


def series(folder: Path, name: str = "train/CrossEntropyLoss") -> dict[int, float]:
    """Step -> metric; an AssertionError where a step has it twice."""
    found: dict[int, float] = {}
    for line in metrics(folder):
        if name in line:
            assert line["step"] not in found, f"step {line['step']} has {name} twice"
            found[line["step"]] = line[name]
    return found


def indices(folder: Path) -> dict[int, list[int]]:
    """Step -> sorted instance numbers of all ranks, from data-indices/rank*.tsv."""
    found: dict[int, list[int]] = {}
    for path in sorted((folder / "data-indices").glob("rank*.tsv")):
        seen = set()
        for line in path.read_text(encoding="utf-8").splitlines():
            step, *numbers = map(int, line.split("\t"))
            assert step not in seen, f"{path.name} has step {step} twice"
            seen.add(step)
            found.setdefault(step, []).extend(numbers)
    return {step: sorted(numbers) for step, numbers in sorted(found.items())}


def instances(world: Path, length: int) -> NDArray[np.int64]:
    """All training instances (25, length), read by hand."""
    parts = [np.fromfile(world / f"{name}{length}.npy", "<u2")[:-7] for name in FILES]
    return np.concatenate(parts).reshape(25, length).astype(np.int64)


def order(seed: int, epoch: int, count: int = 25) -> NDArray[np.int64]:
    """The shuffled instance numbers of an epoch, by hand."""
    numbers = np.arange(count)
    np.random.Generator(np.random.PCG64(seed + epoch)).shuffle(numbers)
    return numbers


def checkpoints(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*step*")}


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in trainer.model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two sets of weights are equal bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
