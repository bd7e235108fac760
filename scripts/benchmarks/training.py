"""Our Trainer and other ways to train the same model, run in turn on this machine's processor: time and memory.

Each trains from the same weights on the same rows with AdamW and clipping, in a process of its own, which waits while
the others train (contestants.py). The losses of the first steps are compared. Two models: OLMo-1B's architecture, made
small, and transformers' Llama in the shape of SmolLM2-135M with fewer layers, in float32 and with autocast to bfloat16;
ai2-olmo cannot train the latter.

Ratios are to a plain torch loop over transformers' model. Processor time is that of all threads of a process; it
depends less on the machine's other work and omits waiting. Peak memory is given with and without a process's imports.
Other programs run as their users run them; ours keeps freed blocks of memory (`disable_malloc_trim`), as training does,
which on a processor in float32 is most of its gain. MALLOC_MMAP_THRESHOLD_=2147483647 and
MALLOC_TRIM_THRESHOLD_=2147483647 in the environment let all do so; the others then take a quarter to half more memory.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from olmo.config import load
from olmo.model import OLMo
from scripts.benchmarks.checkpoints import write_checkpoints
from scripts.benchmarks.rounds import alternate, spread

CONFIG = "configs/official/OLMo-1B.yaml"
SHAPE = {"d_model": 384, "n_heads": 6, "n_layers": 4, "max_sequence_length": 512}
ROWS = 4  # per step
SMOLLM2: dict[str, Any] = {
    **{"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 8},  # of 30
    **{"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True, "rms_norm_eps": 1e-5},
    **{"rope_theta": 1e5, "max_position_embeddings": 8192, "bos_token_id": 0, "eos_token_id": 0},
}
FAMILY_LENGTH, FAMILY_ROWS = 256, 8
STEPS = 64  # of different rows
ADAMW = {"lr": 4e-4, "betas": (0.9, 0.95), "eps": 1e-5, "weight_decay": 0.0}
COMPARED, AGREEMENT, HALF_AGREEMENT = 3, 1e-4, 1e-2  # losses

WHAT = {
    "torch": "a plain torch loop over transformers' model",
    "transformers": "transformers' Trainer",
    "ai2-olmo": "a plain loop over ai2-olmo's model and optimizer",
    "ours": "ours",
}
# Environments of programs that are no dependencies of this project; the Makefile makes them.
ENVIRONMENTS = {"transformers": ".venv-peers", "ai2-olmo": ".venv-golden"}


class Contestant:
    """A process that trains on request; `answers` holds its answers."""

    def __init__(self, name: str, folder: Path, threads: int):
        self.name, self.log = name, folder / f"{name}.log"
        self.answers: list[dict[str, Any]] = []
        command = [sys.executable, "-m", "scripts.benchmarks.contestants"]
        if name != "ours":
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
            raise RuntimeError(f"{WHAT[self.name]}: ended unexpectedly:\n{self.log.read_text('utf-8')[-2000:]}")
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


def arguments(folder: Path, rows: int, **more: Any) -> list[str]:
    """Command-line settings of a run that does nothing but train, beside `more`."""
    settings = {
        "data.paths": f"[{folder / 'tokens'}]",
        "data_shuffling": "false",
        "reset_optimizer_state": "true",
        "reset_trainer_state": "true",
        "save_folder": folder / "ours",
        "save_interval": "null",
        "save_interval_unsharded": "null",
        "max_duration": 10**6,
        "global_train_batch_size": rows,
        "device_train_microbatch_size": rows,
        "optimizer.learning_rate": ADAMW["lr"],
        "optimizer.eps": ADAMW["eps"],
        "optimizer.weight_decay": ADAMW["weight_decay"],
        "scheduler.name": "constant",
        "distributed_strategy": "ddp",
        **more,
    }
    return [f"--{key}={value}" for key, value in settings.items()]


def write_settings(folder: Path, vocabulary: int, length: int, rows: int, **more: Any) -> None:
    """Write the tokens, and `settings.json` for contestants.py."""
    # Frequencies as in text; without token 1, which transformers takes for padding, without a gradient.
    drawn = np.random.default_rng(0).zipf(1.2, STEPS * rows * length)
    (2 + drawn % (vocabulary - 2)).astype("<u2").tofile(folder / "tokens")
    settings = {"length": length, "rows": rows, "adamw": ADAMW, **more}
    (folder / "settings.json").write_text(json.dumps(settings))


def prepare(folder: Path) -> int:
    """Write what the contestants read; returns the number of weights."""
    shape = {f"model.{key}": value for key, value in SHAPE.items()}
    overrides = arguments(
        folder,
        ROWS,
        **shape,
        **{"model.init_device": "cpu", "evaluators": "[]", "eval_interval": 10**6, "wandb": "null"},
        **{"precision": "fp32", "load_path": folder / "olmo"},
    )
    config = load(CONFIG, overrides).model
    torch.manual_seed(0)
    state = OLMo(config).state_dict()
    write_checkpoints(folder, config, state)
    torch.save(state, folder / "weights.pt")
    write_settings(
        folder, config.vocab_size, config.max_sequence_length, ROWS, config=CONFIG, overrides=overrides, bf16=False
    )
    return sum(tensor.numel() for tensor in state.values())


def prepare_family(folder: Path, precision: str) -> int:
    """As `prepare`, of a model of transformers' own."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SMOLLM2))
    model.save_pretrained(folder / "hf")
    optimizer = {"name": "adamw", "betas": ADAMW["betas"]}  # arguments() has the rest
    run = {"model": {"max_sequence_length": FAMILY_LENGTH}, "optimizer": optimizer, "max_grad_norm": 1.0}
    (folder / "run.yaml").write_text(json.dumps(run))
    overrides = arguments(folder, FAMILY_ROWS, precision=precision, load_path=folder / "hf")
    given = {"config": str(folder / "run.yaml"), "overrides": overrides, "bf16": precision == "amp_bf16"}
    write_settings(folder, SMOLLM2["vocab_size"], FAMILY_LENGTH, FAMILY_ROWS, **given)
    return sum(weight.numel() for weight in model.parameters())


def first_losses(contestant: Contestant, folder: Path, length: int) -> list[float]:
    """Mean next-token losses of the first steps."""
    if contestant.name != "ours":
        return contestant.answers[-1]["losses"][:COMPARED]
    lines = (folder / "ours" / "metrics.jsonl").read_text("utf-8").splitlines()[:COMPARED]
    # Ours divides by the whole length, as OLMo does, though the first token predicts nothing.
    return [json.loads(line)["train/CrossEntropyLoss"] * length / (length - 1) for line in lines]


def bench_training(folder: Path, rounds: int) -> None:
    """OLMo's architecture: tokens per second, processor time and peak memory of all contestants that are here."""
    weights = prepare(folder)
    model = f"OLMo-1B with {SHAPE['n_layers']} layers of width {SHAPE['d_model']} ({weights / 1e6:.0f} M), fp32"
    race(folder, model, list(WHAT), 2 * rounds, (ROWS, SHAPE["max_sequence_length"]), AGREEMENT)


def bench_family(folder: Path, rounds: int) -> None:
    """The same of a model of another family, in both precisions, without ai2-olmo."""
    names = [name for name in WHAT if name != "ai2-olmo"]
    for precision, agreement in (("fp32", AGREEMENT), ("amp_bf16", HALF_AGREEMENT)):
        place = folder / precision
        place.mkdir()
        weights = prepare_family(place, precision)
        layers = SMOLLM2["num_hidden_layers"]
        model = f"a Llama as SmolLM2-135M with {layers} of 30 layers ({weights / 1e6:.0f} M), {precision}"
        race(place, model, names, rounds, (FAMILY_ROWS, FAMILY_LENGTH), agreement)


def race(folder: Path, model: str, names: list[str], rounds: int, batch: tuple[int, int], agreement: float) -> None:
    """Train what is prepared in `folder` in turn by all of `names` whose environment exists, and print what it costs.

    batch: instances a step, and tokens of each. Raises RuntimeError where the first losses differ by more than
    `agreement`, or those after them by more than ten times that.
    """
    for environment in sorted({ENVIRONMENTS[name] for name in names if name in ENVIRONMENTS}):
        if not Path(environment, "bin", "python").exists():
            left_out = [name for name in names if ENVIRONMENTS.get(name) == environment]
            names = [name for name in names if name not in left_out]
            print(f"training: without {' and '.join(map(WHAT.__getitem__, left_out))}; make {environment}/.ready")
    threads, tokens = torch.get_num_threads(), batch[0] * batch[1]
    with ExitStack() as stack:
        contestants = [stack.enter_context(Contestant(name, folder, threads)) for name in names]
        for contestant in contestants:
            contestant.train(2)  # warm up
        alternate(rounds, {contestant.name: partial(contestant.train, 1) for contestant in contestants})
        losses = np.array([first_losses(contestant, folder, batch[1]) for contestant in contestants])
    differ = np.ptp(losses, 0)
    print(
        f"training, {model}, {tokens} tokens per step, {threads} threads, {rounds} rounds; rates as ratios to the "
        f"first; losses of {COMPARED} steps agree to {differ.max():.1e}",
        flush=True,
    )
    if differ[0] > agreement or differ.max() > 10 * agreement:  # another optimizer shows in the second
        raise RuntimeError(f"first losses differ: {dict(zip(names, losses.tolist()))}")

    def measured(what: str) -> dict[str, NDArray[np.float64]]:
        return {c.name: np.array([answer[what] for answer in c.answers[-rounds:]]) for c in contestants}

    seconds, processor, held, peaks = map(measured, ("seconds", "processor", "imported", "peak"))
    beyond = {name: (peaks[name][-1] - held[name][-1]) / 2**20 for name in names}
    for name in names:
        print(
            f"  {WHAT[name]}: {spread(seconds['torch'] / seconds[name])} ({tokens / np.median(seconds[name]):,.0f} "
            f"tokens/s), by processor time {spread(processor['torch'] / processor[name])}; peak memory "
            f"{peaks[name][-1] / 2**20:,.0f} MiB, {beyond[name]:,.0f} beyond its imports"
        )
    others = [name for name in names if name != "ours"]
    fastest, thriftiest = (min(others, key=lambda name: np.median(of[name])) for of in (seconds, processor))
    least = min(peaks[name][-1] for name in others)
    print(
        f"  ours / the fastest of the others: {spread(seconds[fastest] / seconds['ours'])} ({WHAT[fastest]}), by "
        f"processor time {spread(processor[thriftiest] / processor['ours'])} ({WHAT[thriftiest]}); memory / the least "
        f"of theirs: {peaks['ours'][-1] / least:.2f} x, beyond imports "
        f"{beyond['ours'] / min(beyond[name] for name in others):.2f} x",
        flush=True,
    )
