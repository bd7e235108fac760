"""A run of a tiny model of any family, and the same run by a plain torch loop over transformers' class.

The loop has nothing of ours: not the data order, schedule, loss, parameter groups, clipping or step.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from numpy.typing import NDArray
from omegaconf import OmegaConf
from torch import Tensor

from olmo.checkpoint import complete
from olmo.config import TrainConfig, load

LENGTH, INSTANCES, BATCH, MICRO_BATCH, STEPS = 16, 64, 8, 2, 20
RATE, WARM, DECAY, CLIP, SEED = 3e-3, 4, 0.1, 1.0, 11
EPS = 1e-5  # above the gradient of biases of keys, which is rounding alone: the softmax of scores ignores them


def write_run(folder: Path, network: transformers.PreTrainedModel) -> Path:
    """Write the model, tokens and `family.yaml`, which trains it, into `folder`; returns the path of the latter."""
    network.save_pretrained(folder / "model")
    steps = np.random.default_rng(5).integers(-3, 6, (INSTANCES, LENGTH))
    (2 + steps.cumsum(axis=1) % 126).astype("<u2").tofile(folder / "tokens.npy")
    settings: dict[str, Any] = {
        "seed": SEED,
        "load_path": str(folder / "model"),
        "reset_optimizer_state": True,
        "reset_trainer_state": True,
        "model": {"max_sequence_length": LENGTH},
        "data": {"paths": [str(folder / "tokens.npy")]},
        "optimizer": {"name": "adamw", "learning_rate": RATE, "weight_decay": DECAY, "eps": EPS},
        "scheduler": {"name": "cosine_with_warmup", "t_warmup": WARM, "alpha_f": 0.1},
        "max_grad_norm": CLIP,
        "max_duration": STEPS,
        "global_train_batch_size": BATCH,
        "device_train_microbatch_size": MICRO_BATCH,
        "precision": "fp32",
        "save_folder": str(folder / "run"),
        "no_pre_train_checkpoint": True,
    }
    OmegaConf.save(OmegaConf.create(settings), folder / "family.yaml")
    return folder / "family.yaml"


def family_run(folder: Path, network: transformers.PreTrainedModel, *overrides: str) -> TrainConfig:
    """The configuration of such a run, with `overrides`."""
    return load(write_run(folder, network), overrides, complete)


def batches(folder: Path, steps: int = STEPS) -> list[Tensor]:
    """The global batches (BATCH, LENGTH) of the steps, read and shuffled by hand."""
    tokens = np.fromfile(folder / "tokens.npy", "<u2").reshape(INSTANCES, LENGTH).astype(np.int64)
    found: list[Tensor] = []
    for epoch in range(math.ceil(steps * BATCH / INSTANCES)):
        found += torch.from_numpy(tokens[shuffled(epoch)]).split(BATCH)
    return found[:steps]


def shuffled(epoch: int) -> NDArray[np.int64]:
    """The instance numbers of an epoch in the order of the run."""
    numbers = np.arange(INSTANCES)
    np.random.Generator(np.random.PCG64(SEED + epoch)).shuffle(numbers)
    return numbers


def rate(step: int) -> float:
    """The learning rate of a step, counted from 1: linear warm-up from a tenth, then a cosine down to a tenth."""
    if step < WARM:
        return RATE * (0.1 + 0.9 * step / WARM)
    return RATE * (0.1 + 0.9 * (1 + math.cos(math.pi * (step - WARM) / (STEPS - WARM))) / 2)


def decays(name: str, weight: Tensor) -> bool:
    """Whether a weight decays, from its name: no norm, bias or embedding does."""
    kept = ("norm", "ln_", "bias", "embed", "wte", "wpe", "A_log", "mamba.D")
    return weight.ndim > 1 and not any(part in name for part in kept)


def plain_loop(
    network: transformers.PreTrainedModel, rows: list[Tensor], masks: list[Tensor] | None = None, narrow: bool = False
) -> tuple[list[float], list[float]]:
    """Train `network` in place on a global batch (n, T) a step: the cross-entropy of each step and what the family
    adds to it, as it is without `labels`, 0 for most.

    masks: (n, T) bool of each step, the tokens that are no padding, which neither predict nor are predicted; narrow:
    autocast to bfloat16. The cross-entropy is the sum over the predictions divided by n T.
    """
    network.train()
    named = dict(network.named_parameters())
    groups = [
        {"params": [p for n, p in named.items() if decays(n, p)], "weight_decay": DECAY},
        {"params": [p for n, p in named.items() if not decays(n, p)], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=EPS, foreach=False)
    mixture = hasattr(network, "router_aux_loss_coef")
    losses, added = [], []
    for step, ids in enumerate(rows, start=1):
        optimizer.zero_grad()
        loss, extra = torch.zeros(()), torch.zeros(())
        for part in torch.arange(len(ids)).split(MICRO_BATCH):
            inputs: dict[str, Any] = {"input_ids": ids[part], "use_cache": False}
            labels = ids[part][:, 1:]
            if masks is not None:
                mask = masks[step - 1][part]
                inputs["attention_mask"] = mask.long()
                labels = labels.masked_fill(~(mask[:, 1:] & mask[:, :-1]), -100)
            with torch.autocast("cpu", torch.bfloat16) if narrow else nullcontext():
                output = network(**inputs, **({"output_router_logits": True} if mixture else {}))
            logits = output.logits[:, :-1].flatten(0, 1).float()
            own = F.cross_entropy(logits, labels.flatten(), ignore_index=-100, reduction="sum") / ids.numel()
            more = torch.zeros(())
            if mixture:
                more = network.router_aux_loss_coef * output.aux_loss / math.ceil(len(ids) / MICRO_BATCH)
            (own + more).backward()
            loss, extra = loss + own.detach(), extra + more.detach()
        norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in named.values() if p.grad is not None))
        for parameter in named.values():
            if parameter.grad is not None:
                parameter.grad *= min(1.0, CLIP / (norm + 1e-6))
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        optimizer.step()
        losses.append(loss.item())
        added.append(extra.item())
    return losses, added
