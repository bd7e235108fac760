"""Token files on a server of this machine: what they hold, and what was requested."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.s3 import KEYS
from tests.serving import Server

LENGTH = 8
COUNTS = [5, 0, 30, 2]  # instances of each file; two tokens more in each are dropped
NAMES = [f"/tokens/part-{number}.npy" for number in range(len(COUNTS))]


def content(number: int, count: int) -> bytes:
    return np.random.default_rng(number).integers(0, 2**16, count * LENGTH + 2).astype("<u2").tobytes()


CONTENTS = [content(number, count) for number, count in enumerate(COUNTS)]
EXPECTED = np.concatenate(
    [np.frombuffer(c, "<u2")[:-2].reshape(-1, LENGTH).astype(np.int64) for c in CONTENTS if len(c) > 4]
)


def urls(server: Server) -> list[str]:
    return [server.url + name for name in NAMES]


def asked(server: Server) -> int:
    return len(server.asked) + len(server.heads)


def kept(tmp_path: Path, kind: str) -> list[Path]:
    return list((tmp_path / "cache" / "knowledge-entropy").glob(f"*.{kind}"))


def with_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
