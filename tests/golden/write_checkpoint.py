"""Checkpoints of this repository's trainer, for `make_reference.py --check` to read with OLMo's own code.

`python -m tests.golden.write_checkpoint FOLDER OLMOS` trains every golden case half-way and leaves the checkpoint, with
tokens and the logits that our model gives for them, in FOLDER/{case}/step10-unsharded. Then it goes on from
the checkpoints that OLMo's trainer wrote half-way, OLMOS/{case}, to where OLMo's unbroken run ended.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from olmo.checkpoint import load_model
from olmo.distributed import Ranks
from olmo.train import Trainer
from tests.olmo.train.test_golden import CASES, GOLDEN, configure


def write(case: str, folder: Path) -> Path:
    config = configure(case, folder, "--stop_at=10", "--save_interval_unsharded=10", "--save_overwrite")
    Trainer(config, torch.device("cpu"), Ranks()).fit()
    checkpoint = folder / "step10-unsharded"
    model = load_model(checkpoint, torch.device("cpu")).eval()
    tokens = torch.randint(config.model.vocab_size, (2, 17), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(tokens)
    np.save(checkpoint / "check-tokens.npy", tokens.numpy())
    np.save(checkpoint / "check-logits.npy", logits.numpy())
    return checkpoint


def go_on(case: str, folder: Path, olmos: Path) -> bool:
    """Whether our trainer, started from OLMo's checkpoint, ends with the weights of OLMo's unbroken run."""
    reset = ("--reset_optimizer_state=false", "--reset_trainer_state=false")
    config = configure(case, folder, f"--load_path={olmos}", *reset, "--save_overwrite")
    trainer = Trainer(config, torch.device("cpu"), Ranks())
    assert trainer.state.step == 10
    trainer.fit()
    final = load_file(GOLDEN / case / "final.safetensors")
    apart = torch.cat([(t - final[name]).abs().flatten() for name, t in trainer.model.state_dict().items()])
    typical, most = float(apart.quantile(0.999)), float(apart.max())
    print(f"{olmos}: we went on from it; weights at the end differ by {typical:.1e} (99.9 %), at most {most:.1e}")
    return typical <= 1e-6


if __name__ == "__main__":
    target, kept = map(Path, sys.argv[1:])
    for name in CASES:
        print(write(name, target / name))
    equal = [go_on(name, target / f"{name}-of-olmo", kept / name) for name in CASES]
    sys.exit(not all(equal))
