"""Pickles that would run code, or make more than tensors, if anything but a careful reader opened them."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path
from typing import Any

import torch


class Calls:
    """Pickles to a call of `function(*arguments)` when it is loaded."""

    def __init__(self, function: Any, *arguments: Any):
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


class SomeClass:
    """A class of this file that a map has no business naming."""


def torch_bytes(content: Any, legacy: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def hostile(kind: str, touched: Path) -> Any:
    bomb = Calls(os.system, f"touch '{touched}'")
    rebuild, load = torch._utils._rebuild_tensor_v2, torch.storage._load_from_bytes
    return {
        "call": bomb,
        "call in a round": {1: [torch.arange(3), bomb]},
        "eval": {1: [Calls(eval, f"open({str(touched)!r}, 'w')")]},
        "open": {1: [Calls(open, str(touched), "w")]},
        "class": {1: [SomeClass()]},
        "torch.load": {1: [Calls(torch.load, str(touched))]},
        "getattr": {1: [Calls(getattr, Calls(__import__, "os"), "system")]},
        "nested storage": {1: [Calls(load, pickle.dumps(bomb))]},
        "nested zip storage": {1: [Calls(load, torch_bytes({"a": bomb}, legacy=False))]},
        "nested legacy storage": {1: [Calls(load, torch_bytes([bomb], legacy=True))]},
        "storage that is none": {1: [Calls(rebuild, 3, 0, (3,), (1,), False, {})]},
        "view beyond its storage": {
            1: [Calls(rebuild, Calls(load, torch_bytes(torch.arange(3).storage(), True)), 0, (10**6,), (1,), False, {})]
        },
        "negative offset": {
            1: [Calls(rebuild, Calls(load, torch_bytes(torch.arange(3).storage(), True)), -8, (3,), (1,), False, {})]
        },
        "one token a billion times": {
            1: [Calls(rebuild, Calls(load, torch_bytes(torch.arange(3).storage(), True)), 0, (10**9,), (0,), False, {})]
        },
    }[kind]


HOSTILE = [
    "call",
    "call in a round",
    "eval",
    "open",
    "class",
    "torch.load",
    "getattr",
    "nested storage",
    "nested zip storage",
    "nested legacy storage",
    "storage that is none",
    "view beyond its storage",
    "negative offset",
    "one token a billion times",
]
