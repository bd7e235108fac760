"""An S3 server on this machine, a relay before it, a run's folder with a place of its own there, an unbroken run."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from olmo.checkpoint import s3 as remote_folder
from olmo.checkpoint.remote_saves import RemoteSaves
from tests.remote_runs import LISTED, tell
from tests.running import train, weights, write_world
from tests.s3 import KEYS, Relay, client_of, no_settings, relaying, s3_server

_numbers = count()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with s3_server(tmp_path_factory.mktemp("moto") / "log", LISTED) as port:
        client_of(port).create_bucket(Bucket="runs")
        yield port


@pytest.fixture(scope="session")
def one_relay(server: int) -> Iterator[Relay]:
    with relaying(server) as relay:
        yield relay


@pytest.fixture
def relay(one_relay: Relay, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Relay:
    no_settings(monkeypatch, tmp_path)
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", one_relay.url)
    monkeypatch.setattr(remote_folder, "ATTEMPTS", 1)
    one_relay.before = lambda method, path: None
    one_relay.paths.clear()
    return one_relay


one_client = functools.cache(remote_folder.s3_client)  # they are slow to make


@pytest.fixture
def remote(relay: Relay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RemoteSaves:
    """Of a run in tmp_path / "here" at a place of its own, with reports of two steps."""
    monkeypatch.setattr(remote_folder, "s3_client", one_client)
    here = tmp_path / "here"
    (here / "probes").mkdir(parents=True)
    tell(here, 1, 2)
    return RemoteSaves(f"s3://runs/of/{next(_numbers)}/", here)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world")) / "plain.yaml"


@pytest.fixture(scope="module")
def whole(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """An unbroken run of 7 steps, saved after 2, 4, 6 and 7; its folder and weights."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, weights(train(plain, folder, "--save_interval=2"))
