"""The first 24 losses of the tiny configuration (CPU, float32) against those that transformers and plain torch give.

`tests/golden/tiny_pretrain.json` holds the latter. As a program, this file computes them anew, which takes half a
minute: from the same initial weights, with transformers' OLMo, torch's AdamW, and order, warm-up and clipping by hand.

    python -m tests.olmo.test_loss_curve
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from olmo.config import TrainConfig, load
from olmo.distributed import Ranks
from olmo.train import Trainer
from tests.reference import to_transformers
from tests.running import CPU, ROOT, order, series

GOLDEN = ROOT / "tests/golden/tiny_pretrain.json"
STEPS, BATCH, LENGTH = 24, 16, 256
INSTANCES = 160  # so that a second and a third epoch begin


def tokens() -> NDArray[np.uint16]:
    """Walks with small steps: something to learn. (Of RandomState, because numpy promises that it never changes.)"""
    steps = np.random.RandomState(5).randint(-3, 6, (INSTANCES, LENGTH))
    return (steps.cumsum(axis=1) % 512).astype("<u2")


def configure(folder: Path) -> TrainConfig:
    tokens().tofile(folder / "tokens.npy")
    places = [f"--data.paths=[{folder / 'tokens.npy'}]", f"--save_folder={folder / 'run'}", "--evaluators=[]"]
    settings = [f"--stop_at={STEPS}", "--save_steps_unsharded=[]", "--console_log_interval=1"]
    return load(ROOT / "configs/tiny/pretrain.yaml", [*places, *settings])


def by_hand(trainer: Trainer) -> list[float]:
    """The losses of the same run without our model, data order, schedule, clipping and loop."""
    model = to_transformers(trainer.model).train()
    model.model.embed_tokens.padding_idx = None  # OLMo trains the embedding of every token
    weights = list(model.parameters())
    optimizer = torch.optim.AdamW(weights, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, foreach=False)
    texts, losses, epoch_length = torch.from_numpy(tokens().astype(np.int64)), [], INSTANCES // BATCH
    for step in range(1, STEPS + 1):
        epoch, place = divmod(step - 1, epoch_length)
        ids = texts[torch.from_numpy(order(6198, epoch, INSTANCES)[place * BATCH : (place + 1) * BATCH])]
        logits = model(ids).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum") / ids.numel()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 + (2e-2 - 2e-3) * step / 50
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_the_loss_curve_of_the_tiny_configuration(tmp_path: Path) -> None:
    Trainer(configure(tmp_path), CPU, Ranks()).fit()
    losses = series(tmp_path / "run")
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert list(losses) == list(range(1, STEPS + 1)) and golden[-1] < 0.75 * golden[0]
    # 2.6e-7 was seen; another processor may add in another order.
    assert list(losses.values()) == pytest.approx(golden, rel=1e-5)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        expected = by_hand(Trainer(configure(Path(folder)), CPU, Ranks()))
    GOLDEN.write_text(json.dumps([round(loss, 7) for loss in expected], indent=1) + "\n", encoding="utf-8")
