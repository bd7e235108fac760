"""Fictional knowledge: entries and their probes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ..exceptions import listed
from ..files.paths import read_json
from ..tokenizer import encode
from .plan import is_text

# The kind of a probe -> the prefix of its two fields in the published JSON.
KINDS = {"memorization": "mem", "semantic": "gen", "composition": "hard_gen"}
SETTINGS = ("paraphrase", "once", "duplicate")


@dataclass(frozen=True)
class Entry:
    """One paragraph of fictional knowledge with its other wordings and its probes."""

    train_context: str
    paraphrases: tuple[str, ...]
    probes: dict[str, tuple[tuple[str, str], ...]]  # kind -> (input, target) pairs


@dataclass(frozen=True)
class Probe:
    """A cloze task: the model reads `input_ids[:target_start]`; the rest is the target span to predict."""

    setting: str
    kind: str
    entry: int
    index: int
    input_ids: tuple[int, ...]
    target_start: int


def load_entries(path: str | Path) -> list[Entry]:
    """Read a JSON list of entries (formats section 4); of FILE#A-B only entries A to B, counted from 0.

    Raises ValueError, naming all wrong entries and fields.
    """
    part = re.fullmatch(r"(.+)#(\d+)-(\d+)", str(path))
    file, first, last = (Path(part[1]), int(part[2]), int(part[3])) if part else (Path(path), 0, None)
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file of fictional knowledge")
    raw = read_json(file)
    if not isinstance(raw, list) or not raw:
        raise ValueError(f"{file}: expected a list of entries, at least one")
    if last is not None and not first <= last < len(raw):
        raise ValueError(f"{path}: the file has entries 0 to {len(raw) - 1}")
    problems: list[str] = []
    numbers = range(first, len(raw) if last is None else last + 1)
    entries = [_entry(raw[number], f"entry {number}", problems) for number in numbers]
    if problems:
        raise ValueError(f"{file}: {listed(problems)}")
    return entries


def _entry(raw: Any, where: str, problems: list[str]) -> Entry:
    """An entry from a file; what is wrong with it is appended to `problems`."""

    def texts(name: str) -> tuple[str, ...]:
        value = raw.get(name) if isinstance(raw, dict) else None
        if not isinstance(value, list) or not all(is_text(text) and text.strip() for text in value):
            problems.append(f"{where}: '{name}' must be a list of strings, none empty or with lone surrogates")
            return ()
        return tuple(value)

    context: Any = raw.get("train_context") if isinstance(raw, dict) else None
    if not is_text(context) or not context.strip():
        problems.append(f"{where}: 'train_context' must be a string, not empty and without lone surrogates")
    probes = {}
    for kind, prefix in KINDS.items():
        before = len(problems)
        inputs, targets = texts(f"{prefix}_input"), texts(f"{prefix}_target")
        if len(inputs) != len(targets) and len(problems) == before:
            problems.append(f"{where}: {len(inputs)} '{prefix}_input' but {len(targets)} '{prefix}_target'")
        probes[kind] = tuple(zip(inputs, targets))
    return Entry(context, texts("paraphrases"), probes)


def make_probes(
    entries: Sequence[Entry], setting: str, tokenizer: Tokenizer, kinds: Sequence[str] = tuple(KINDS)
) -> list[Probe]:
    """Tokenized probes in file order: entry by entry, kind by kind.

    A probe is f"{input} {target}"; its target span is every token after the tokens of `input` alone.
    """
    wanted = [
        (kind, number, index, prompt, f"{prompt} {target}")
        for number, entry in enumerate(entries)
        for kind in kinds
        for index, (prompt, target) in enumerate(entry.probes.get(kind, ()))
    ]
    prompts = encode(tokenizer, [w[3] for w in wanted])
    sentences = encode(tokenizer, [w[4] for w in wanted])
    probes = []
    for (kind, number, index, _, sentence), prompt_ids, ids in zip(wanted, prompts, sentences):
        if not 0 < len(prompt_ids) < len(ids):
            raise ValueError(f"{setting} entry {number}, {kind} {index}: no target span in {sentence!r}")
        probes.append(Probe(setting, kind, number, index, tuple(ids), len(prompt_ids)))
    return probes
