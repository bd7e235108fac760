"""Files of plans: our own format, as JSON or safetensors, and the published pickles, read without running code.

Our JSON, which a person can read and write:

    {"format": "knowledge-entropy injection plan", "version": 1,
     "tokenizer": "tokenizers/NAME.json",  // which tokenizer made the tokens; null: unknown
     "eos_token_id": 50279,                // the last token of every text
     "steps_passed": null,                 // or a number a round: see `Plan`
     "rounds": [[{"entry": "paraphrase/0", "input_ids": [510, ..., 50279], "text": "..."}, ...], ...]}

`input_ids` are what is injected. `text` may be missing; where a run has a tokenizer, it must spell the same tokens.
As safetensors: the same object as metadata `injection_plan`, but each text is its entry's name alone; the tokens of all
texts lie in order in `input_ids` (tokens,) int32, their lengths in `lengths` (texts,) int32.
"""

from __future__ import annotations

import io
import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..exceptions import ConfigurationError
from ..files.atomic import atomic_path
from ..files.tensors import save_tensors
from ..files.unpickling import unpickle
from .plan import Rounds, Text

FORMAT, VERSION = "knowledge-entropy injection plan", 1
SUFFIXES = (".json", ".safetensors")
_KEYS = ("format", "version", "tokenizer", "eos_token_id", "steps_passed", "rounds")
_LARGEST = 2**31 - 1  # token id


@dataclass(frozen=True)
class PlanFile:
    """What a file tells of a plan; the rest is the configuration's."""

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
        return _read_json(path)
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)


def write_plan(path: Path, plan: PlanFile) -> None:
    """Write a plan that ends in one of SUFFIXES, whole or not at all; the format needs `eos_token_id`."""
    if path.suffix not in SUFFIXES:
        raise ConfigurationError(f"{path}: a plan is written as {' or '.join(SUFFIXES)}")
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
            save_tensors(partial, tensors, {"injection_plan": json.dumps({**header, "rounds": names}), "format": "pt"})


def _as_json(header: dict[str, Any], rounds: Rounds) -> str:
    """One line a key and one a text."""
    lines = [
        [
            json.dumps(
                {"entry": text.entry}
                | ({} if text.wording is None else {"text": text.wording})
                | {"input_ids": text.input_ids},
                ensure_ascii=False,
            )
            for text in texts
        ]
        for texts in rounds
    ]
    written = ",\n".join("    [\n      " + ",\n      ".join(texts) + "\n    ]" for texts in lines)
    keys = "".join(f"  {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)},\n" for key, value in header.items())
    return f'{{\n{keys}  "rounds": [\n{written}\n  ]\n}}\n'


# --- our own format ----------------------------------------------------------------------------------------------


def _read_json(path: Path) -> PlanFile:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    return _plan_of(raw, path)


def _read_safetensors(path: Path) -> PlanFile:
    try:
        with safe_open(path, "pt") as file:
            raw = json.loads((file.metadata() or {}).get("injection_plan", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # the library has its own errors for damaged files
        raise ValueError(f"{path}: damaged or no safetensors file: {error}") from error
    _check_header(raw, path)
    fine = tensors.keys() == {"input_ids", "lengths"} and all(
        t.ndim == 1 and t.dtype == torch.int32 for t in tensors.values()
    )
    names = raw["rounds"] if isinstance(raw["rounds"], list) and all(isinstance(r, list) for r in raw["rounds"]) else []
    lengths = tensors["lengths"].tolist() if fine else []
    if not fine or len(lengths) != sum(map(len, names)) or min(lengths, default=0) < 0:
        raise ValueError(f"{path}: expected tensors input_ids and lengths (int32), a length for each text of 'rounds'")
    if sum(lengths) != len(tensors["input_ids"]):
        raise ValueError(f"{path}: {len(tensors['input_ids'])} tokens, the lengths of its texts make {sum(lengths)}")
    tokens = iter(tensors["input_ids"].split(lengths))
    rounds = [[{"entry": name, "input_ids": next(tokens).tolist()} for name in texts] for texts in names]
    return _plan_of({**raw, "rounds": rounds}, path)


def _check_header(raw: Any, path: Path) -> None:
    """Raise ValueError where this is no plan, of another version, or has other keys than a plan."""
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise ValueError(f"{path}: no injection plan; its 'format' is not {FORMAT!r}")
    if raw.get("version") != VERSION:
        raise ValueError(f"{path}: version {raw.get('version')!r} of the format, this program reads version {VERSION}")
    for key in _KEYS:
        if key not in raw:
            raise ValueError(f"{path}: '{key}' is missing")
    for key in raw:
        if key not in _KEYS:
            raise ValueError(f"{path}: unknown key '{key}'")


def _plan_of(raw: Any, path: Path) -> PlanFile:
    """A plan from what JSON holds, checked in all its parts."""
    _check_header(raw, path)
    tokenizer, eos, passed, rounds = (raw[key] for key in ("tokenizer", "eos_token_id", "steps_passed", "rounds"))
    if tokenizer is not None and not isinstance(tokenizer, str):
        raise ValueError(f"{path}: 'tokenizer' must be a name or null")
    if not _is_token(eos):
        raise ValueError(f"{path}: 'eos_token_id' must be a token id")
    if not isinstance(rounds, list) or not rounds or not all(isinstance(texts, list) for texts in rounds):
        raise ValueError(f"{path}: 'rounds' must be a list of lists of texts, at least one")
    if passed is not None:
        fine = isinstance(passed, list) and all(type(number) is int and number >= 0 for number in passed)
        if not fine or len(passed) != len(rounds) or sorted(set(passed)) != passed:
            raise ValueError(f"{path}: 'steps_passed' must be null or growing numbers from 0, one a round")
    return PlanFile(
        tuple(
            tuple(_text(text, eos, f"{path}: round {number}, text {place}") for place, text in enumerate(texts))
            for number, texts in enumerate(rounds, start=1)
        ),
        None if passed is None else tuple(passed),
        tokenizer,
        eos,
    )


def _is_token(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _LARGEST


def _text(raw: Any, eos_token_id: int, where: str) -> Text:
    if not isinstance(raw, dict) or not raw.keys() <= {"entry", "text", "input_ids"}:
        raise ValueError(f"{where}: expected 'entry', 'input_ids' and perhaps 'text'")
    entry, wording, ids = raw.get("entry"), raw.get("text"), raw.get("input_ids")
    if not isinstance(entry, str) or not entry:
        raise ValueError(f"{where}: 'entry' must be a name")
    if wording is not None and not isinstance(wording, str):
        raise ValueError(f"{where}: 'text' must be a text")
    if not isinstance(ids, list) or not all(map(_is_token, ids)):
        raise ValueError(f"{where} ({entry}): 'input_ids' must be a list of token ids")
    if not ids or ids[-1] != eos_token_id:
        raise ValueError(f"{where} ({entry}): 'input_ids' must end with eos_token_id {eos_token_id}")
    return Text(entry, tuple(ids), wording)


# --- the published pickles ---------------------------------------------------------------------------------------


def _read_storage(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")


def _rebuild_tensor(storage: Any, offset: int, size: Sequence[int], stride: Sequence[int], *_: Any) -> Tensor:
    if not isinstance(storage, torch.storage.TypedStorage):
        raise ValueError("a tensor without a storage")
    whole = torch.empty(0, dtype=storage.dtype).set_(storage)
    # as_strided refuses a view that leaves the storage; set_ would grow the storage by uninitialised memory.
    view = whole.as_strided(tuple(size), tuple(stride), offset)
    if view.numel() > whole.numel():
        raise ValueError("a tensor larger than its storage")
    return view


# What a map may name beside containers, numbers and strings.
_PARTS_OF_A_TENSOR = {
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch.storage._load_from_bytes": _read_storage,
    "collections.OrderedDict": OrderedDict,
}


def _read_pickle(path: Path) -> PlanFile:
    """Read a published map. Only containers, numbers and tensors are ever made; a pickle that asks for anything else is
    refused with a ValueError before it can run. The content is checked to be what it should be.

    Two key styles, as the trainers of the two papers look them up:
    * Kim et al. (kaistAI/Knowledge-Entropy, olmo/train.py): {1: [token ids (n,), ...], 2: ...}, the number of the
      round, one every `inject_interval` steps.
    * Chang et al. (kaistAI/factual-knowledge-acquisition, olmo/train.py, `str(passed_step) in
      self.inject_indices_map`): {"0": [...], "100": [...], ...}, the steps that the run has done before this one.
    Earlier versions of the latter had one tensor an instance of the data, {"737280003": token ids}; that tells no step
    and is refused.
    """
    try:
        with path.open("rb") as file:
            raw = unpickle(file, _PARTS_OF_A_TENSOR)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: no safe injection map: {' '.join(str(error).split())}") from error
    by_step = isinstance(raw, dict) and bool(raw) and all(isinstance(k, str) and k.isdecimal() for k in raw)
    if by_step and all(isinstance(value, Tensor) for value in raw.values()):
        raise ValueError(
            f"{path}: its keys are numbers of instances, with one text each, as early code of Chang et al. had them; "
            "a plan needs steps or rounds, with a list of texts each"
        )
    numbers = {int(key): texts for key, texts in raw.items()} if by_step else raw
    if not by_step and (not isinstance(raw, dict) or set(raw) != set(range(1, len(raw) + 1)) or not raw):
        raise ValueError(
            f"{path}: expected rounds 1, 2, ... with a list of token tensors each, or texts of digits, the steps passed"
        )
    if len(numbers) != len(raw):
        raise ValueError(f"{path}: two keys name the same step")
    for number, texts in numbers.items():
        fine = isinstance(texts, list) and all(
            isinstance(t, Tensor) and t.dtype == torch.int64 and t.ndim == 1 and len(t) for t in texts
        )
        if not fine:
            raise ValueError(f"{path}: round {number} is no list of one-dimensional int64 tensors")
        if any(not _is_token(t.min().item()) or not _is_token(t.max().item()) for t in texts):
            raise ValueError(f"{path}: round {number} holds numbers that are no token ids")
    order = sorted(numbers)
    rounds = tuple(
        tuple(Text(f"map/{place}", tuple(ids.tolist())) for place, ids in enumerate(numbers[number]))
        for number in order
    )
    return PlanFile(rounds, tuple(order) if by_step else None)
