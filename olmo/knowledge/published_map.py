"""The published injection maps: pickles, read without running code."""

from __future__ import annotations

import io
from collections import OrderedDict
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files.torch_files import check_plain, load_torch
from ..files.unpickling import unpickle
from .plan import Rounds, Text, is_token


def _rebuild_tensor(storage: Any, offset: int, size: Sequence[int], stride: Sequence[int], *_: Any) -> Tensor:
    if not isinstance(storage, torch.storage.TypedStorage):
        raise ValueError("a tensor without a storage")
    everything = torch.empty(0, dtype=storage.dtype).set_(storage)
    # as_strided rejects a view beyond the storage; set_ would extend the storage by uninitialized memory.
    view = everything.as_strided(tuple(size), tuple(stride), offset)
    check_plain(view)
    return view


def _parts_of_a_tensor() -> dict[str, Any]:
    """The only names that a map may contain; containers, numbers and strings need none."""
    return {
        "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
        # One piece of bytes is one storage, however often the map names it.
        "torch.storage._load_from_bytes": cache(lambda content: load_torch(io.BytesIO(content))),
        "collections.OrderedDict": OrderedDict,
    }


def read_published_map(path: Path) -> tuple[Rounds, tuple[int, ...] | None]:
    """The rounds of a published map, and the steps that pass before each, if its keys are steps.

    Two key styles, as the trainers of the two papers look them up:
    * Kim et al. (kaistAI/Knowledge-Entropy, olmo/train.py): {1: [token ids (n,), ...], 2: ...}, the number of the
      round, one every `inject_interval` steps.
    * Chang et al. (kaistAI/factual-knowledge-acquisition, olmo/train.py, `str(passed_step) in
      self.inject_indices_map`): {"0": [...], "100": [...], ...}, the steps that the run has done before this one.
    Earlier versions of the latter had one tensor for each instance of the data, {"737280003": token ids}. They hold no
    steps and are rejected.

    Raises ValueError, before any code of the pickle runs, if it holds more than containers, numbers, strings and
    tensors, or another structure.
    """
    try:
        with path.open("rb") as file:
            raw = unpickle(file, _parts_of_a_tensor())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a safe injection map: {' '.join(str(error).split())}") from error
    by_step = (
        isinstance(raw, dict)
        and bool(raw)
        and all(isinstance(key, str) and key.isdecimal() and len(key) < 19 for key in raw)
    )
    if by_step and all(isinstance(value, Tensor) for value in raw.values()):
        raise ValueError(
            f"{path}: its keys are numbers of instances, with one text each, as in early code of Chang et al.; "
            "a plan needs steps or rounds, with a list of texts each"
        )
    numbers = {int(key): texts for key, texts in raw.items()} if by_step else raw
    if not by_step and (not isinstance(raw, dict) or set(raw) != set(range(1, len(raw) + 1)) or not raw):
        raise ValueError(
            f"{path}: expected as keys rounds 1, 2, ... or steps passed '0', '100', ..., each with a list of tensors"
        )
    if len(numbers) != len(raw):
        raise ValueError(f"{path}: two keys name the same step")
    for number, texts in numbers.items():
        fine = isinstance(texts, list) and all(
            isinstance(t, Tensor) and t.dtype == torch.int64 and t.ndim == 1 and len(t) for t in texts
        )
        if not fine:
            raise ValueError(f"{path}: round {number} is not a list of one-dimensional int64 tensors")
        if not all(is_token(t.min().item()) and is_token(t.max().item()) for t in texts):
            raise ValueError(f"{path}: round {number} holds numbers that are not token ids")
    order = sorted(numbers)
    rounds = tuple(
        tuple(Text(f"map/{place}", tuple(ids.tolist())) for place, ids in enumerate(numbers[number]))
        for number in order
    )
    return rounds, tuple(order) if by_step else None
