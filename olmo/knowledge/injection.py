"""Injection: one pure function (batch, step, plan) -> batch.

Method section 3. The texts of a round are distributed over the rows of the *global* batch; a rank only needs to know
which global rows it holds, so any number of ranks and any micro-batch size inject the same.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..data.loader import Batch
from .plan import Plan, Text


def _place(row: Tensor, counts: Tensor | None, length: int, boundary: int | None) -> int:
    """Where in a row (T,) `length` tokens of knowledge are inserted: at the front, or behind the first boundary token
    if the row has room for them there.

    A token that does not count (`counts`, the row's label mask), such as padding, is not a boundary. The mask is None
    if all tokens of a rank's rows count, so the place depends on this row alone, not on the other rows of the rank.
    """
    if boundary is None:
        return 0
    ends = row == boundary if counts is None else (row == boundary) & counts
    place = int(ends.int().argmax()) + 1
    return place if ends.any() and place + length <= len(row) else 0


def inject(batch: Batch, step: int, plan: Plan | None, global_batch_size: int) -> tuple[Batch, list[tuple[int, Text]]]:
    """Insert the texts of this step's round into their rows: row = concat(row[:b], texts, row[b:])[:T].

    step: 1-based number of the optimizer step that uses the batch, which is not changed in place.
    b is 0, the front of the row; with the plan's `boundary` it is the end of the row's first document, if all texts of
    the row fit behind it. The end of the row is cut off, never a text.
    Every token of a text counts in the loss and is attended to; the row's own masks move with its tokens.
    Returns the batch and the (global row, text) pairs that were inserted.
    """
    injection_round = plan.round_of(step) if plan is not None else None
    if plan is None or injection_round is None:
        return batch, []
    parts = (batch.input_ids, batch.label_mask, batch.attention_mask)
    input_ids, label_mask, attention_mask = (None if part is None else part.clone() for part in parts)
    assert input_ids is not None
    inserted: list[tuple[int, Text]] = []
    length = input_ids.shape[1]
    for position, row in enumerate(batch.rows.tolist()):
        for_row = plan.texts_of_row(injection_round, row, global_batch_size)
        if for_row:
            texts = torch.tensor([token for text in for_row for token in text.input_ids], dtype=torch.int64)
            counts = None if label_mask is None else label_mask[position]
            place = _place(input_ids[position], counts, len(texts), plan.boundary)
            ones = torch.ones_like(texts, dtype=torch.bool)
            for part, new in ((input_ids, texts), (label_mask, ones), (attention_mask, ones)):
                if part is not None:
                    part[position] = torch.cat((part[position, :place], new, part[position, place:]))[:length]
            inserted.extend((row, text) for text in for_row)
    return replace(batch, input_ids=input_ids, label_mask=label_mask, attention_mask=attention_mask), inserted
