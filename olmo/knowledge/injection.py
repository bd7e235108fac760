"""Injection: which text enters in which round (the plan), and one pure function (batch, step) -> batch.

Method section 3. Text k of a round goes to the front of row k of the *global* batch; a rank only needs to know
which global rows it holds, so any number of ranks and any micro-batch size inject the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from ..config import TrainConfig
from ..data.loader import Batch
from ..exceptions import ConfigurationError
from .entries import Entry, load_entries, load_injection_map


@dataclass(frozen=True)
class Text:
    """One wording of one entry, tokenized, EOS at its end."""

    entry: str  # "{setting}/{number of the entry}", or "map/{place}" from a published injection map
    input_ids: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """What is injected: `rounds[r - 1]` holds the texts of round r, every `interval` steps the next round."""

    rounds: tuple[tuple[Text, ...], ...]
    interval: int

    def round_of(self, step: int) -> int | None:
        """The round (1-based) of a step (1-based), None where nothing is injected."""
        if step < 1 or step % self.interval:
            return None
        return (step // self.interval - 1) % len(self.rounds) + 1

    def texts_of_row(self, injection_round: int, row: int, global_batch_size: int) -> tuple[Text, ...]:
        """The texts at the front of a global row: in order, the first (n mod rows) rows get one more."""
        texts = self.rounds[injection_round - 1]
        each, more = divmod(len(texts), global_batch_size)
        start = row * each + min(row, more)
        return texts[start : start + each + (row < more)]

    def check(self, global_batch_size: int, sequence_length: int) -> None:
        """Raise ValueError, before any training, for an empty round or a row that overflows."""
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


def build_plan(
    settings: Mapping[str, Sequence[Entry]],
    rounds: int,
    interval: int,
    encode: Callable[[list[str]], list[list[int]]],
    eos_token_id: int,
) -> Plan:
    """Rounds of `paraphrase`, then `duplicate`, then `once` entries, each in the order of its file.

    Round r (1-based) holds of a paraphrase entry its `train_context` (r = 1) or `paraphrases[r - 2]`, of a
    duplicate entry always its `train_context`; the once entries are dealt out evenly, round by round.
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
    return Plan(
        tuple(
            tuple(
                Text(name, (*ids, eos_token_id)) for (name, _), ids in zip(texts, encode([text for _, text in texts]))
            )
            for texts in wordings
        ),
        interval,
    )


def plan_from_config(config: TrainConfig, encode: Callable[[list[str]], list[list[int]]]) -> Plan | None:
    """The plan of `inject_indices_map` or `injection`, checked against batch and sequence; None without either."""
    plan = None
    interval = config.inject_interval or 0
    if config.inject_indices_map:
        rounds = load_injection_map(config.inject_indices_map)
        plan = Plan(
            tuple(
                tuple(Text(f"map/{place}", tuple(ids)) for place, ids in enumerate(texts)) for texts in rounds.values()
            ),
            interval,
        )
    elif config.injection and config.injection.rounds:
        chosen = config.injection
        files = {"paraphrase": chosen.paraphrase, "duplicate": chosen.duplicate, "once": chosen.once}
        settings = {setting: load_entries(path) for setting, path in files.items() if path}
        plan = build_plan(settings, chosen.rounds, interval, encode, config.model.eos_token_id)
    if plan is not None:
        plan.check(config.global_train_batch_size, config.model.max_sequence_length)
        rows = config.model.embedding_size or config.model.vocab_size
        largest = max(token for texts in plan.rounds for text in texts for token in text.input_ids)
        if largest >= rows:
            raise ConfigurationError(
                f"model.embedding_size: token {largest} is to be injected, the model knows {rows}; "
                "tokenizer.identifier, model.eos_token_id or inject_indices_map belong to another model"
            )
    return plan


def inject(batch: Batch, step: int, plan: Plan | None, global_batch_size: int) -> tuple[Batch, list[tuple[int, Text]]]:
    """Put the texts of this step's round at the front of their rows: row = concat(texts, row)[:T].

    step: 1-based number of the optimizer step that uses the batch, which is never changed in place.
    Every token of a text counts in the loss and is attended to, whatever the masks say of the row.
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
            front = torch.tensor([token for text in for_row for token in text.input_ids], dtype=torch.int64)
            input_ids[position] = torch.cat((front, input_ids[position]))[:length]
            for mask in (label_mask, attention_mask):
                if mask is not None:
                    mask[position] = torch.cat((front.new_ones(len(front), dtype=torch.bool), mask[position]))[:length]
            entered.extend((row, text) for text in for_row)
    return replace(batch, input_ids=input_ids, label_mask=label_mask, attention_mask=attention_mask), entered
