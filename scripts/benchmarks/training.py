"""Our Trainer and four other ways to train the same model, run in turn on this machine's processor: time and memory.

    python -m scripts.benchmarks.training [--rounds 10] [--steps 1] [--precision amp_bf16] [--compiled]

Each trains OLMo-1B's architecture, made small, from the same weights on the same rows with AdamW and clipping; in a
process of its own, which waits while the others train (contestants.py). The losses of the first steps
are compared. litgpt's norms have weights and biases that OLMo's have not: they stay at 1 and 0.

The first is a plain torch loop over transformers' model, and what the ratios compare with. Processor time is a
process's own, of all threads; it counts less of what else the machine does, and nothing of waiting. Peak memory is the
most that a process held, and the same without what it held after its imports.
Other programs run as their users run them; ours keeps freed blocks of memory (`disable_malloc_trim`), as training does,
and on a processor in float32 that is most of what it gains. MALLOC_MMAP_THRESHOLD_=2147483647 and
MALLOC_TRIM_THRESHOLD_=2147483647 in the environment let all do so; it costs the others a quarter to half more memory.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from olmo.config import load, save_model_config
from olmo.exceptions import ConfigurationError, Parser, exit_status
from olmo.files.tensors import write_tensors
from olmo.model import OLMo
from scripts.convert import convert

CONFIG = "configs/official/OLMo-1B.yaml"
SHAPE = {"d_model": 384, "n_heads": 6, "n_layers": 4, "max_sequence_length": 512}
ROWS = 4  # a step
STEPS = 64  # whose rows are different
ADAMW = {"lr": 4e-4, "betas": (0.9, 0.95), "eps": 1e-5, "weight_decay": 0.0}
COMPARED, AGREEMENT = 3, 1e-4  # losses

WHAT = {
    "torch": "a plain torch loop over transformers' OLMo",
    "transformers": "transformers' Trainer",
    "ai2-olmo": "a plain loop over ai2-olmo's model and optimizer",
    "litgpt": "a plain torch loop over litgpt's model",
    "ours": "ours",
    "compiled": "ours, with `compile: {}`",
}
OURS = ("ours", "compiled")
# Folder of the environment of what is no dependency of this project; the Makefile makes it.
ENVIRONMENTS = {"transformers": ".venv-peers", "litgpt": ".venv-peers", "ai2-olmo": ".venv-golden"}


class Contestant:
    """A process that trains when it is told to; `answers` holds what it told each time."""

    def __init__(self, name: str, folder: Path, threads: int):
        self.name, self.log = name, folder / f"{name}.log"
        self.answers: list[dict[str, Any]] = []
        command = [sys.executable, "-m", "scripts.benchmarks.contestants"]
        if name not in OURS:
            interpreter = f"{ENVIRONMENTS[name]}/bin/python" if name in ENVIRONMENTS else sys.executable
            command = [interpreter, "-I", str(Path(__file__).with_name("contestants.py"))]
        with self.log.open("w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                [*command, name, str(folder)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"},
            )
        self._listen()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{WHAT[self.name]}: ended by itself:\n{self.log.read_text('utf-8')[-2000:]}")
        self.answers.append(json.loads(line))

    def train(self, steps: int) -> None:
        assert self.process.stdin is not None
        print(steps, file=self.process.stdin, flush=True)
        self._listen()

    def __enter__(self) -> Contestant:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


def prepare(folder: Path, precision: str) -> int:
    """Write what the contestants read; returns the number of the model's weights."""
    arguments = {
        **{f"model.{key}": value for key, value in SHAPE.items()},
        "model.init_device": "cpu",
        "evaluators": "[]",
        "eval_interval": 10**6,
        "wandb": "null",
        "data.paths": f"[{folder / 'tokens'}]",
        "data_shuffling": "false",
        "precision": precision,
        "load_path": folder / "olmo",
        "reset_optimizer_state": "true",
        "reset_trainer_state": "true",
        "save_folder": folder / "ours",
        "save_interval": "null",
        "save_interval_unsharded": "null",
        "max_duration": 10**6,
        "global_train_batch_size": ROWS,
        "device_train_microbatch_size": ROWS,
        "optimizer.learning_rate": ADAMW["lr"],
        "optimizer.eps": ADAMW["eps"],
        "optimizer.weight_decay": ADAMW["weight_decay"],
        "scheduler.name": "constant",
        "distributed_strategy": "ddp",
    }
    overrides = [f"--{key}={value}" for key, value in arguments.items()]
    config = load(CONFIG, overrides).model
    torch.manual_seed(0)
    state = OLMo(config).state_dict()
    (folder / "olmo").mkdir()
    save_model_config(folder / "olmo" / "config.yaml", config)
    write_tensors(folder / "olmo" / "model.safetensors", state)
    torch.save(state, folder / "weights.pt")
    convert(folder / "olmo", folder / "hf", "hf", None, None)
    # Few tokens often, most seldom, as in text; not 1: to transformers it is padding, which has no gradient.
    drawn = np.random.default_rng(0).zipf(1.2, STEPS * ROWS * config.max_sequence_length)
    (2 + drawn % (config.vocab_size - 2)).astype("<u2").tofile(folder / "tokens")
    settings = {
        "length": config.max_sequence_length,
        "rows": ROWS,
        "half": precision == "amp_bf16",
        "adamw": ADAMW,
        "config": CONFIG,
        "overrides": overrides,
        "litgpt": {
            "block_size": config.max_sequence_length,
            "n_layer": config.n_layers,
            "n_embd": config.d_model,
            "n_head": config.n_heads,
            "n_query_groups": config.n_heads,
            "head_size": config.d_model // config.n_heads,
            "intermediate_size": config.inner_size,
        },
    }
    (folder / "settings.json").write_text(json.dumps(settings))
    return sum(tensor.numel() for tensor in state.values())


def first_losses(contestant: Contestant, folder: Path) -> list[float]:
    """Mean losses of the next token of the first steps."""
    if contestant.name not in OURS:
        return contestant.answers[-1]["losses"][:COMPARED]
    lines = (folder / contestant.name / "metrics.jsonl").read_text("utf-8").splitlines()[:COMPARED]
    length = SHAPE["max_sequence_length"]  # by which ours divides, as OLMo does, though the first predicts nothing
    return [json.loads(line)["train/CrossEntropyLoss"] * length / (length - 1) for line in lines]


def bench_training(rounds: int, steps: int = 1, precision: str = "fp32", compiled: bool = False) -> None:
    """Tokens a second, processor time and peak memory of all whose environments are there."""
    names = [name for name in WHAT if compiled or name != "compiled"]
    for environment in sorted(set(ENVIRONMENTS.values())):
        if not Path(environment, "bin", "python").exists():
            left_out = [name for name in names if ENVIRONMENTS.get(name) == environment]
            names = [name for name in names if name not in left_out]
            print(f"training: without {' and '.join(map(WHAT.__getitem__, left_out))}; make {environment}/.ready")
    threads, tokens = torch.get_num_threads(), steps * ROWS * SHAPE["max_sequence_length"]
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        weights = prepare(folder, precision)
        contestants = [stack.enter_context(Contestant(name, folder, threads)) for name in names]
        for contestant in contestants:
            contestant.train(2)  # warm up
        for number in range(rounds):
            for contestant in contestants[:: 1 if number % 2 else -1]:
                contestant.train(steps)
        losses = np.array([first_losses(contestant, folder) for contestant in contestants])
    differ = np.ptp(losses, 0)
    print(
        f"training, OLMo-1B with {SHAPE['n_layers']} layers of width {SHAPE['d_model']} ({weights / 1e6:.0f} M), "
        f"{precision}, {tokens // steps} tokens a step, {threads} threads, {rounds} rounds of {steps}; rates as ratios "
        f"to the first; losses of {COMPARED} steps agree to {differ.max():.1e}",
        flush=True,
    )
    if differ[0] > (AGREEMENT if precision == "fp32" else 1e-2):
        raise RuntimeError(f"first losses differ: {dict(zip(names, losses[:, 0].tolist()))}")

    def measured(what: str) -> dict[str, NDArray[np.float64]]:
        return {c.name: np.array([answer[what] for answer in c.answers[-rounds:]]) for c in contestants}

    seconds, processor, held, peaks = map(measured, ("seconds", "processor", "imported", "peak"))
    beyond = {name: (peaks[name][-1] - held[name][-1]) / 2**20 for name in names}
    for name in names:
        print(
            f"  {WHAT[name]}: {_spread(seconds['torch'] / seconds[name])} ({tokens / np.median(seconds[name]):,.0f} "
            f"tokens/s), by processor time {_spread(processor['torch'] / processor[name])}; peak memory "
            f"{peaks[name][-1] / 2**20:,.0f} MiB, {beyond[name]:,.0f} beyond its imports"
        )
    others = [name for name in names if name not in OURS]
    fastest, thriftiest = (min(others, key=lambda name: np.median(of[name])) for of in (seconds, processor))
    least = min(peaks[name][-1] for name in others)
    print(
        f"  ours / the fastest of the others: {_spread(seconds[fastest] / seconds['ours'])} ({WHAT[fastest]}), by "
        f"processor time {_spread(processor[thriftiest] / processor['ours'])} ({WHAT[thriftiest]}); memory / the least "
        f"of theirs: {peaks['ours'][-1] / least:.2f} x, beyond imports "
        f"{beyond['ours'] / min(beyond[name] for name in others):.2f} x",
        flush=True,
    )


def _spread(ratios: NDArray[np.float64]) -> str:
    return f"{np.median(ratios):.2f} x ({ratios.min():.2f} to {ratios.max():.2f})"


def main(argv: Sequence[str]) -> None:
    parser = Parser(prog="python -m scripts.benchmarks.training", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=10, help="how often each one's turn comes")
    parser.add_argument("--steps", type=int, default=1, help="steps in one turn")
    parser.add_argument("--precision", choices=("fp32", "amp_bf16"), default="fp32")
    parser.add_argument("--compiled", action="store_true", help="also ours with compiled layers; needs a C++ compiler")
    args = parser.parse_args(argv)
    if args.rounds < 1 or args.steps < 1:
        raise ConfigurationError("--rounds and --steps must be at least 1")
    bench_training(args.rounds, args.steps, args.precision, args.compiled)


if __name__ == "__main__":
    sys.exit(exit_status(main))
