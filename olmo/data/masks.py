"""Which tokens count in the loss and which ones later tokens attend to: label and attention masks.

A label mask tells of each token whether predicting it counts; padding never does. Tokens do not attend to padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..config import TrainConfig
from .sources import PADDING, TokenDataset, TokenFiles, TokenSource


class Masked(NamedTuple):
    """Rows of n instances of T tokens, ready for a model."""

    input_ids: Tensor  # (n, T) int64
    label_mask: Tensor | None  # (n, T) bool, whether predicting this token counts; None: it always does
    attention_mask: Tensor | None  # (n, T) bool, whether later tokens see this one; None: they do, or are padding

    def pinned(self) -> Masked:
        """The same in page-locked memory, from which a GPU copies while the program goes on."""
        labels, attention = (None if mask is None else mask.pin_memory() for mask in self[1:])
        return Masked(self.input_ids.pin_memory(), labels, attention)


@dataclass(frozen=True)
class Masks:
    """How the masks of a source come about; the defaults: only short rows are masked, where they are padded."""

    pad_token_id: int = 0  # stands in padded places
    pad_tokens: bool = False  # whether this token is padding wherever it stands (data.generate_attention_mask)
    labels: TokenSource | None = None  # above 0 where the token counts
    attention: TokenSource | None = None  # above 0 where the token is no padding

    def apply(self, tokens: NDArray[np.int64], instances: NDArray[np.integer]) -> Masked:
        """Token ids (n, T), PADDING among them, that the source gave for these instances (n,), with their masks."""
        label_mask = None if self.labels is None else self.labels.read(instances) > 0
        padding = tokens == PADDING
        if self.attention is not None:
            padding |= self.attention.read(instances) <= 0
        if self.pad_tokens:
            padding |= tokens == self.pad_token_id
        if not padding.any():
            return Masked(torch.from_numpy(tokens), None if label_mask is None else torch.from_numpy(label_mask), None)
        # From padding alone nothing can be predicted: the first token of a row that is none does not count, either.
        predicted = ~padding & (np.cumsum(~padding, axis=1) > 1)
        predicted[:, 0] = ~padding[:, 0]  # as where there is no padding; the loss never counts it
        label_mask = predicted if label_mask is None else label_mask & predicted
        # Where padding only ends rows, no token that counts could attend to it; attention is faster without a mask.
        seen = (padding[:, :-1] & ~padding[:, 1:]).any()
        return Masked(
            torch.from_numpy(np.where(tokens == PADDING, self.pad_token_id, tokens)),
            torch.from_numpy(label_mask),
            torch.from_numpy(~padding) if seen else None,
        )


def open_masks(config: TrainConfig, source: TokenSource) -> Masks:
    """The masks of a run's data: `data.label_mask_paths` (files of one byte a token) and `generate_attention_mask`;
    in a `datasets` folder, the columns `label_mask` and `attention_mask` where it has them.

    Raises ValueError where label masks and token files differ in how many instances they hold.
    """
    data, length = config.data, config.model.max_sequence_length
    masks = Masks(config.model.pad_token_id, data.generate_attention_mask)
    if isinstance(source, TokenDataset):
        labels, attention = (
            TokenDataset(source.path, length, data.pad_direction, column) if column in source.columns else None
            for column in ("label_mask", "attention_mask")
        )
        return replace(masks, labels=labels, attention=attention)
    if data.label_mask_paths is None or not isinstance(source, TokenFiles):
        return masks
    files = TokenFiles(data.label_mask_paths, length, "uint8")
    if len(files.paths) != len(source.paths):
        raise ValueError(f"data.label_mask_paths: {len(files.paths)} files, data.paths has {len(source.paths)}")
    for mask, path, masked, held in zip(files.paths, source.paths, np.diff(files.offsets), np.diff(source.offsets)):
        if masked != held:
            raise ValueError(
                f"{mask}: label masks of {masked} instances, {path} holds {held}; a mask has one byte a token"
            )
    return replace(masks, labels=files)


def without_padding(rows: NDArray[np.int64], where: str) -> list[NDArray[np.int64]]:
    """The tokens of each row (n, T); ValueError, with the name of the data, for a row that is nothing but PADDING."""
    kept = [row[row != PADDING] for row in rows]
    if not all(map(len, kept)):
        raise ValueError(f"{where}: row {[len(row) for row in kept].index(0)} of those to measure holds no token")
    return kept


def padded(rows: Sequence[NDArray[np.int64]], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Rows as one tensor (B, T), padded at the end, and the mask (B, T) of their tokens where their lengths differ."""
    longest = max(len(row) for row in rows)
    ids = np.zeros((len(rows), longest), dtype=np.int64)
    for position, row in enumerate(rows):
        ids[position, : len(row)] = row
    mask = None
    if any(len(row) != longest for row in rows):
        lengths = torch.tensor([len(row) for row in rows], device=device)
        mask = (torch.arange(longest, device=device) < lengths[:, None]).long()
    return torch.from_numpy(ids).to(device), mask
