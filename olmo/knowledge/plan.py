"""The plan of a run's injections: which texts are injected in which round, at which step, and where in a row."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from ..exceptions import listed


@dataclass(frozen=True)
class Text:
    """One wording of one entry, tokenized, EOS at its end."""

    entry: str  # "{setting}/{number of the entry in its file}", or "map/{place in its round}" of a published map
    input_ids: tuple[int, ...]
    wording: str | None = field(default=None, compare=False)  # the text of the ids without EOS, if known


Rounds = tuple[tuple[Text, ...], ...]


def is_token(value: Any) -> bool:
    """Whether a value from a file is a token id."""
    return type(value) is int and 0 <= value < 2**31


def is_text(value: Any) -> bool:
    """Whether a value from a file is a text that a tokenizer can encode: without halves of surrogate pairs."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


@dataclass(frozen=True)
class Plan:
    """What is injected, when and where: `rounds[r - 1]` holds the texts of round r (1-based).

    Round 1 is injected at `start_step`, the next one every `interval` steps, and after the last round the first again.
    With `steps_passed` instead, round r is injected once, `steps_passed[r - 1]` steps after `start_step`.
    """

    rounds: Rounds
    interval: int | None = None
    start_step: int | None = None  # 1-based; default: `interval`, or 1 with `steps_passed`
    steps_passed: tuple[int, ...] | None = None
    boundary: int | None = None  # texts are inserted after the first such token (EOS) of a row; None: at the front

    @property
    def first_steps(self) -> tuple[int, ...]:
        """The (first) step of each round."""
        if self.steps_passed is not None:
            return tuple((self.start_step or 1) + passed for passed in self.steps_passed)
        assert self.interval is not None
        start = self.start_step or self.interval
        return tuple(start + self.interval * number for number in range(len(self.rounds)))

    def round_of(self, step: int) -> int | None:
        """The round (1-based) of a step (1-based), None if nothing is injected."""
        steps = self.first_steps
        if self.interval is not None and step >= steps[0]:
            step = steps[0] + (step - steps[0]) % (self.interval * len(steps))
        return steps.index(step) + 1 if step in steps else None

    def rounds_within(self, first: int, last: int) -> int:
        """How many different rounds are injected in the steps `first` to `last`, both included."""
        if self.interval is None:
            return sum(first <= step <= last for step in self.first_steps)
        start = self.first_steps[0]
        due = (last - start) // self.interval - (max(first, start) - 1 - start) // self.interval
        return max(0, min(due, len(self.rounds)))

    def texts_of_row(self, injection_round: int, row: int, global_batch_size: int) -> tuple[Text, ...]:
        """The texts for a global row, in order: the first (n mod rows) rows get one more."""
        texts = self.rounds[injection_round - 1]
        each, more = divmod(len(texts), global_batch_size)
        start = row * each + min(row, more)
        return texts[start : start + each + (row < more)]

    def texts_of_batch(self, injection_round: int, global_batch_size: int) -> list[tuple[int, Text]]:
        """All texts of a round with their global rows, in the order of the rows."""
        return [
            (row, text)
            for row in range(min(len(self.rounds[injection_round - 1]), global_batch_size))
            for text in self.texts_of_row(injection_round, row, global_batch_size)
        ]

    def check(self, global_batch_size: int, sequence_length: int) -> None:
        """Raise ValueError for an empty round, or for all rows that overflow."""
        found: list[str] = []
        for number, texts in enumerate(self.rounds, start=1):
            if not texts:
                raise ValueError(f"injection round {number} holds no text")
            for row in range(min(len(texts), global_batch_size)):
                chosen = self.texts_of_row(number, row, global_batch_size)
                length = sum(len(text.input_ids) for text in chosen)
                if length > sequence_length:
                    names = ", ".join(text.entry for text in chosen)
                    found.append(f"injection round {number}, row {row}: {length} tokens ({names})")
        if found:
            raise ValueError(
                f"{listed(found)} exceed the sequence length {sequence_length}; use shorter texts, fewer entries, a "
                "larger batch or longer sequences"
            )

    def repeated(self) -> list[str]:
        """Texts that are injected under two names, or twice in one round."""
        first: dict[tuple[int, ...], str] = {}
        found: list[str] = []
        for number, texts in enumerate(self.rounds, start=1):
            of_round: set[tuple[int, ...]] = set()
            for text in texts:
                name = first.setdefault(text.input_ids, text.entry)
                if name != text.entry or text.input_ids in of_round:
                    found.append(f"round {number}: {text.entry} is the text of {name}")
                of_round.add(text.input_ids)
        return found
