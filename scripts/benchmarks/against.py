"""The same work by this checkout and by another one: time, peak memory, and whether the numbers agree.

    python -m scripts.bench --against DIR

Both run in turn with this interpreter, on the same inputs, through commands whose flags and files are stable:

entropy: `analysis.entropy` on a random checkpoint; H of each layer.
training: `scripts.train`; the loss of each step. Its time is the mean of its steps; other times include the start of
the program.
loader: `scripts.extract_data`; a checksum of the tokens.
probes: `scripts.train` with `eval_on_load` that stops before the first step; the probes' metrics.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf

from olmo.config import load, save_model_config
from olmo.exceptions import ConfigurationError
from olmo.files.tensors import write_olmo_safetensors
from olmo.knowledge.entries import KINDS
from olmo.model import OLMo
from scripts.benchmarks.rounds import alternate, spread
from scripts.prepare import OLMO_TOKENIZER
from scripts.prepare.fictional_knowledge import make_entries, write_entries

HERE = Path(__file__).resolve().parents[2]
LENGTH = 512
SHAPE: dict[str, Any] = {"d_model": 384, "n_heads": 6, "n_layers": 4, "mlp_hidden_size": 4096}
STEPS, ROWS = 8, 4  # of training
INSTANCES = 32  # of entropy
BATCHES, BATCH = 1000, 128  # of the loader
TOKENS = 2**25  # in the file that all of them read
ENTRIES = 40  # of the probes, 15 each

# Runs a command from a process so small that the peak that the kernel reports is the command's own.
MEASURE = """import resource, subprocess, sys, time
started = time.perf_counter()
status = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode
print(time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(status)"""


@dataclass(frozen=True)
class Outcome:
    """What one command took, and the numbers that it found."""

    seconds: float
    peak: float  # MiB
    numbers: dict[str, float]


def _entropies(output: Path) -> dict[str, float]:
    (path,) = output.rglob("knowledge_entropy.json")
    found = json.loads(path.read_text("utf-8"))
    return {"model": found["knowledge_entropy"], **{f"layer {n}": value for n, value in enumerate(found["layers"])}}


def _metrics(prefix: str, output: Path) -> dict[str, float]:
    """The values of all metrics with this prefix, by step and name."""
    lines = map(json.loads, (output / "metrics.jsonl").read_text("utf-8").splitlines())
    return {
        f"{line['step']} {name}": value for line in lines for name, value in line.items() if name.startswith(prefix)
    }


def _checksum(output: Path) -> dict[str, float]:
    return {"checksum": float(zlib.crc32((output / "tokens").read_bytes()))}


# Name -> the command, with {folder} of the inputs and {output} for it, and how to read the numbers.
WORKS: dict[str, tuple[str, Callable[[Path], dict[str, float]]]] = {
    "entropy": (
        "analysis.entropy --checkpoint {folder}/checkpoint --data {folder}/tokens.npy --data_size {instances} "
        "--batch_size 4 --sequence_length {length} --output {output}",
        _entropies,
    ),
    "training": (
        "scripts.train {folder}/config.yaml --save_folder={output} --max_duration={steps}",
        partial(_metrics, "train/CrossEntropyLoss"),
    ),
    "loader": (
        "scripts.extract_data {folder}/config.yaml --steps 1-{batches} --output {output}/tokens "
        "--global_train_batch_size={batch} --max_duration={batches}",
        _checksum,
    ),
    "probes": (
        "scripts.train {folder}/probes.yaml --save_folder={output} --eval_on_load=true --stop_at=0",
        partial(_metrics, "eval/"),
    ),
}


def write_inputs(folder: Path) -> None:
    """Write tokens, a checkpoint, fictional knowledge, and the configurations `config.yaml` and `probes.yaml`."""
    model = replace(
        load(HERE / "configs/official/OLMo-1B.yaml").model, init_device="cpu", max_sequence_length=LENGTH, **SHAPE
    )
    torch.manual_seed(0)
    (folder / "checkpoint").mkdir()
    save_model_config(folder / "checkpoint/config.yaml", model)
    write_olmo_safetensors(folder / "checkpoint/model.safetensors", OLMo(model).state_dict())
    drawn = np.random.default_rng(0).zipf(1.2, TOKENS)  # frequencies as in text
    (2 + drawn % (model.vocab_size - 2)).astype("<u2").tofile(folder / "tokens.npy")
    write_entries({folder / "entries.json": make_entries(ENTRIES, paraphrases=0)})
    config = {
        "model": OmegaConf.load(folder / "checkpoint/config.yaml").model,
        "tokenizer": {"identifier": OLMO_TOKENIZER},
        "data": {"paths": [str(folder / "tokens.npy")], "drop_last": True},
        "optimizer": {"name": "adamw", "learning_rate": 4e-4, "weight_decay": 0.1},
        "scheduler": {"name": "constant"},
        **{"load_path": str(folder / "checkpoint"), "reset_optimizer_state": True, "reset_trainer_state": True},
        **{"max_duration": STEPS, "precision": "fp32", "distributed_strategy": "ddp", "save_interval": None},
        **{"global_train_batch_size": ROWS, "device_train_microbatch_size": ROWS, "device_eval_batch_size": 16},
    }
    OmegaConf.save(OmegaConf.create(config), folder / "config.yaml")
    evaluators = [{"label": f"once_{kind}", "data": {"dataset_path": str(folder / "entries.json")}} for kind in KINDS]
    OmegaConf.save(OmegaConf.create({**config, "evaluators": evaluators}), folder / "probes.yaml")


def run(name: str, checkout: Path, folder: Path) -> Outcome:
    """Run one of WORKS in a checkout. Raises RuntimeError, with the end of its stderr, where it fails."""
    command, numbers = WORKS[name]
    with tempfile.TemporaryDirectory(dir=folder) as output:
        sizes = {"instances": INSTANCES, "length": LENGTH, "steps": STEPS}
        arguments = command.format(folder=folder, output=output, batches=BATCHES, batch=BATCH, **sizes).split()
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, sys.executable, "-m", *arguments],
            cwd=checkout,
            env={**os.environ, "PYTHONPATH": str(checkout), "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(f"{checkout}: {' '.join(arguments)}: {done.stderr.strip()[-1000:]}")
        seconds, peak = map(float, done.stdout.split())
        if name == "training":
            rates = _metrics("throughput/device/tokens_per_second", Path(output))  # means over the steps so far
            seconds = ROWS * LENGTH / list(rates.values())[-1]
        return Outcome(seconds, peak / 1024, numbers(Path(output)))


def _agreement(ours: dict[str, float], theirs: dict[str, float]) -> str:
    """How far the numbers that both found are apart, and how many only one of them has."""
    both = ours.keys() & theirs.keys()
    apart = max((abs(ours[name] - theirs[name]) / max(abs(theirs[name]), 1e-30) for name in both), default=math.nan)
    found = f"{len(both)} numbers " + (f"differ by {apart:.1e} at most" if apart else "equal")
    if alone := [
        f"{len(own) - len(both)} only {place}"
        for own, place in ((ours, "here"), (theirs, "there"))
        if own.keys() - both
    ]:
        found = f"{found if both else 'no number in both'} ({', '.join(alone)})"
    return found


def compare(other: Path, names: Sequence[str], rounds: int) -> None:
    """Print a line for each work: this checkout / the other one."""
    other = other.resolve()
    if not (other / "scripts" / "train.py").is_file():
        raise ConfigurationError(f"--against {other}: not a checkout of this project")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_inputs(folder)
        for name in names:
            works = {place: partial(run, name, path, folder) for place, path in (("here", HERE), ("there", other))}
            here, there = alternate(rounds, works).values()
            seconds = np.array([[outcome.seconds for outcome in outcomes] for outcomes in (here, there)])
            peaks = [statistics.median(outcome.peak for outcome in outcomes) for outcomes in (here, there)]
            agreement = _agreement(here[0].numbers, there[0].numbers)
            print(
                f"{name}, here / {other}: time {spread(seconds[0] / seconds[1])} over {rounds} rounds "
                f"({np.median(seconds[0]):.2f} s, {np.median(seconds[1]):.2f} s), peak memory "
                f"{peaks[0] / peaks[1]:.2f} x ({peaks[0]:,.0f} MiB, {peaks[1]:,.0f} MiB); {agreement}",
                flush=True,
            )
