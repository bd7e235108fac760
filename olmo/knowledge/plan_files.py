"""Files of injection plans: our own format, as JSON or safetensors; published pickles are read by `published_map`.

As JSON, for people to read and write:

    {"format": "knowledge-entropy injection plan", "version": 1,
     "tokenizer": "tokenizers/NAME.json",  // which tokenizer made the tokens; null: unknown
     "eos_token_id": 50279,                // the last token of every text
     "steps_passed": null,                 // or a number a round: see `Plan`
     "rounds": [[{"entry": "paraphrase/0", "input_ids": [510, ..., 50279], "text": "..."}, ...], ...]}

`input_ids` are injected. `text` may be missing; if the run has a tokenizer, its tokens must be the same.
As safetensors: the same object as metadata `injection_plan`, but each text is only its entry's name; the tokens of all
texts are in order in `input_ids` (tokens,) int32, their lengths in `lengths` (texts,) int32.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ..exceptions import ConfigurationError
from ..files.atomic import atomic_path
from ..files.paths import read_json
from ..files.tensors import write_safetensors
from .plan import Rounds, Text, is_text, is_token
from .published_map import read_published_map

FORMAT, VERSION = "knowledge-entropy injection plan", 1
SUFFIXES = (".json", ".safetensors")
_KEYS = ("format", "version", "tokenizer", "eos_token_id", "steps_passed", "rounds")


@dataclass(frozen=True)
class PlanFile:
    """The part of a plan that a file holds; the configuration has the rest."""

    rounds: Rounds
    steps_passed: tuple[int, ...] | None = None  # as in Plan
    tokenizer: str | None = None
    eos_token_id: int | None = None


def read_plan(path: str | Path) -> PlanFile:
    """Read a plan (`inject_indices_map`): .json and .safetensors in our own format, anything else a published pickle.

    Raises FileNotFoundError or ValueError that name the file and the place in it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such injection plan (inject_indices_map)")
    if path.suffix == ".json":
        return _plan_of(read_json(path), path)
    return _read_safetensors(path) if path.suffix == ".safetensors" else PlanFile(*read_published_map(path))


def write_plan(path: Path, plan: PlanFile) -> None:
    """Write a plan atomically, to a file that ends in one of SUFFIXES; the format needs `eos_token_id`."""
    if path.suffix not in SUFFIXES:
        raise ConfigurationError(f"{path}: the name of a plan must end in {' or '.join(SUFFIXES)}")
    header = {
        "format": FORMAT,
        "version": VERSION,
        "tokenizer": plan.tokenizer,
        "eos_token_id": plan.eos_token_id,
        "steps_passed": plan.steps_passed,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as partial:
        if path.suffix == ".json":
            partial.write_text(_as_json(header, plan.rounds), encoding="utf-8")
        else:
            texts = [text.input_ids for round_texts in plan.rounds for text in round_texts]
            tensors = {
                "input_ids": torch.tensor([token for ids in texts for token in ids], dtype=torch.int32),
                "lengths": torch.tensor([len(ids) for ids in texts], dtype=torch.int32),
            }
            names = [[text.entry for text in round_texts] for round_texts in plan.rounds]
            write_safetensors(
                partial, tensors, {"injection_plan": json.dumps({**header, "rounds": names}), "format": "pt"}
            )


def _as_json(header: dict[str, Any], rounds: Rounds) -> str:
    """One line for each key and one for each text."""
    dump = partial(json.dumps, ensure_ascii=False)

    def line(text: Text) -> str:
        wording = {} if text.wording is None else {"text": text.wording}
        return dump({"entry": text.entry} | wording | {"input_ids": text.input_ids})

    written = ",\n".join("    [\n      " + ",\n      ".join(map(line, texts)) + "\n    ]" for texts in rounds)
    keys = "".join(f"  {dump(key)}: {dump(value)},\n" for key, value in header.items())
    return f'{{\n{keys}  "rounds": [\n{written}\n  ]\n}}\n'


def _read_safetensors(path: Path) -> PlanFile:
    try:
        with safe_open(path, "pt") as file:
            raw = json.loads((file.metadata() or {}).get("injection_plan", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # safetensors raises its own error type for damaged files
        raise ValueError(f"{path}: damaged or not a safetensors file: {error}") from error
    _check_header(raw, path)
    fine = tensors.keys() == {"input_ids", "lengths"} and all(
        t.ndim == 1 and t.dtype == torch.int32 for t in tensors.values()
    )
    names = raw["rounds"] if isinstance(raw["rounds"], list) and all(isinstance(r, list) for r in raw["rounds"]) else []
    lengths = tensors["lengths"].tolist() if fine else []
    if not fine or len(lengths) != sum(map(len, names)) or min(lengths, default=0) < 0:
        raise ValueError(f"{path}: expected tensors input_ids and lengths (int32), a length for each text of 'rounds'")
    if sum(lengths) != len(tensors["input_ids"]):
        raise ValueError(f"{path}: {len(tensors['input_ids'])} tokens, but the lengths add up to {sum(lengths)}")
    tokens = iter(tensors["input_ids"].split(lengths))
    rounds = [[{"entry": name, "input_ids": next(tokens).tolist()} for name in texts] for texts in names]
    return _plan_of({**raw, "rounds": rounds}, path)


def _check_header(raw: Any, path: Path) -> None:
    """Raise ValueError if this is not a plan of this version with all its keys and no others."""
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise ValueError(f"{path}: not an injection plan; its 'format' is not {FORMAT!r}")
    if raw.get("version") != VERSION:
        raise ValueError(f"{path}: version {raw.get('version')!r} of the format, this program reads version {VERSION}")
    for key in (*_KEYS, *raw):
        if key not in raw or key not in _KEYS:
            raise ValueError(f"{path}: '{key}' is missing" if key not in raw else f"{path}: unknown key '{key}'")


def _plan_of(raw: Any, path: Path) -> PlanFile:
    """A plan from the object of our format; every part is checked."""
    _check_header(raw, path)
    tokenizer, eos, passed, rounds = (raw[key] for key in ("tokenizer", "eos_token_id", "steps_passed", "rounds"))
    if tokenizer is not None and not isinstance(tokenizer, str):
        raise ValueError(f"{path}: 'tokenizer' must be a name or null")
    if not is_token(eos):
        raise ValueError(f"{path}: 'eos_token_id' must be a token id")
    if not isinstance(rounds, list) or not rounds or not all(isinstance(texts, list) for texts in rounds):
        raise ValueError(f"{path}: 'rounds' must be a list of lists of texts, at least one")
    if passed is not None:
        fine = isinstance(passed, list) and all(type(number) is int and number >= 0 for number in passed)
        if not fine or len(passed) != len(rounds) or sorted(set(passed)) != passed:
            raise ValueError(f"{path}: 'steps_passed' must be null or increasing numbers from 0, one for each round")
    return PlanFile(
        tuple(
            tuple(_text(text, eos, f"{path}: round {number}, text {place}") for place, text in enumerate(texts))
            for number, texts in enumerate(rounds, start=1)
        ),
        None if passed is None else tuple(passed),
        tokenizer,
        eos,
    )


def _text(raw: Any, eos_token_id: int, where: str) -> Text:
    if not isinstance(raw, dict) or not raw.keys() <= {"entry", "text", "input_ids"}:
        raise ValueError(f"{where}: expected 'entry', 'input_ids' and optionally 'text'")
    entry, wording, ids = raw.get("entry"), raw.get("text"), raw.get("input_ids")
    if not isinstance(entry, str) or not entry:
        raise ValueError(f"{where}: 'entry' must be a name")
    if wording is not None and not is_text(wording):
        raise ValueError(f"{where}: 'text' must be a string of characters")
    if not isinstance(ids, list) or not all(map(is_token, ids)):
        raise ValueError(f"{where} ({entry}): 'input_ids' must be a list of token ids")
    if not ids or ids[-1] != eos_token_id:
        raise ValueError(f"{where} ({entry}): 'input_ids' must end with eos_token_id {eos_token_id}")
    return Text(entry, tuple(ids), wording)
