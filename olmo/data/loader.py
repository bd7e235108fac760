"""The batches of one rank, from any position of a run on.

A global batch is `global_batch_size` consecutive places of the epoch's order; rank r of W gets its rows r, r + W,
r + 2 W, ... as OLMo's loader gives them. The position is two numbers, epoch and batch, so a restart replays nothing.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..config.schema import TrainConfig
from ..distributed.launcher import ABANDONABLE
from ..exceptions import ConfigurationError
from .masks import Masked, Masks, open_masks
from .order import EpochOrder
from .sources import PADDING, TokenDataset, TokenSource, check_tokens, open_source


@dataclass(frozen=True)
class Batch:
    """The rows of a global batch that one rank trains on."""

    input_ids: Tensor  # (rows, T) int64
    instances: NDArray[np.uint32]  # (rows,) instance numbers in the source
    rows: NDArray[np.int64]  # (rows,) places in the global batch
    label_mask: Tensor | None = None  # (rows, T) bool; both as in `Masked`
    attention_mask: Tensor | None = None
    padded_share: float = 0.0  # of all rows of the global batch, before injection


class Loader:
    """Batches of a source, epoch after epoch; each epoch is shuffled anew with seed + epoch.

    Places at the end of an epoch that fill no global batch are dropped, so that batches do not depend on the number of
    ranks. `workers` threads read `ahead` batches in advance, which changes no batch. `order_folder`: see `EpochOrder`.
    """

    def __init__(
        self,
        source: TokenSource,
        global_batch_size: int,
        seed: int,
        *,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
        vocabulary: int | None = None,
        masks: Masks | None = None,
        workers: int = 1,
        ahead: int = 1,
        pin_memory: bool = False,
        order_folder: Path | None = None,
    ):
        if global_batch_size % world_size:
            raise ConfigurationError(
                f"global_train_batch_size: {global_batch_size} is not a multiple of the number of processes, "
                f"{world_size}"
            )
        self.source, self.global_batch_size, self.seed, self.shuffle = source, global_batch_size, seed, shuffle
        self.rank, self.world_size, self.vocabulary, self.masks = rank, world_size, vocabulary, masks or Masks()
        self.workers, self.ahead, self.pin_memory, self.order_folder = workers, ahead, pin_memory, order_folder
        self._orders, self._ordering = dict[int, EpochOrder](), threading.Lock()
        if not self.batches_per_epoch:
            raise ValueError(f"{len(source)} instances are fewer than one global batch of {global_batch_size}")

    @property
    def batches_per_epoch(self) -> int:
        return len(self.source) // self.global_batch_size

    def _order(self, epoch: int) -> EpochOrder:
        """The order of an epoch; that of the epoch before is kept, too, because its last batches may still be read."""
        with self._ordering:
            if epoch not in self._orders:
                self._orders = {number: order for number, order in self._orders.items() if number == epoch - 1}
                self._orders[epoch] = EpochOrder(len(self.source), self.seed, epoch, self.shuffle, self.order_folder)
            return self._orders[epoch]

    def batch(self, epoch: int, number: int) -> Batch:
        """Global batch `number` (0-based) of an epoch, the part of this rank."""
        return self.part(epoch, number, np.arange(self.rank, self.global_batch_size, self.world_size))

    def part(self, epoch: int, number: int, rows: NDArray[np.int64]) -> Batch:
        """These rows of a global batch."""
        order, first, padded = self._order(epoch), number * self.global_batch_size, 0.0
        instances = order.at(first + rows)
        masked = self._read(instances)
        if isinstance(self.source, TokenDataset):
            padded = self.source.padded_share(order.at(np.arange(first, first + self.global_batch_size)))
        return Batch(masked.input_ids, instances, rows, masked.label_mask, masked.attention_mask, padded)

    def remarks(self) -> Iterator[str]:
        """What of the data is not used or is padding, a line each."""
        yield from self.source.remarks()
        if left := len(self.source) % self.global_batch_size:
            yield f"{left:,} of {len(self.source):,} instances are not used in each epoch: they fill no global batch"

    def _read(self, instances: NDArray[np.uint32]) -> Masked:
        tokens, known = self.source.read(instances), self.vocabulary
        if known is not None:
            check_tokens(tokens, instances, known)
            if self.masks.pad_token_id >= known and (tokens == PADDING).any():
                raise ValueError(
                    f"model.pad_token_id: {self.masks.pad_token_id} pads rows, the model's vocabulary has {known}"
                )
        masked = self.masks.apply(tokens, instances)
        return masked.pinned() if self.pin_memory else masked

    def batches(self, epoch: int = 0, number: int = 0, count: int | None = None) -> Generator[Batch, None, None]:
        """`count` batches from a position on, default: endless; the next ones are read while one is used."""
        first = epoch * self.batches_per_epoch + number
        places = iter(range(first, first + count)) if count is not None else itertools.count(first)
        waiting: deque[Future[Batch]] = deque()
        readers = ThreadPoolExecutor(
            self.workers, thread_name_prefix=ABANDONABLE
        )  # `exit_process` does not wait for these
        try:
            while True:
                for place in itertools.islice(places, self.ahead + 1 - len(waiting)):
                    waiting.append(readers.submit(self.batch, *divmod(place, self.batches_per_epoch)))
                if not waiting:
                    return
                yield waiting.popleft().result()
        finally:
            readers.shutdown(wait=False, cancel_futures=True)  # a server may not respond for minutes


def run_loader(
    config: TrainConfig,
    rank: int = 0,
    world_size: int = 1,
    *,
    pin_memory: bool = False,
    order_folder: Path | None = None,
    keep: bool = True,
) -> Loader:
    """The loader of a run. `keep` caches remote data. Raises what `open_source`, `open_masks` and `Loader` raise."""
    data = config.data
    source = open_source(data, config.model.max_sequence_length, keep)
    workers = max(data.num_workers, 1)
    return Loader(
        source,
        config.global_train_batch_size,
        config.data_seed,
        shuffle=config.data_shuffling,
        rank=rank,
        world_size=world_size,
        vocabulary=config.model.rows,
        masks=open_masks(data, config.model.pad_token_id, source),
        workers=workers,
        ahead=workers * (data.prefetch_factor or (2 if data.num_workers else 1)),
        pin_memory=pin_memory and data.pin_memory,
        order_folder=order_folder,
    )
