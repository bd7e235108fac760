"""The rounds of fictional entries, and the names of texts that a published map holds without names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ..exceptions import ConfigurationError, listed
from .entries import Entry
from .plan import Rounds, Text

Encode = Callable[[list[str]], list[list[int]]]  # texts -> token ids of each, without special tokens


def build_rounds(
    settings: Mapping[str, Sequence[Entry]],
    rounds: int,
    encode: Encode,
    eos_token_id: int,
    once_rounds: int | None = None,
) -> Rounds:
    """Rounds of `paraphrase`, then `duplicate`, then `once` entries, each in the order of its file.

    Round r (1-based) holds of a paraphrase entry its `train_context` (r = 1) or `paraphrases[r - 2]`, of a
    duplicate entry always its `train_context`; the once entries are distributed evenly, round by round, over the first
    `once_rounds` (all).
    """
    if rounds < 1:
        raise ConfigurationError(f"injection.rounds: {rounds} must be at least 1")
    wordings: list[list[tuple[str, str]]] = [[] for _ in range(rounds)]
    few: list[str] = []
    for number, entry in enumerate(settings.get("paraphrase", ())):
        texts = (entry.train_context, *entry.paraphrases)
        if len(texts) < rounds:
            few.append(f"paraphrase entry {number} has {len(texts) - 1} paraphrases")
        for of_round, text in zip(wordings, texts):
            of_round.append((f"paraphrase/{number}", text))
    if few:
        raise ConfigurationError(f"injection.rounds: {listed(few)}, {rounds} rounds need {rounds - 1}")
    for number, entry in enumerate(settings.get("duplicate", ())):
        for position in range(rounds):
            wordings[position].append((f"duplicate/{number}", entry.train_context))
    once, among = settings.get("once", ()), once_rounds or rounds
    if among > rounds:
        raise ConfigurationError(f"injection.once_rounds: {among} is more than injection.rounds, {rounds}")
    if len(once) % among:
        key = "once_rounds" if once_rounds else "rounds"
        raise ConfigurationError(f"injection.{key}: {len(once)} once entries do not divide into {among} rounds")
    for number, entry in enumerate(once):
        wordings[number * among // len(once)].append((f"once/{number}", entry.train_context))
    return tuple(_texts(named, encode, eos_token_id) for named in wordings)


def _texts(named: Sequence[tuple[str, str]], encode: Encode, eos_token_id: int) -> tuple[Text, ...]:
    """The texts of (name, wording) pairs."""
    ids = encode([wording for _, wording in named])
    return tuple(Text(name, (*tokens, eos_token_id), wording) for (name, wording), tokens in zip(named, ids))


def with_names(rounds: Rounds, settings: Mapping[str, Sequence[Entry]], encode: Encode, eos_token_id: int) -> Rounds:
    """The texts of a published map ("map/{place}"), renamed to the entries of which they are a wording.

    A text is recognized by its tokens, EOS included; a text of two entries gets the name of the first, a text of none
    keeps its name.
    """
    named = [
        (f"{setting}/{number}", wording)
        for setting, entries in settings.items()
        for number, entry in enumerate(entries)
        for wording in (entry.train_context, *entry.paraphrases)
    ]
    known: dict[tuple[int, ...], Text] = {}
    for text in _texts(named, encode, eos_token_id):
        known.setdefault(text.input_ids, text)
    return tuple(
        tuple(known.get(text.input_ids, text) if text.entry.startswith("map/") else text for text in texts)
        for texts in rounds
    )
