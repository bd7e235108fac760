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


def _entrance(row: Tensor, counts: Tensor | None, length: int, boundary: int | None) -> int:
    """The place in a row (T,) where `length` tokens of knowledge enter.

    It is 0 without `boundary`, else behind the first boundary token, or 0 where that leaves them no room. A token that
    does not count (`counts`, the row's label mask), as padding does not, ends no document. The mask is None where all
    tokens of a rank's rows count, so the place depends on the row alone, whichever other rows a rank holds.
    """
    if boundary is None:
        return 0
    ends = row == boundary if counts is None else (row == boundary) & counts
    place = int(ends.int().argmax()) + 1
    return place if ends.any() and place + length <= len(row) else 0


def inject(batch: Batch, step: int, plan: Plan | None, global_batch_size: int) -> tuple[Batch, list[tuple[int, Text]]]:
    """Let the texts of this step's round enter their rows: row = concat(row[:b], texts, row[b:])[:T].

    step: 1-based number of the optimizer step that uses the batch, which is never changed in place.
    b is 0, the front of the row, or with the plan's `boundary` behind the row's first document, where all texts of the
    row have room there; the end of the row makes room, never a text.
    Every token of a text counts in the loss and is attended to, whatever the masks say of the row; they move along.
    Returns the batch and the (global row, text) pairs that entered.
    """
    injection_round = plan.round_of(step) if plan is not None else None
    if plan is None or injection_round is None:
        return batch, []
    parts = (batch.input_ids, batch.label_mask, batch.attention_mask)
    input_ids, label_mask, attention_mask = (None if part is None else part.clone() for part in parts)
    assert input_ids is not None
    entered: list[tuple[int, Text]] = []
    length = input_ids.shape[1]
    for position, row in enumerate(batch.rows.tolist()):
        for_row = plan.texts_of_row(injection_round, row, global_batch_size)
        if for_row:
            texts = torch.tensor([token for text in for_row for token in text.input_ids], dtype=torch.int64)
            counts = None if label_mask is None else label_mask[position]
            place = _entrance(input_ids[position], counts, len(texts), plan.boundary)
            ones = torch.ones_like(texts, dtype=torch.bool)
            for part, new in ((input_ids, texts), (label_mask, ones), (attention_mask, ones)):
                if part is not None:
                    part[position] = torch.cat((part[position, :place], new, part[position, place:]))[:length]
            entered.extend((row, text) for text in for_row)
    return replace(batch, input_ids=input_ids, label_mask=label_mask, attention_mask=attention_mask), entered
