"""The plan of a run's injections: which texts are injected in which round, at which step, and where in a row."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..exceptions import ConfigurationError
from .entries import Entry

Encode = Callable[[list[str]], list[list[int]]]  # texts -> token ids of each, without special tokens


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
        """Raise ValueError for an empty round or a row that overflows."""
        for number, texts in enumerate(self.rounds, start=1):
            if not texts:
                raise ValueError(f"injection round {number} holds no text")
            for row in range(min(len(texts), global_batch_size)):
                chosen = self.texts_of_row(number, row, global_batch_size)
                length = sum(len(text.input_ids) for text in chosen)
                if length > sequence_length:
                    names = ", ".join(text.entry for text in chosen)
                    raise ValueError(
                        f"injection round {number}, row {row}: {length} tokens ({names}) exceed the sequence length "
                        f"{sequence_length}; use shorter texts, fewer entries, a larger batch or longer sequences"
                    )


def build_rounds(settings: Mapping[str, Sequence[Entry]], rounds: int, encode: Encode, eos_token_id: int) -> Rounds:
    """Rounds of `paraphrase`, then `duplicate`, then `once` entries, each in the order of its file.

    Round r (1-based) holds of a paraphrase entry its `train_context` (r = 1) or `paraphrases[r - 2]`, of a
    duplicate entry always its `train_context`; the once entries are distributed evenly, round by round.
    """
    if rounds < 1:
        raise ConfigurationError(f"injection.rounds: {rounds} must be at least 1")
    wordings: list[list[tuple[str, str]]] = [[] for _ in range(rounds)]
    for number, entry in enumerate(settings.get("paraphrase", ())):
        texts = (entry.train_context, *entry.paraphrases)
        if len(texts) < rounds:
            raise ConfigurationError(
                f"injection.rounds: paraphrase entry {number} has {len(texts) - 1} paraphrases, "
                f"{rounds} rounds need {rounds - 1}"
            )
        for position in range(rounds):
            wordings[position].append((f"paraphrase/{number}", texts[position]))
    for number, entry in enumerate(settings.get("duplicate", ())):
        for position in range(rounds):
            wordings[position].append((f"duplicate/{number}", entry.train_context))
    once = settings.get("once", ())
    if len(once) % rounds:
        raise ConfigurationError(f"injection.rounds: {len(once)} once entries do not divide into {rounds} rounds")
    for number, entry in enumerate(once):
        wordings[number * rounds // len(once)].append((f"once/{number}", entry.train_context))
    return tuple(
        tuple(
            Text(name, (*ids, eos_token_id), wording)
            for (name, wording), ids in zip(texts, encode([wording for _, wording in texts]))
        )
        for texts in wordings
    )


def with_names(rounds: Rounds, settings: Mapping[str, Sequence[Entry]], encode: Encode, eos_token_id: int) -> Rounds:
    """The texts of a published map ("map/{place}"), renamed to the entries of which they are a wording.

    A text is recognized by its tokens, EOS included; a text of two entries gets the name of the first, a text of none
    keeps its name.
    """
    known: dict[tuple[int, ...], tuple[str, str]] = {}
    for setting, entries in settings.items():
        wordings = [
            (f"{setting}/{number}", wording)
            for number, entry in enumerate(entries)
            for wording in (entry.train_context, *entry.paraphrases)
        ]
        for named, ids in zip(wordings, encode([wording for _, wording in wordings])):
            known.setdefault((*ids, eos_token_id), named)

    def renamed(text: Text) -> Text:
        if not text.entry.startswith("map/") or text.input_ids not in known:
            return text
        name, wording = known[text.input_ids]
        return Text(name, text.input_ids, wording)

    return tuple(tuple(map(renamed, texts)) for texts in rounds)
