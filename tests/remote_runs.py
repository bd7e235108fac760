"""What tests of checkpoints on S3 need: made-up checkpoints and reports, and what is at a place."""

from __future__ import annotations

import json
import logging
import zlib
from pathlib import Path

import numpy as np
import pytest

from olmo.checkpoint.remote_saves import RemoteSaves

LARGE = 9 * 2**20  # bytes, of which boto3 makes two parts
LISTED = 7  # objects in one answer (S3 lists 1000), less than a checkpoint and its reports have


def tell(folder: Path, *steps: int) -> None:
    """Let a run tell of these steps and no others."""
    for name in ("metrics.jsonl", "injections.jsonl"):
        (folder / name).write_text("".join(json.dumps({"step": step}) + "\n" for step in steps))
    for step in steps:
        (folder / f"probes/step{step}.parquet").write_bytes(bytes([step]) * 100)


def make(folder: Path, large: int = 0, ephemeral: bool = False) -> Path:
    """A sharded checkpoint with a manifest, of bytes that its name alone gives."""
    rng = np.random.default_rng(zlib.crc32(folder.name.encode()))
    sizes = {"config.yaml": 50, "model_and_optim/__0_0.distcp": large or 3000, "model_and_optim/.metadata": 70}
    sizes |= {"train/rank0.pt": 900, "empty": 0}
    files = {}
    for name, size in sizes.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        content = rng.bytes(size)
        (folder / name).write_bytes(content)
        files[name] = {"size": size, "crc32": f"{zlib.crc32(content):08x}"}
    (folder / "manifest.json").write_text(json.dumps({"ephemeral": ephemeral, "files": files}))
    return folder


def save(remote: RemoteSaves, folder: Path) -> None:
    remote.saved(folder)
    remote.wait()


def drop(remote: RemoteSaves, name: str) -> None:
    remote.removed(name)
    remote.wait()


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def objects(remote: RemoteSaves) -> dict[str, int]:
    return remote.place.sizes()


def elsewhere(remote: RemoteSaves) -> RemoteSaves:
    """The same place, seen from another machine."""
    return RemoteSaves(remote.place.url, remote.folder.with_name("elsewhere"))


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def key(path: str) -> str:
    """The name of an object below the run's place, of the path of a request."""
    return path.partition("?")[0].removeprefix("/runs/of/").partition("/")[2]


def metrics_of(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def flip(path: Path, content: bytes) -> None:
    assert path.read_bytes() != content
    path.write_bytes(content)
