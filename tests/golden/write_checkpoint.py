"""Checkpoints of this repository's trainer, for `make_reference.py --check` to read with OLMo's own code.

`python -m tests.golden.write_checkpoint FOLDER` trains every golden case for three steps and leaves the checkpoint,
with tokens and the logits that our model gives for them, in FOLDER/{case}/step3-unsharded.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

from olmo.checkpoint import load_model
from olmo.distributed import Ranks
from olmo.train import Trainer
from tests.olmo.test_golden import CASES, configure


def write(case: str, folder: Path) -> Path:
    config = configure(case, folder, "--stop_at=3", "--save_interval_unsharded=3", "--save_overwrite")
    Trainer(config, torch.device("cpu"), Ranks()).fit()
    checkpoint = folder / "step3-unsharded"
    model = load_model(checkpoint, torch.device("cpu")).eval()
    tokens = torch.randint(config.model.vocab_size, (2, 17), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(tokens)
    np.save(checkpoint / "check-tokens.npy", tokens.numpy())
    np.save(checkpoint / "check-logits.npy", logits.numpy())
    return checkpoint


if __name__ == "__main__":
    for name in CASES:
        print(write(name, Path(sys.argv[1]) / name))
