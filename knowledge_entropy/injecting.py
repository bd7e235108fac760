"""Injection of fictional knowledge into a training loop of one's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from analysis.given import GivenTokenizer
from olmo.data.loader import Batch
from olmo.knowledge.entries import Entry, load_entries
from olmo.knowledge.injection import inject
from olmo.knowledge.plan import Plan
from olmo.knowledge.plan_files import read_plan
from olmo.knowledge.rounds import build_rounds
from olmo.tokenizer import document_end, encode, load_tokenizer

Entries = str | Path | Sequence[Entry]
_POSITIONS = ("front", "document")
IGNORED = -100  # the label of a token that does not count, as transformers has it


@dataclass(frozen=True)
class KnowledgePlan:
    """Which texts are injected at which optimizer step (1-based), and how they enter a batch. `from_entries` and
    `from_file` make it."""

    plan: Plan

    @classmethod
    def from_entries(
        cls,
        *,
        tokenizer: Any,
        paraphrase: Entries | None = None,
        duplicate: Entries | None = None,
        once: Entries | None = None,
        rounds: int = 10,
        interval: int = 100,
        start_step: int | None = None,
        repeat: bool = True,
        once_rounds: int | None = None,
        position: str = "front",
        eos_token_id: int | None = None,
    ) -> KnowledgePlan:
        """A plan of entries: files of fictional knowledge, or lists of Entry; the arguments are those of `injection` in
        a configuration (docs/config.md).

        Args:
            tokenizer: a fast tokenizer of transformers, a tokenizers.Tokenizer, or a name or path of one.
            paraphrase: injected in another wording each round.
            duplicate: injected in the same wording each round.
            once: each injected in one of the rounds.
            rounds: number of rounds.
            interval: optimizer steps between rounds.
            start_step: step of the first round; default: `interval`.
            repeat: begin again with the first round after the last one.
            once_rounds: rounds among which the entries of once are distributed, the first ones; default: all.
            position: where a row receives its text: at its "front", or after its first "document".
            eos_token_id: of the token at the end of each text; default: the tokenizer's.

        Raises:
            ValueError: for what cannot be injected.
            OSError: for a file that cannot be read.
        """
        given = {"paraphrase": paraphrase, "duplicate": duplicate, "once": once}
        settings = {name: entries_of(entries) for name, entries in given.items() if entries is not None}
        if not settings:
            raise ValueError("KnowledgePlan: no entries; give paraphrase, duplicate or once")
        _check_numbers(interval=interval, start_step=start_step, once_rounds=once_rounds)
        named = tokenizer_of(tokenizer)
        eos = named.eos if eos_token_id is None else eos_token_id
        if eos is None:
            raise ValueError(f"eos_token_id: {named} has no token for the end of a document; give its id")
        made = build_rounds(settings, rounds, partial(encode, named.tokenizer), eos, once_rounds)
        boundary = _boundary(position, eos)
        if repeat:
            return cls(Plan(made, interval, start_step, None, boundary))
        passed = tuple(interval * number for number in range(len(made)))
        return cls(Plan(made, None, start_step or interval, passed, boundary))

    @classmethod
    def from_file(
        cls, path: str | Path, *, interval: int | None = None, start_step: int | None = None, position: str = "front"
    ) -> KnowledgePlan:
        """A plan of `scripts.injection_plan` (.json, .safetensors), or a published injection map, which is read without
        running code.

        Args:
            path: of the file.
            interval: optimizer steps between the rounds of a file that has no steps itself.
            start_step: of the first round.
            position: as of `from_entries`.

        Raises:
            ValueError: that names the file, where it is no plan.
            OSError: where it cannot be read.
        """
        _check_numbers(interval=interval, start_step=start_step)
        stored = read_plan(path)
        if stored.steps_passed is None and interval is None:
            raise ValueError(f"{path}: has no steps; give interval, the number of steps between its rounds")
        if stored.steps_passed is not None and interval is not None:
            raise ValueError(f"{path}: has the steps of its rounds; leave interval out")
        if empty := [number for number, texts in enumerate(stored.rounds, 1) if not texts]:
            raise ValueError(f"{path}: round {empty[0]} holds no text")
        ends = {text.input_ids[-1] for texts in stored.rounds for text in texts}
        boundary = _boundary(position, max(ends))
        if boundary is not None and len(ends) > 1:
            raise ValueError(f"{path}: its texts end with different tokens, none is the end of a document; use front")
        return cls(Plan(stored.rounds, interval, start_step, stored.steps_passed, boundary))

    @property
    def steps(self) -> tuple[int, ...]:
        """The first step of each round; `is_due` knows later ones of rounds that repeat."""
        return self.plan.first_steps

    def is_due(self, step: int) -> bool:
        """Whether texts are injected at an optimizer step (1-based)."""
        return self.plan.round_of(step) is not None

    def texts(self, step: int, global_batch_size: int) -> list[tuple[int, str]]:
        """(row of the global batch, `setting/number` of the entry) of each text of a step, in the order of the rows."""
        number = self.plan.round_of(step)
        found = [] if number is None else self.plan.texts_of_batch(number, global_batch_size)
        return [(row, text.entry) for row, text in found]

    def inject(
        self,
        input_ids: Tensor,
        step: int,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        rows: Sequence[int] | None = None,
        global_batch_size: int | None = None,
    ) -> dict[str, Tensor]:
        """The batch of an optimizer step with its texts: `input_ids`, and `labels` and `attention_mask` if given.

        Each text is inserted at its place in its row and counts in the loss; labels and mask move with the row's
        tokens, and its end is cut off. Nothing is changed in place; a batch without texts is returned as it is.

        Args:
            input_ids: (B, T), the global batch.
            step: from 1.
            labels: (B, T), as transformers' models take them: the token's own id, -100 where it does not count.
            attention_mask: (B, T), above 0 for tokens.
            rows: of a process that holds (n, T): only these n rows of the global batch.
            global_batch_size: B, with `rows`.

        Raises:
            ValueError: for tensors of another form, and for texts that exceed a row.
        """
        size = self._checked(input_ids, step, rows, global_batch_size)
        given = {"input_ids": input_ids, "labels": labels, "attention_mask": attention_mask}
        parts = {name: part for name, part in given.items() if part is not None}
        for name, part in parts.items():
            if part.shape != input_ids.shape:
                raise ValueError(f"{name}: shape {tuple(part.shape)}, that of input_ids is {tuple(input_ids.shape)}")
        counts = None if labels is None else labels != IGNORED
        if labels is not None and (labels != input_ids)[counts].any():
            raise ValueError("labels: neither the token's own id nor -100; transformers' models shift them, do not")
        if not self.is_due(step):
            return parts
        self.plan.check(size, input_ids.shape[1])
        places = np.arange(size) if rows is None else np.asarray(rows)
        label_mask, mask = (None if part is None else part.cpu() for part in (counts, attention_mask))
        batch = Batch(input_ids.cpu(), places.astype(np.uint32), places, label_mask, mask)
        injected = as_tensors(inject(batch, step, self.plan, size)[0])
        return {name: injected[name].to(part) for name, part in parts.items()}

    def _checked(self, input_ids: Tensor, step: int, rows: Sequence[int] | None, size: int | None) -> int:
        """The size of the global batch. Raises ValueError for arguments that do not agree."""
        if input_ids.ndim != 2 or input_ids.is_floating_point() or not len(input_ids):
            raise ValueError(
                f"input_ids: shape {tuple(input_ids.shape)} of {input_ids.dtype}; expected token ids (B, T)"
            )
        if step < 1:
            raise ValueError(f"step: {step}; optimizer steps count from 1")
        if (rows is None) != (size is None):
            raise ValueError("rows and global_batch_size: give both, or neither for a global batch")
        if rows is None or size is None:
            return len(input_ids)
        if len(rows) != len(input_ids) or len(set(rows)) != len(rows) or not all(0 <= row < size for row in rows):
            raise ValueError(f"rows: {list(rows)}; expected {len(input_ids)} different ones below {size}")
        return size


def as_tensors(batch: Batch) -> dict[str, Tensor]:
    """A batch as transformers' models take it: int64, labels -100 where a token does not count."""
    ids, found = batch.input_ids, {"input_ids": batch.input_ids}
    found["labels"] = ids.clone() if batch.label_mask is None else torch.where(batch.label_mask, ids, IGNORED)
    if batch.attention_mask is not None:
        found["attention_mask"] = batch.attention_mask.long()
    return found


def entries_of(entries: Entries) -> list[Entry]:
    """Entries of a file, or those given. Raises ValueError where there are none."""
    found = load_entries(entries) if isinstance(entries, (str, Path)) else list(entries)
    if not found or not all(isinstance(entry, Entry) for entry in found):
        raise ValueError("entries: expected a file of fictional knowledge, or a list of olmo.knowledge.entries.Entry")
    return found


def tokenizer_of(given: Any) -> GivenTokenizer:
    """A tokenizer that a program gives, as an object, or as a name or path."""
    if not isinstance(given, (str, Path)):
        return GivenTokenizer.of(given)
    path = Path(given)
    folder = path if path.is_dir() else path.parent
    return GivenTokenizer(str(given), load_tokenizer(str(given)), document_end(folder) if path.exists() else None)


def _boundary(position: str, eos: int) -> int | None:
    if position not in _POSITIONS:
        raise ValueError(f"position: {position!r}; expected one of {', '.join(_POSITIONS)}")
    return eos if position == "document" else None


def _check_numbers(**numbers: int | None) -> None:
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise ValueError(f"{name}: {number} must be at least 1")
