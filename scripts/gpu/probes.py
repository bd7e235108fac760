"""1,950 probes of OLMo-1B's shape under autocast to bfloat16, packed in one pass and by one padded evaluator at a time.

The tokenizer is learnt from the probes themselves, as no other is at hand without a network; its texts are shorter than
those of OLMo's tokenizer.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator

import torch

from olmo.knowledge.entries import KINDS
from scripts.benchmarks.probes import contest
from scripts.benchmarks.rounds import alternate
from scripts.gpu.models import random_model, shape
from scripts.gpu.place import Place
from scripts.gpu.rows import Row
from scripts.prepare.demo_text import train_tokenizer
from scripts.prepare.fictional_knowledge import make_entries

APART = 0.02  # of a diluted loss, in bfloat16


def measure(place: Place) -> Iterator[Row]:
    """Seconds of both ways, their ratio, and how far their losses differ."""
    entries = make_entries(13 if place.small else 130, paraphrases=0)
    texts = [text for entry in entries for kind in KINDS.values() for text in entry[f"{kind}_input"]]
    tokenizer = train_tokenizer(texts, vocab_size=512 if place.small else 8192)
    tokenizer.save(str(place.folder / "tokenizer.json"))
    config = shape(place, "OLMo-1B", vocab_size=512, embedding_size=512, max_sequence_length=512)
    model = random_model(place, config, torch.float32)
    both = contest(place.folder, entries, str(place.folder / "tokenizer.json"), model, "amp_bf16", place.device)
    alternate(1, both.works)  # warm up
    ours, theirs = alternate(3, both.works).values()
    own, other = (tuple(seconds for seconds, _ in results) for results in (ours, theirs))
    note = f"{sum(map(len, both.lengths)):,} probes, {sum(map(sum, both.lengths)):,} tokens"
    ratios = tuple(theirs / ours for ours, theirs in zip(own, other))
    padded = f"padded tokens / all tokens: {both.padded_share:.2f} x"
    yield Row("one at a time / packed", statistics.median(ratios), "x", place.bar(1), samples=ratios, note=padded)
    yield Row("packed", statistics.median(own), "s", samples=own, note=note)
    yield Row("one at a time", statistics.median(other), "s", samples=other, note=note)
    apart = both.apart(ours, theirs)
    yield Row("diluted loss, largest difference", apart, "", at_most=APART, samples=(apart,))
