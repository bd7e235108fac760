"""Runs of our Trainer on random tokens in OLMo-1B's shape, as the measurements of training need them."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import torch

from olmo.config import load
from olmo.distributed import Ranks
from olmo.train import Trainer
from scripts.gpu.place import Place

CONFIG = "configs/1B/1B_bs128_lr4e4_pubmed_1ep_738k.yaml"  # rows of 1024 tokens, amp_bf16
SMALL = {
    **{"model.d_model": 32, "model.n_heads": 2, "model.n_layers": 2, "model.max_sequence_length": 16},
    **{"model.vocab_size": 128, "model.embedding_size": 128, "model.eos_token_id": 127},
}
# Nothing but training: no checkpoint to start from, no knowledge, no evaluation.
ALONE = {
    **{"load_path": "null", "reset_optimizer_state": "false", "reset_trainer_state": "false"},
    **{"data.dataset_path": "null", "injection": "null", "inject_interval": "null", "evaluators": "[]"},
    **{"eval_on_load": "false", "save_interval": "null", "save_interval_unsharded": "null"},
    **{"no_pre_train_checkpoint": "true", "max_duration": 10**6, "save_overwrite": "true"},
}
BATCHES = 4  # of different rows, then again


def open_trainer(place: Place, rows: int, micro_batch: int, **settings: object) -> Trainer:
    """A run of batches of `rows` instances from new weights; `settings` override the configuration."""
    release()
    chosen: dict[str, object] = {**ALONE, **(SMALL if place.small else {})}
    tokens = place.folder / "tokens"
    chosen.update({"data.paths": f"[{tokens}]", "save_folder": place.folder / "run"})
    chosen.update({"global_train_batch_size": rows, "device_train_microbatch_size": micro_batch, **settings})
    config = load(CONFIG, [f"--{key}={value}" for key, value in chosen.items()])
    write_tokens(tokens, BATCHES * rows * config.model.max_sequence_length, config.model.vocab_size)
    return Trainer(config, place.device, Ranks())


def write_tokens(path: Path, count: int, vocabulary: int) -> None:
    np.random.default_rng(0).integers(0, vocabulary - 1, count).astype("<u2").tofile(path)


def release() -> None:
    """Free what a run before has left on the GPU, and its compiled code."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
