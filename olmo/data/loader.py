"""What this rank gets now, and where to go on after a restart.

A global batch is `global_batch_size` consecutive places of the epoch's order; rank r of W gets its rows r, r + W,
r + 2 W, ... as OLMo's loader gives them. The position is two numbers, epoch and batch, so a restart replays nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..config import TrainConfig
from .order import build_order
from .sources import TokenSource, open_source


@dataclass(frozen=True)
class Batch:
    """The rows of a global batch that one rank holds."""

    input_ids: Tensor  # (rows, T) int64
    instances: NDArray[np.uint32]  # (rows,) instance numbers in the source
    rows: NDArray[np.int64]  # (rows,) places in the global batch


class Loader:
    """Batches of a source, epoch after epoch; each epoch is shuffled anew with seed + epoch.

    Places that fill no whole global batch at the end of an epoch are dropped.
    """

    def __init__(
        self,
        source: TokenSource,
        global_batch_size: int,
        seed: int,
        *,
        shuffle: bool = True,
        drop_last: bool = True,
        rank: int = 0,
        world_size: int = 1,
        vocabulary: int | None = None,
    ):
        if global_batch_size % world_size:
            raise ValueError(f"global_train_batch_size {global_batch_size} is no multiple of {world_size} ranks")
        self.source, self.global_batch_size, self.seed = source, global_batch_size, seed
        self.shuffle, self.drop_last, self.vocabulary = shuffle, drop_last, vocabulary
        self.rank, self.world_size = rank, world_size
        self._order: tuple[int, NDArray[np.uint32]] | None = None
        if not self.batches_per_epoch:
            raise ValueError(f"{len(source)} instances are fewer than one global batch of {global_batch_size}")

    @property
    def batches_per_epoch(self) -> int:
        count = len(self.source)
        count = (count if self.drop_last else count + self.world_size - 1) // self.world_size * self.world_size
        return count // self.global_batch_size

    def order(self, epoch: int) -> NDArray[np.uint32]:
        """The global order of an epoch; the last one asked for is kept."""
        if self._order is None or self._order[0] != epoch:
            count, world_size = len(self.source), self.world_size
            order = build_order(count, self.seed, epoch, world_size, self.drop_last, self.shuffle)
            self._order = (epoch, order)
        return self._order[1]

    def batch(self, epoch: int, number: int) -> Batch:
        """Global batch `number` (0-based) of an epoch, the part of this rank."""
        rows = np.arange(self.rank, self.global_batch_size, self.world_size)
        instances = self.order(epoch)[number * self.global_batch_size + rows]
        tokens = self.source.read(instances)
        if self.vocabulary is not None:
            foreign = (tokens < 0) | (tokens >= self.vocabulary)
            if foreign.any():
                row = int(foreign.any(axis=1).argmax())
                raise ValueError(
                    f"instance {instances[row]} holds token {tokens[row][foreign[row]][0]}, the model knows "
                    f"{self.vocabulary}: tokenizer and model disagree"
                )
        return Batch(torch.from_numpy(tokens), instances, rows)

    def batches(self, epoch: int = 0, number: int = 0) -> Iterator[Batch]:
        """All batches from a position on, without end; the next one is read while the current one is used."""

        def positions() -> Iterator[tuple[int, int]]:
            place = epoch * self.batches_per_epoch + number
            while True:
                yield divmod(place, self.batches_per_epoch)
                place += 1

        upcoming = positions()
        with ThreadPoolExecutor(1, thread_name_prefix="loader") as reader:
            waiting = reader.submit(self.batch, *next(upcoming))
            while True:
                current = waiting.result()
                waiting = reader.submit(self.batch, *next(upcoming))
                yield current


def run_loader(config: TrainConfig, rank: int = 0, world_size: int = 1) -> Loader:
    """The loader of a run's configuration. Raises what `open_source` and `Loader` raise."""
    return Loader(
        open_source(config.data, config.model.max_sequence_length),
        config.global_train_batch_size,
        config.data_seed,
        shuffle=config.data_shuffling,
        drop_last=config.data.drop_last,
        rank=rank,
        world_size=world_size,
        vocabulary=config.model.embedding_size or config.model.vocab_size,
    )
