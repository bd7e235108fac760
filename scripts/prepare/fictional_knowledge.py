"""Invented entries in the published format: facts that no model can know yet, their paraphrases and their probes.

Every entry states the five facts of one small graph (fictional_templates.yaml), one fact a sentence:

* memorization: a sentence of the training text, up to the value of its fact;
* semantic: the same fact and value, asked in a wording that no text of the entry uses;
* compositional: an answer two facts away from what the prompt names, never stated in one sentence.

Names are invented from syllables: they never run out, and no prompt reveals them.
"""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tokenizers import Tokenizer

from olmo.exceptions import ConfigurationError
from olmo.files.atomic import atomic_path
from olmo.tokenizer import encode
from scripts.prepare.fictional_templates import Category, Slot, categories

PROBES = 5
DRAWS = 20  # of which one is taken

# Chosen so that no combination is a word of the published data.
ONSETS = str.split("b br d dr f g gr h j k l m n p r s t tr v z")
VOWELS = "aeiou"
CODAS = ["", "", "l", "n", "r"]
ENDINGS = str.split(
    "dast dek dorn fen gorn hild lema lorn mave mek nisk noor peth rema rull rund sul tisk tull "
    "varn velm vema vesk veth vild vith vone vorn zell zeth"
)

Wording = tuple[int, ...]


@dataclass(frozen=True)
class Limit:
    """The longest text allowed, and how its sentences are counted."""

    most: int
    unit: str
    count: Callable[[list[str]], list[int]]


def count_words(sentences: list[str]) -> list[int]:
    return [len(sentence.split()) for sentence in sentences]


def count_tokens(tokenizer: Tokenizer, sentences: list[str]) -> list[int]:
    """The tokens of each sentence where it begins a text or where a space precedes it, whichever are more."""
    places = (encode(tokenizer, [before + sentence for sentence in sentences]) for before in ("", " "))
    return [max(len(ids) for ids in of_sentence) for of_sentence in zip(*places, strict=True)]


class Name(str):
    """A slot's value in a sentence; `last` is how a person is called once introduced."""

    @property
    def last(self) -> str:
        return self.split()[-1]


class Namer:
    """Invents words and never repeats one."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.used: set[str] = set()

    def word(self) -> str:
        """A new capitalised word; it grows by a syllable while the shorter one is taken."""
        rng = self.rng
        stem = rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(CODAS)
        ending = rng.choice(ENDINGS)
        while stem + ending in self.used:
            stem += rng.choice(ONSETS) + rng.choice(VOWELS)
        self.used.add(stem + ending)
        return (stem + ending).capitalize()

    def fill(self, slot: Slot) -> Name:
        """A value for a slot: invented words in a pattern, or one of the slot's members."""
        if isinstance(slot, str):
            return Name(slot.format(*(self.word() for _ in range(slot.count("{}")))))
        return Name(self.rng.choice(slot))


def key_first(category: Category, wording: Wording) -> bool:
    """Whether every sentence names its key before its value, so that its prefix is a prompt."""
    return all(
        "{" + fact.key in fact.statements[i].split("{" + fact.value)[0]
        for fact, i in zip(category.facts, wording, strict=True)
    )


def choose_wordings(
    category: Category,
    sentences: Sequence[Sequence[str]],
    paraphrases: int,
    limits: Sequence[Limit],
    rng: random.Random,
) -> list[Wording]:
    """One wording for the training text, then `paraphrases` others, all short enough.

    `sentences[f][i]` is statement i of fact f. A wording is one statement for each fact, so different
    wordings are different texts whatever the order of their sentences. Each is the one of several
    drawn that repeats the fewest sentences.
    """
    fitting = list(itertools.product(*(range(len(of_fact)) for of_fact in sentences)))
    shortest = []
    for limit in limits:
        lengths = [limit.count(list(of_fact)) for of_fact in sentences]
        fitting = [w for w in fitting if sum(of_fact[i] for of_fact, i in zip(lengths, w)) <= limit.most]
        shortest.append(f"{sum(map(min, lengths))} {limit.unit}")
    prompting = [wording for wording in fitting if key_first(category, wording)]
    if not prompting or len(fitting) <= paraphrases:
        allowed = " and ".join(f"{limit.most} {limit.unit}" for limit in limits)
        raise ValueError(
            f"an entry of category {category.name!r} needs {1 + paraphrases} wordings and has "
            f"{len(fitting)} of at most {allowed}, {len(prompting)} of them with a prompt for every fact "
            f"(shortest: {', '.join(shortest)})"
        )
    chosen = [rng.choice(prompting)]
    uses: Counter[tuple[int, int]] = Counter()
    while len(chosen) <= paraphrases:
        fitting.remove(chosen[-1])
        uses.update(enumerate(chosen[-1]))
        drawn = rng.sample(fitting, min(DRAWS, len(fitting)))
        chosen.append(min(drawn, key=lambda wording: sum(uses[pair] for pair in enumerate(wording))))
    return chosen


def sentence_order(category: Category, rng: random.Random) -> list[int]:
    """A random order of the facts in which each key has been introduced before it is used."""
    order, named = [0], {category.facts[0].key, category.facts[0].value}
    while len(order) < len(category.facts):
        ready = [i for i, f in enumerate(category.facts) if i not in order and f.key in named]
        order.append(rng.choice(ready))
        named.add(category.facts[order[-1]].value)
    return order


def make_entry(category: Category, namer: Namer, paraphrases: int, limits: Sequence[Limit]) -> dict:
    """One entry of the published format about a new subject of this category.

    Names that make its sentences too long for the limits are drawn again. ValueError if none are found.
    """
    rng, facts = namer.rng, category.facts
    for draw in range(DRAWS):
        values = {slot: namer.fill(content) for slot, content in category.slots.items()}
        sentences = [[s.format(**values) for s in fact.statements] for fact in facts]
        try:
            wordings = choose_wordings(category, sentences, paraphrases, limits, rng)
            break
        except ValueError:
            if draw == DRAWS - 1:
                raise
    texts = [" ".join(sentences[f][wording[f]] for f in sentence_order(category, rng)) for wording in wordings]
    stems = [fact.statements[i].split("{" + fact.value)[0] for fact, i in zip(facts, wordings[0], strict=True)]
    targets = [str(values[fact.value]) for fact in facts]
    hops = rng.sample(category.hops, PROBES)
    return {
        "train_context": texts[0],
        "mem_input": [stem.format(**values).rstrip() for stem in stems],
        "mem_target": targets,
        "gen_input": [rng.choice(fact.prompts).format(**values) for fact in facts],
        "gen_target": list(targets),
        "hard_gen_input": [hop.prompt.format(**values) for hop in hops],
        "hard_gen_target": [str(values[hop.target]) for hop in hops],
        "paraphrases": texts[1:],
    }


def make_entries(
    count: int,
    paraphrases: int = 9,
    seed: int = 0,
    max_words: int = 80,
    max_tokens: int | None = None,
    tokenizer: Tokenizer | None = None,
) -> list[dict]:
    """`count` entries with `paraphrases` further wordings each, no text above `max_words` words.

    With a tokenizer no text is above `max_tokens` of its tokens, either; the end-of-text token that
    an injection adds is not among them. Equal arguments give equal entries, and a larger `count`
    only adds some. Every category is used once in each run of `len(categories())` entries. ValueError
    if the texts cannot be that short or that many.
    """
    limits = [Limit(max_words, "words", count_words)]
    if max_tokens is not None and tokenizer is not None:
        limits.append(Limit(max_tokens, "tokens", partial(count_tokens, tokenizer)))
    rng = random.Random(seed)
    namer = Namer(rng)
    entries: list[dict] = []
    kinds = categories()
    while len(entries) < count:
        for category in rng.sample(kinds, len(kinds))[: count - len(entries)]:
            entries.append(make_entry(category, namer, paraphrases, limits))
    return entries


def write_entries(lists: dict[Path, list[dict]], overwrite: bool = False) -> None:
    """Write each list of entries to its path; no file is replaced before all have been written.

    Raises ConfigurationError where a file has other content, such as the published entries, unless `overwrite`.
    """
    texts = {path: json.dumps(entries, indent=1, ensure_ascii=False) + "\n" for path, entries in lists.items()}
    for path, text in texts.items():
        if not overwrite and path.exists() and path.read_bytes() != text.encode():
            raise ConfigurationError(
                f"{path}: already exists with other entries; name another --output, or --overwrite"
            )
    with ExitStack() as stack:
        for path, text in texts.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(atomic_path(path)).write_text(text, encoding="utf-8")
