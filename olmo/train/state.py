"""The state of a run beside weights and optimizer: all that a restart needs. Saved as `train.pt` of a checkpoint."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.hub import resolve
from ..config.schema import TrainConfig
from ..exceptions import ConfigurationError
from ..files.tensors import read_training_state


@dataclass
class TrainState:
    """Position and history of a run. There is no random state: dropout is seeded from (seed, step, rank)."""

    step: int = 0  # optimizer steps done
    epoch: int = 0
    batch: int = 0  # global batches of this epoch done
    tokens: int = 0  # tokens seen by all ranks
    restarted_at: int | None = None  # steps (or tokens) when the optimizer state was reset in mid-run
    lowest_loss: float = math.inf  # of all steps, if early_stopping_factor is set

    @classmethod
    def read(cls, folder: Path, config: TrainConfig) -> TrainState:
        """The state in a checkpoint folder of ours or OLMo's, its position in batches of `config`.

        Raises ValueError for a damaged file, ConfigurationError for a batch size that does not divide the position.
        """
        saved = read_training_state(folder, "train", "other")
        names = ("global_step", "epoch", "global_train_examples_seen_this_epoch", "global_train_tokens_seen")
        if not isinstance(saved, dict) or "global_step" not in saved:
            raise ValueError(f"{folder}: its training state has no global_step; set reset_trainer_state")
        for name in (*names, "restarted_at"):
            if not isinstance(saved.get(name) or 0, int) or (saved.get(name) or 0) < 0:
                raise ValueError(f"{folder}: its training state has {name} {saved[name]!r}; set reset_trainer_state")
        seen = saved.get("global_train_examples_seen_this_epoch", 0) if config.restore_dataloader else 0
        if seen % config.global_train_batch_size:
            raise ConfigurationError(
                f"global_train_batch_size: {seen} instances of this epoch are done, not a multiple of "
                f"{config.global_train_batch_size}; keep the batch size, or set --restore_dataloader=false"
            )
        return cls(
            saved["global_step"],
            saved.get("epoch") or 0,
            seen // config.global_train_batch_size,
            saved.get("global_train_tokens_seen", 0),
            saved.get("restarted_at"),
            float(saved.get("lowest_loss", math.inf)),
        )

    @classmethod
    def at_start(cls, config: TrainConfig) -> TrainState:
        """The state in which a run of this configuration begins, ignoring checkpoints of its own."""
        if config.load_path is None or config.reset_trainer_state:
            return cls(epoch=config.epoch or 0)
        return cls.read(resolve(config.load_path, "load_path"), config)

    def advance(self, tokens: int, batches_per_epoch: int) -> None:
        """Count a step that has trained on `tokens` tokens of all ranks."""
        self.step, self.tokens, self.batch = self.step + 1, self.tokens + tokens, self.batch + 1
        if self.batch == batches_per_epoch:
            self.epoch, self.batch = self.epoch + 1, 0

    def as_saved(self, config: TrainConfig, world_size: int) -> dict[str, Any]:
        """The contents of `train.pt`, under OLMo's names."""
        saved: dict[str, Any] = {
            "epoch": self.epoch,
            "global_step": self.step,
            "global_train_examples_seen_this_epoch": self.batch * config.global_train_batch_size,
            "global_train_tokens_seen": self.tokens,
            "world_size": world_size,
            "restarted_at": self.restarted_at,
            # OLMo's trainer expects these, and may delete the checkpoints that they list.
            **{name: [] for name in ("checkpoints", "unsharded_checkpoints", "ephemeral_checkpoints")},
        }
        if config.early_stopping_factor is not None:
            saved["lowest_loss"] = self.lowest_loss
        return saved
