"""Checkpoints on S3: whole or absent, whatever is killed, refused or damaged; and a run that goes on elsewhere."""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from olmo.checkpoint import folder as saves
from olmo.checkpoint import manifest
from olmo.checkpoint import s3 as remote_folder
from olmo.checkpoint.remote_saves import RemoteSaves
from olmo.distributed import Ranks
from olmo.exceptions import ConfigurationError, Interrupted
from olmo.train import Trainer
from olmo.train.stopping import Signals
from tests.running import (
    CPU,
    ROOT,
    checkpoints,
    command,
    configure,
    metrics,
    same,
    series,
    train,
    weights,
    write_world,
)
from tests.s3 import KEYS, Relay, client_of, no_settings, relaying, s3_server

LARGE = 9 * 2**20  # bytes, of which boto3 makes two parts
LISTED = 7  # objects in one answer (S3 lists 1000), less than a checkpoint and its reports have
_numbers = count()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with s3_server(tmp_path_factory.mktemp("moto") / "log", LISTED) as port:
        client_of(port).create_bucket(Bucket="runs")
        yield port


@pytest.fixture(scope="module")
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


# --- there and back ---


def test_there_and_back(remote: RemoteSaves, caplog: pytest.LogCaptureFixture) -> None:
    folder = make(remote.folder / "step2", large=LARGE)
    (remote.folder / "data-indices").mkdir()
    (remote.folder / "data-indices/rank0.tsv").write_text("1\t7\n2\t9\n")
    (folder / "knowledge_entropy.json").write_text("{}")  # not of the checkpoint
    save(remote, folder)
    assert remote.steps() == [(2, "")] and not remote.is_ephemeral("step2")
    other = elsewhere(remote)
    assert other.latest() == other.folder / "step2"
    (folder / "knowledge_entropy.json").unlink()
    assert contents(other.folder) == contents(remote.folder)
    assert not warned(caplog)


def test_large_files_go_in_parts(remote: RemoteSaves, server: int) -> None:
    save(remote, make(remote.folder / "step2", large=LARGE))
    prefix = remote.place.url.removeprefix("s3://runs/")
    tags = [
        client_of(server).head_object(Bucket="runs", Key=f"{prefix}/step2/{name}")["ETag"].strip('"')
        for name in ("model_and_optim/__0_0.distcp", "train/rank0.pt")
    ]
    assert tags[0].endswith("-2") and "-" not in tags[1]


def test_the_manifest_comes_last_and_goes_first(remote: RemoteSaves, relay: Relay) -> None:
    save(remote, make(remote.folder / "step2"))
    put = [key(path[4:]) for path in relay.paths if path.startswith("PUT ")]
    assert put[-2:] == ["step2/config.yaml", "step2/manifest.json"]
    reports = {"metrics.jsonl", "injections.jsonl", "probes/step1.parquet", "probes/step2.parquet"}
    assert set(put[: len(reports)]) == reports and len(put) == len(set(put)) == len(reports) + 6
    relay.paths.clear()
    drop(remote, "step2")
    deleted = [key(path[7:]) for path in relay.paths if path.startswith("DELETE ")]
    assert deleted[:2] == ["step2/manifest.json", "step2/config.yaml"]
    assert set(deleted) == {name for name in put if name.startswith("step2/")}
    assert objects(remote).keys() == reports


def test_an_older_one_of_that_name_is_replaced(remote: RemoteSaves, relay: Relay) -> None:
    remote.place.write("step2/model_and_optim/__7_0.distcp", b"of more processes")
    remote.place.write("step2/manifest.json", b"{}")
    relay.paths.clear()
    save(remote, make(remote.folder / "step2"))
    changes = [path for path in relay.paths if "/step2/" in path and not path.startswith("GET")]
    assert changes[0].startswith("DELETE") and changes[0].endswith("/step2/manifest.json")
    assert {name for name in objects(remote) if name.startswith("step2/")} == {
        f"step2/{name}" for name in contents(remote.folder / "step2")
    }


def test_tables_go_once_and_what_grows_each_time(remote: RemoteSaves, relay: Relay) -> None:
    save(remote, make(remote.folder / "step2"))
    tell(remote.folder, 1, 2, 3)
    (remote.folder / "probes/step2.parquet").write_bytes(b"another size")
    (remote.folder / "probes/step4.partial").write_bytes(b"half")
    relay.paths.clear()
    save(remote, make(remote.folder / "step3"))
    put = {key(path[4:]) for path in relay.paths if path.startswith("PUT ")}
    told = {name for name in put if not name.startswith("step3/")}
    assert told == {"metrics.jsonl", "injections.jsonl", "probes/step2.parquet", "probes/step3.parquet"}
    assert remote.place.read("metrics.jsonl") == (remote.folder / "metrics.jsonl").read_bytes()


def test_more_objects_than_one_answer_lists(remote: RemoteSaves, relay: Relay) -> None:
    for name in ("step1", "step2", "step10-unsharded", "step10", "stepping", "step3.old", "other"):
        remote.place.write(f"{name}/manifest.json", b"{}")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: remote.place.write(f"step1/{number}", b""), range(3 * LISTED)))
    relay.paths.clear()
    assert remote.steps() == [(1, ""), (2, ""), (10, "-unsharded"), (10, "")]
    assert len(relay.paths) == 4
    drop(remote, "step1")
    assert remote.steps() == [(2, ""), (10, "-unsharded"), (10, "")]
    assert not remote.place.sizes("step1/")  # all of them, and nothing of step10
    assert len(objects(remote)) == 6


def test_an_upload_holds_up_nobody(remote: RemoteSaves, relay: Relay) -> None:
    free = threading.Event()
    held = threading.Event()

    def before(method: str, path: str) -> None:
        if method == "PUT" and key(path) == "step1/manifest.json":
            held.set()
            free.wait(30)

    relay.before = before
    folders = [make(remote.folder / f"step{step}") for step in (1, 2)]
    remote.saved(folders[0])
    remote.removed("step0")
    assert held.wait(30) and remote.steps() == []
    remote.saved(folders[1])  # other processes of the run would wait as well
    assert remote.steps() == []
    free.set()
    remote.finish()
    assert remote.steps() == [(1, ""), (2, "")]


def test_a_checkpoint_removed_here_during_its_upload(
    remote: RemoteSaves, relay: Relay, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make(remote.folder / "step1")

    def before(method: str, path: str) -> None:
        if method == "PUT" and key(path).startswith("step1/"):
            shutil.rmtree(folder, ignore_errors=True)

    relay.before = before
    remote.saved(folder)
    remote.removed("step1")
    remote.finish()
    assert not warned(caplog) and not remote.place.sizes("step1/")


# --- which is the newest ---


def test_the_newest_of_both_places(remote: RemoteSaves, relay: Relay) -> None:
    other = elsewhere(remote)
    assert remote.latest() is None and other.latest() is None
    save(remote, make(remote.folder / "step2"))
    tell(remote.folder, 1, 2, 3)
    save(remote, make(remote.folder / "step3-unsharded", ephemeral=True))
    assert remote.is_ephemeral("step3-unsharded")
    for here in (2, 3):  # older than there; of the same step
        other.folder.mkdir(exist_ok=True)
        make(other.folder / f"step{here}")
        shutil.copytree(remote.folder / "probes", other.folder / "probes", dirs_exist_ok=True)
        tell(other.folder, *range(1, here + 1), 9)
        newest = other.latest()
        if here == 2:
            assert newest == other.folder / "step3-unsharded" and manifest.is_ephemeral(newest)
            assert metrics_of(other.folder) == [1, 2, 3]
            shutil.rmtree(newest)
        else:
            assert newest == other.folder / "step3" and metrics_of(other.folder) == [1, 2, 3, 9]
    flip(other.folder / "step3/empty", b"x")  # damaged here, whole there: of another kind, and of the same
    assert other.latest() == other.folder / "step3-unsharded"
    flip(other.folder / "step3-unsharded/empty", b"x")
    assert other.latest() == other.folder / "step3-unsharded"
    assert contents(other.folder / "step3-unsharded") == contents(remote.folder / "step3-unsharded")


def metrics_of(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def flip(path: Path, content: bytes) -> None:
    assert path.read_bytes() != content
    path.write_bytes(content)


OUTSIDE = json.dumps({"files": {"../../evil": {"size": 0, "crc32": "00000000"}}}).encode()
DAMAGE: dict[str, tuple[str, bytes | None, str]] = {
    "bytes": ("train/rank0.pt", bytes(900), "train/rank0.pt: its checksum is .*, and was .* when it was written"),
    "half": ("train/rank0.pt", bytes(450), "train/rank0.pt: 450 bytes of 900"),
    "missing": ("model_and_optim/.metadata", None, "model_and_optim/.metadata: missing"),
    "no manifest": ("manifest.json", b"{", "manifest.json: no manifest of a checkpoint"),
    "outside": ("manifest.json", OUTSIDE, r"manifest.json: names \.\./\.\./evil, which would lie outside"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_the_one_before_a_damaged_one_is_used(
    remote: RemoteSaves, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    name, content, said = DAMAGE[damage]
    for step in (1, 2):
        save(remote, make(remote.folder / f"step{step}"))
    if content is None:
        remote.place.delete([f"step2/{name}"])
    else:
        remote.place.write(f"step2/{name}", content)
    other = elsewhere(remote)
    assert other.latest() == other.folder / "step1"
    (warning,) = warned(caplog)
    assert re.match(f"damaged checkpoint: {remote.place.url}/step2/{said}", warning)
    assert "\n" not in warning and ".partial" not in warning
    assert {p.name for p in other.folder.glob("*step*")} == {"step1"}
    assert contents(other.folder / "step1") == contents(remote.folder / "step1")
    remote.place.write("step1/train/rank0.pt", bytes(900))
    third = RemoteSaves(remote.place.url, remote.folder.with_name("third"))
    with pytest.raises(ValueError, match=rf"step2/{said}.*; no checkpoint in {remote.place.url} is whole"):
        third.latest()
    assert not list(third.folder.glob("*step*"))
    assert other.latest() == other.folder / "step1"  # which is whole here


def test_an_interrupted_fetch_leaves_nothing(remote: RemoteSaves, relay: Relay) -> None:
    save(remote, make(remote.folder / "step2"))
    other = elsewhere(remote)
    for broken in ("step2/train/rank0.pt", "probes/step1.parquet"):
        relay.before = lambda method, path, broken=broken: 403 if method == "GET" and key(path) == broken else None
        with pytest.raises(OSError, match=f"^{remote.place.url}/{broken}: 403"):
            other.latest()
        assert not list(other.folder.iterdir())
    relay.before = lambda method, path: None
    assert other.latest() == other.folder / "step2"


# --- killed processes ---


UPLOAD = """
import sys
from pathlib import Path
from olmo.checkpoint.remote_saves import RemoteSaves
remote = RemoteSaves(sys.argv[1], Path(sys.argv[2]).parent)
if sys.argv[3] == "saved":
    remote.saved(Path(sys.argv[2]))
elif sys.argv[3] == "removed":
    remote.removed(Path(sys.argv[2]).name)
else:
    remote.latest()
remote.wait()
"""


def kill_at(relay: Relay, where: str, remote: RemoteSaves, folder: Path, action: str) -> None:
    """Kill a process doing this when it asks for what `where` begins with; the relay never passes that on."""
    reached, killed = threading.Event(), threading.Event()

    def before(method: str, path: str) -> int | None:
        if not f"{method} {key(path)}".startswith(where):
            return None
        reached.set()
        killed.wait(30)
        return 503

    relay.before = before
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", UPLOAD, remote.place.url, str(folder), action]
    with subprocess.Popen(command, env=environment, cwd=folder.parent.parent) as process:
        try:
            assert reached.wait(60), "it never got there"
            process.send_signal(signal.SIGKILL)
            assert process.wait(30) == -signal.SIGKILL
        finally:
            process.kill()
            killed.set()
    relay.before = lambda method, path: None


@pytest.mark.parametrize("where", ["PUT step2/model_and_optim/__0_0.distcp", "PUT step2/manifest"])
def test_a_killed_upload_is_no_checkpoint(remote: RemoteSaves, relay: Relay, server: int, where: str) -> None:
    save(remote, make(remote.folder / "step1"))
    folder = make(remote.folder / "step2", large=LARGE)
    kill_at(relay, where, remote, folder, "saved")
    other = elsewhere(remote)
    assert remote.steps() == other.steps() == [(1, "")] and other.latest() == other.folder / "step1"
    assert remote.place.sizes("step2/")  # something had come
    place = {"Bucket": "runs", "Prefix": remote.place.url.removeprefix("s3://runs/")}
    parts = client_of(server).list_multipart_uploads(**place).get("Uploads", [])
    assert bool(parts) == ("distcp" in where)

    again = RemoteSaves(remote.place.url, remote.folder)
    assert again.latest() == folder  # whole here
    again.begin(2)
    assert not client_of(server).list_multipart_uploads(**place).get("Uploads")
    assert bool(again.place.sizes("step2/")) == ("manifest" in where)  # with config.yaml it might be OLMo's
    save(again, make(remote.folder / "step3"))  # brings step2 too
    assert again.steps() == [(1, ""), (2, ""), (3, "")]
    third = RemoteSaves(remote.place.url, remote.folder.with_name("third"))
    third.fetch("step2")
    assert contents(third.folder / "step2") == contents(folder)


def test_a_killed_removal_leaves_no_checkpoint(remote: RemoteSaves, relay: Relay) -> None:
    for step in (1, 2):
        save(remote, make(remote.folder / f"step{step}"))
    kill_at(relay, "DELETE step1/train", remote, remote.folder / "step1", "removed")
    assert remote.steps() == [(2, "")] and remote.place.sizes("step1/")
    shutil.rmtree(remote.folder / "step1")
    again = RemoteSaves(remote.place.url, remote.folder)
    again.begin(2)
    assert remote.steps() == [(2, "")] and not again.place.sizes("step1/")


def test_a_killed_fetch_is_done_anew(remote: RemoteSaves, relay: Relay) -> None:
    save(remote, make(remote.folder / "step2", large=LARGE))
    other = elsewhere(remote)
    other.folder.mkdir()
    kill_at(relay, "GET step2/model_and_optim/__0_0.distcp", other, other.folder / "any", "latest")
    assert {p.name for p in other.folder.iterdir()} == {".step2.partial"} and saves.latest(other.folder) is None
    assert other.latest() == other.folder / "step2"
    assert contents(other.folder) == contents(remote.folder)
    (other.folder / ".step2.partial").mkdir()
    saves.remove_left_over(other.folder)  # as a run does when it begins
    assert contents(other.folder) == contents(remote.folder)


# --- what older runs have there ---


def test_a_new_run_clears_the_place(remote: RemoteSaves) -> None:
    assert not remote.holds_run()
    remote.place.write("step5/model.safetensors", b"half")
    remote.place.write("notes.txt", b"mine")
    remote.place.write("probes/readme.txt", b"mine")
    remote.place.write("probes/deep/probes/step1.parquet", b"mine")
    remote.place.write("metrics.jsonl.old", b"mine")
    assert not remote.holds_run()
    remote.place.write("step7-unsharded/config.yaml", b"of OLMo's trainer")
    assert remote.holds_run() and not remote.steps()
    save(remote, make(remote.folder / "step2"))
    remote.begin(2)
    assert remote.steps() == [(2, "")] and remote.place.sizes("step7") and not remote.place.sizes("step5")
    remote.begin(None)
    assert not remote.holds_run()
    assert objects(remote).keys() == {
        *("notes.txt", "probes/readme.txt", "probes/deep/probes/step1.parquet", "metrics.jsonl.old"),
    }


def test_a_restart_uploads_what_is_missing_there(remote: RemoteSaves, caplog: pytest.LogCaptureFixture) -> None:
    for step in (1, 2, 3, 9):
        make(remote.folder / f"step{step}")
    (make(remote.folder / "step4") / "manifest.json").unlink()  # cannot be checked
    flip(remote.folder / "step2/train/rank0.pt", bytes(900))
    remote.begin(5)  # step9 is damaged and comes again
    save(remote, make(remote.folder / "step6"))
    assert remote.steps() == [(1, ""), (3, ""), (6, "")]
    (warning,) = warned(caplog)
    assert warning.startswith(f"damaged checkpoint, not uploaded: {remote.folder}/step2/train/rank0.pt: its checksum")
    assert "step2" not in " ".join(objects(remote)).replace("probes/step2.parquet", "")


# --- hiccups ---


def test_a_run_outlives_a_place_out_of_reach(
    remote: RemoteSaves, relay: Relay, caplog: pytest.LogCaptureFixture
) -> None:
    save(remote, make(remote.folder / "step1"))
    relay.before = lambda method, path: 503 if method == "PUT" and key(path).startswith("step2") else None
    save(remote, make(remote.folder / "step2"))
    (warning,) = warned(caplog)
    assert warning.startswith(f"not uploaded: step2 ({remote.place.url}/step2/")
    assert warning.endswith(": 503); to be tried again with the next checkpoint")
    drop(remote, "step1")  # save_num_checkpoints_to_keep: 1; but there it is the only one
    assert remote.steps() == [(1, "")]
    with pytest.raises(OSError) as caught:
        remote.finish()
    said = str(caught.value)
    assert said.startswith("remote_save_folder: not uploaded: step2 (")
    assert said.endswith(f"; the checkpoints in {remote.folder} are intact")
    relay.before = lambda method, path: None
    save(remote, make(remote.folder / "step3"))
    assert remote.steps() == [(2, ""), (3, "")] and len(warned(caplog)) == 1
    remote.finish()


def test_what_is_no_longer_kept_is_not_uploaded_later(
    remote: RemoteSaves, relay: Relay, caplog: pytest.LogCaptureFixture
) -> None:
    relay.before = lambda method, path: 503
    for step in (1, 2):
        save(remote, make(remote.folder / f"step{step}"))
    shutil.rmtree(remote.folder / "step1")
    drop(remote, "step1")
    make(remote.folder / "step3")
    save(remote, remote.folder / "step3")
    shutil.rmtree(remote.folder / "step2")  # by hand
    assert [w.partition(" (")[0] for w in warned(caplog)] == [
        f"not uploaded: {missing}" for missing in ("step1", "step1, step2", "step2, step3")
    ]
    relay.before = lambda method, path: None
    remote.finish()
    assert remote.steps() == [(3, "")] and {n.split("/")[0] for n in objects(remote) if n.startswith("step")} == {
        "step3"
    }


def test_a_removal_that_fails_is_tried_again(
    remote: RemoteSaves, relay: Relay, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2):
        save(remote, make(remote.folder / f"step{step}"))
    relay.before = lambda method, path: 500 if method == "DELETE" else None
    drop(remote, "step1")
    (warning,) = warned(caplog)
    assert warning == (
        f"not removed: step1 ({remote.place.url}/step1/manifest.json: 500); to be tried again with the next checkpoint"
    )
    assert remote.steps() == [(1, ""), (2, "")]
    relay.before = lambda method, path: None
    remote.finish()
    assert remote.steps() == [(2, "")] and not remote.place.sizes("step1/")


def test_what_passes_is_tried_again_at_once(
    remote: RemoteSaves, relay: Relay, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(remote_folder, "ATTEMPTS", 3)
    failed: set[str] = set()

    def before(method: str, path: str) -> int | None:
        """The first attempt of each upload fails."""
        if method != "PUT" or path in failed:
            return None
        failed.add(path)
        return 503

    relay.before = before
    patient = RemoteSaves(remote.place.url, remote.folder)
    save(patient, make(remote.folder / "step1"))
    assert patient.steps() == [(1, "")] and len(failed) == 10 and not warned(caplog)


# --- what a user can get wrong ---


def test_a_place_that_can_be_used(remote: RemoteSaves) -> None:
    remote.check()
    assert not objects(remote)
    RemoteSaves("s3://runs", remote.folder).check()


def test_no_such_bucket(relay: Relay, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"^remote_save_folder: s3://nowhere/a: 404 NoSuchBucket; it takes a"):
        RemoteSaves("s3://nowhere/a", tmp_path).check()
    with pytest.raises(ConfigurationError, match=r"^remote_save_folder: s3://run\?/a: .*Invalid bucket name") as caught:
        RemoteSaves("s3://run?/a", tmp_path).check()
    assert "\n" not in str(caught.value)


def test_no_credentials(relay: Relay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in KEYS:
        monkeypatch.delenv(name)
    with pytest.raises(ConfigurationError, match=r"^s3://: no credentials to write with; set AWS_ACCESS_KEY_ID and"):
        RemoteSaves("s3://runs/a", tmp_path)
    monkeypatch.setenv("S3_PROFILE", "mine")
    with pytest.raises(ConfigurationError, match=r"^s3://: .*mine"):
        RemoteSaves("s3://runs/a", tmp_path)
    (tmp_path / "nothing").write_text("[mine]\naws_access_key_id = a\naws_secret_access_key = b\n")
    RemoteSaves("s3://runs/a", tmp_path).check()


def test_no_server(relay: Relay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(OSError, match=r"^remote_save_folder: s3://runs/a: Connection refused$"):
        RemoteSaves("s3://runs/a", tmp_path).check()


ACTIONS = ["s3:ListBucket", "s3:GetObject", "s3:PutObject", "s3:DeleteObject"]


def test_no_permission(relay: Relay, server: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """moto asks for the rights of users as S3 does, once it is told to."""
    import requests

    def ask_for_rights(after: str) -> None:
        """After so many requests more."""
        requests.post(f"http://127.0.0.1:{server}/moto-api/reset-auth", data=after, timeout=10).raise_for_status()

    iam = client_of(server, "iam")
    iam.create_user(UserName="someone")
    made = iam.create_access_key(UserName="someone")["AccessKey"]
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", made["AccessKeyId"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", made["SecretAccessKey"])
    remote = RemoteSaves("s3://runs/of/someone", tmp_path)
    try:
        for lacking in [*ACTIONS, None]:
            ask_for_rights("inf")
            allowed = [action for action in ACTIONS if action != lacking]
            policy = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": allowed, "Resource": "*"}]}
            iam.put_user_policy(UserName="someone", PolicyName="some", PolicyDocument=json.dumps(policy))
            ask_for_rights("0")
            if lacking is None:
                remote.check()
            else:
                with pytest.raises(ConfigurationError, match=f"^remote_save_folder: {remote.place.url}.*: 403 Access"):
                    remote.check()
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAUNKNOWNUNKNOWNUN")
        with pytest.raises(ConfigurationError, match=r"^remote_save_folder: s3://runs/a: 403 InvalidAccessKeyId; it t"):
            RemoteSaves("s3://runs/a", tmp_path).check()
    finally:
        ask_for_rights("inf")


# --- runs --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world")) / "plain.yaml"


@pytest.fixture(scope="module")
def whole(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """An unbroken run of 7 steps, saved after 2, 4, 6 and 7; its folder and weights."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, weights(train(plain, folder, "--save_interval=2"))


def options(remote: RemoteSaves, *more: str) -> tuple[str, ...]:
    return ("--save_interval=2", "--try_load_latest_save", f"--remote_save_folder={remote.place.url}", *more)


INDICES = "data-indices/rank0.tsv"


def test_a_run_goes_on_on_another_machine(remote: RemoteSaves, plain: Path, whole: tuple[Path, Any]) -> None:
    shutil.rmtree(remote.folder)
    train(plain, remote.folder, *options(remote, "--stop_at=5"))  # which it saves, too
    assert remote.steps() == [(2, ""), (4, ""), (5, "")]
    other = elsewhere(remote)
    resumed = train(plain, other.folder, *options(remote))
    assert same(weights(resumed), whole[1]) and metrics(other.folder) == metrics(whole[0])
    assert (other.folder / INDICES).read_bytes() == (whole[0] / INDICES).read_bytes()
    assert checkpoints(other.folder) == {"step5", "step6", "step7"}
    assert remote.steps() == [(2, ""), (4, ""), (5, ""), (6, ""), (7, "")]
    assert remote.place.read("metrics.jsonl") == (other.folder / "metrics.jsonl").read_bytes()
    kept = train(plain, other.folder, *options(remote, "--save_num_checkpoints_to_keep=2", "--max_duration=8"))
    assert kept.state.step == 8 and checkpoints(other.folder) == {"step7", "step8"}
    assert remote.steps() == [(7, ""), (8, "")]  # those that this machine never had are counted, too


def test_ephemeral_checkpoints_go_there_too(remote: RemoteSaves, plain: Path) -> None:
    shutil.rmtree(remote.folder)
    ephemeral = ("--save_interval=4", "--save_interval_ephemeral=1", "--save_steps_unsharded=[2]")
    train(plain, remote.folder, *options(remote, *ephemeral, "--stop_after=3"))
    assert remote.steps() == [(2, "-unsharded"), (3, "")] and not remote.is_ephemeral("step3")  # the last is none
    train(plain, remote.folder, *options(remote, *ephemeral, "--save_interval=null", "--stop_after=2"))
    assert remote.steps() == [(2, "-unsharded"), (3, ""), (5, "")] and remote.is_ephemeral("step5")
    save(remote, make(remote.folder / "step1", ephemeral=True))  # as if its removal had been killed
    train(plain, elsewhere(remote).folder, *options(remote, *ephemeral))
    assert remote.steps() == [(2, "-unsharded"), (3, ""), (7, "")]


def test_two_processes_go_on(remote: RemoteSaves, plain: Path, whole: tuple[Path, Any]) -> None:
    shutil.rmtree(remote.folder)
    train(plain, remote.folder, *options(remote, "--stop_at=4"))
    folder = elsewhere(remote).folder
    run = ["-m", "scripts.train", str(plain), *options(remote, f"--save_folder={folder}")]
    ended = command(run, plain.parent, processes=2)
    assert ended.returncode == 0, ended.stderr
    assert remote.steps() == [(2, ""), (4, ""), (6, ""), (7, "")]
    assert series(folder) == pytest.approx(series(whole[0]), rel=1e-4)


def test_a_place_that_holds_a_run(remote: RemoteSaves, plain: Path, tmp_path: Path) -> None:
    shutil.rmtree(remote.folder)
    train(plain, remote.folder, *options(remote, "--stop_at=2"))
    anew = ("--save_interval=2", f"--remote_save_folder={remote.place.url}", "--stop_at=1")
    with pytest.raises(
        ConfigurationError,
        match=rf"^remote_save_folder: {remote.place.url} holds a run; add --save_overwrite, or --try_load_latest_save",
    ):
        train(plain, tmp_path / "another", *anew)
    assert remote.steps() == [(2, "")] and not (tmp_path / "another").exists()
    train(plain, tmp_path / "dry", *anew, "--save_overwrite", "--dry_run")
    train(plain, tmp_path / "dry", *options(remote), "--dry_run")
    assert remote.steps() == [(2, "")] and not (tmp_path / "dry").exists()
    train(plain, tmp_path / "another", *anew, "--save_overwrite")
    assert remote.steps() == [(1, "")] and len(remote.place.read("metrics.jsonl").splitlines()) == 1


def test_a_place_that_cannot_be_used(remote: RemoteSaves, relay: Relay, plain: Path, tmp_path: Path) -> None:
    relay.before = lambda method, path: 403 if method == "PUT" else None
    for more in ((), ("--dry_run",)):
        with pytest.raises(ConfigurationError, match=r"^remote_save_folder: s3://.*/\.can-be-written: 403; it takes a"):
            train(plain, tmp_path / "run", *options(remote), *more)
        assert not (tmp_path / "run").exists()
    relay.before = lambda method, path: None
    train(plain, tmp_path / "run", *options(remote), "--dry_run")
    assert not objects(remote)


def test_a_run_whose_uploads_fail(
    remote: RemoteSaves, relay: Relay, plain: Path, whole: tuple[Path, Any], caplog: pytest.LogCaptureFixture
) -> None:
    shutil.rmtree(remote.folder)
    relay.before = lambda method, path: 503 if method == "PUT" and "can-be" not in path else None
    with pytest.raises(OSError, match=r"^remote_save_folder: not uploaded: step2, step4, step6, step7 .* are intact$"):
        train(plain, remote.folder, *options(remote))
    assert len(warned(caplog)) == 4 and remote.steps() == [] and checkpoints(remote.folder) == checkpoints(whole[0])
    signals = Signals()
    signals.received = signal.SIGTERM
    trainer = Trainer(configure(plain, remote.folder, *options(remote, "--max_duration=9")), CPU, Ranks(), signals)
    with pytest.raises(Interrupted, match=r"^SIGTERM at step 8; saved .*/step8"):  # it goes on as it can
        trainer.fit()
    relay.before = lambda method, path: None
    train(plain, remote.folder, *options(remote, "--max_duration=8"))
    assert remote.steps() == [(2, ""), (4, ""), (6, ""), (7, ""), (8, "")]


def test_a_fetch_may_take_longer_than_others_wait(
    remote: RemoteSaves,
    relay: Relay,
    plain: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    shutil.rmtree(remote.folder)
    train(plain, remote.folder, *options(remote, "--stop_at=2"))
    shared: list[int] = []
    largest = Ranks.largest

    def seen(self: Ranks, value: int) -> int:
        shared.append(value)
        return largest(self, value)

    monkeypatch.setattr(Ranks, "largest", seen)
    relay.before = lambda method, path: time.sleep(0.3) if key(path) == "step2/train.pt" else None
    more = ("--collective_timeout=0.2", "--stop_at=2")
    train(plain, elsewhere(remote).folder, *options(remote, *more))
    # The place can be written to; the first rank still works, at least three times, and is done.
    assert shared[0] == 0 and shared[1:].index(1) >= 3 and set(shared[1 : shared[1:].index(1)]) == {0}
    assert "resuming from " + str(elsewhere(remote).folder / "step2") in caplog.messages
