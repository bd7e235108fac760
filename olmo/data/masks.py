"""Which tokens count in the loss and which ones later tokens attend to: label and attention masks.

A label mask marks the tokens whose prediction counts; padding never does. Tokens do not attend to padding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..config.schema import DataConfig, InstanceFilterConfig
from ..distributed.devices import to_device
from ..exceptions import ConfigurationError
from .filter import repeats_itself
from .sources import PADDING, TokenDataset, TokenFiles, TokenSource


class Masked(NamedTuple):
    """Rows of n instances of T tokens, ready for a model."""

    input_ids: Tensor  # (n, T) int64
    label_mask: Tensor | None  # (n, T) bool, whether predicting this token counts; None: it always does
    attention_mask: Tensor | None  # (n, T) bool, whether later tokens see this one; None: they do, or are padding

    def pinned(self) -> Masked:
        """The same in page-locked memory, from which a GPU copies while the program continues."""
        labels, attention = (None if mask is None else mask.pin_memory() for mask in self[1:])
        return Masked(self.input_ids.pin_memory(), labels, attention)


Reader = Callable[[NDArray[np.integer]], NDArray[np.int64]]  # instance numbers (n,) -> a number a token (n, T)


@dataclass(frozen=True)
class Masks:
    """How the masks of a source are made; by default only the padding of short rows is masked."""

    pad_token_id: int = 0  # the id in padded places
    pad_tokens: bool = False  # whether every token of this id is padding (data.generate_attention_mask)
    labels: Reader | None = None  # above 0 where the token counts
    attention: Reader | None = None  # above 0 where the token is not padding
    instance_filter: InstanceFilterConfig | None = None  # nothing of an instance that repeats itself counts

    def _absent(self, tokens: NDArray[np.int64], instances: NDArray[np.integer]) -> NDArray[np.bool_]:
        """Where a row has no token at all."""
        absent = tokens == PADDING
        return absent if self.attention is None else absent | (self.attention(instances) <= 0)

    def apply(self, tokens: NDArray[np.int64], instances: NDArray[np.integer]) -> Masked:
        """Token ids (n, T), PADDING among them, that the source gave for these instances (n,), with their masks."""
        padding = self._absent(tokens, instances)
        label_mask = None if self.labels is None else self.labels(instances) > 0
        if self.instance_filter is not None:
            repeated = repeats_itself(tokens, self.instance_filter)
            for row in np.flatnonzero(padding.any(axis=1)):
                repeated[row] = repeats_itself(tokens[row][~padding[row]][None], self.instance_filter)[0]
            if repeated.any():
                kept = np.broadcast_to(~repeated[:, None], tokens.shape)
                label_mask = kept if label_mask is None else label_mask & kept
        if self.pad_tokens:
            padding |= tokens == self.pad_token_id
        attention_mask = None
        if padding.any():
            tokens = np.where(tokens == PADDING, self.pad_token_id, tokens)
            # The first real token of a row has only padding before it, so it does not count.
            predicted = ~padding & (np.cumsum(~padding, axis=1) > 1)
            predicted[:, 0] = ~padding[:, 0]  # as where there is no padding; the loss never counts it
            label_mask = predicted if label_mask is None else label_mask & predicted
            # Where padding only ends rows, no token that counts could attend to it; attention is faster without a mask.
            if (padding[:, :-1] & ~padding[:, 1:]).any():
                attention_mask = torch.from_numpy(~padding)
        labels = None if label_mask is None else torch.from_numpy(np.ascontiguousarray(label_mask))
        return Masked(torch.from_numpy(tokens), labels, attention_mask)

    def rows(self, source: TokenSource, instances: NDArray[np.integer], where: str) -> list[NDArray[np.int64]]:
        """The tokens of these instances without padding; ValueError, with `where`, for one that has no other."""
        tokens = source.read(instances)
        padding = self._absent(tokens, instances)
        if self.pad_tokens:
            padding |= tokens == self.pad_token_id
        if padding.all(axis=1).any():
            raise ValueError(f"{where}: instance {instances[int(padding.all(axis=1).argmax())]} holds no token")
        return [row[~absent] for row, absent in zip(tokens, padding)]


def open_masks(data: DataConfig, pad_token_id: int, source: TokenSource) -> Masks:
    """The masks of a run's data: `data.label_mask_paths` (files of one byte a token), `generate_attention_mask` and
    `instance_filter`; in a `datasets` folder, the columns `label_mask` and `attention_mask` where it has them.

    Raises ValueError where label masks and token files differ in length.
    """
    masks = Masks(pad_token_id, data.generate_attention_mask, instance_filter=data.instance_filter)
    if isinstance(source, TokenDataset):
        labels, attention = (
            partial(source.read_column, column) if column in source.columns else None
            for column in ("label_mask", "attention_mask")
        )
        return replace(masks, labels=labels, attention=attention)
    if data.label_mask_paths is None or not isinstance(source, TokenFiles):
        return masks
    files = TokenFiles(data.label_mask_paths, source.sequence_length, "uint8", key="data.label_mask_paths")
    if len(files.paths) != len(source.paths):
        raise ConfigurationError(f"data.label_mask_paths: {len(files.paths)} files, data.paths has {len(source.paths)}")
    tokens = (size // source.dtype.itemsize for size in source.sizes)
    for mask, path, masked, held in zip(files.paths, source.paths, files.sizes, tokens):
        if masked != held:
            raise ValueError(f"{mask}: {masked} bytes for the {held} tokens of {path}; a mask has one byte a token")
    return replace(masks, labels=files.read)


def padded(rows: Sequence[NDArray[np.int64]], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Rows as one tensor (B, T), padded at the end, and the mask (B, T) of their tokens where their lengths differ."""
    longest = max(len(row) for row in rows)
    ids = np.zeros((len(rows), longest), dtype=np.int64)
    for position, row in enumerate(rows):
        ids[position, : len(row)] = row
    mask = None
    if any(len(row) != longest for row in rows):
        lengths = torch.tensor([len(row) for row in rows])
        mask = to_device((torch.arange(longest) < lengths[:, None]).long(), device)
    return to_device(torch.from_numpy(ids), device), mask
