"""Checkpoints on S3: complete or absent, whichever process is killed; and what older runs left there."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from olmo.checkpoint import saves
from olmo.checkpoint.remote_saves import RemoteSaves
from tests.remote_runs import LARGE, contents, elsewhere, flip, key, make, objects, save, warned
from tests.running import (
    ROOT,
)
from tests.s3 import Relay, client_of

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


def kill_at(relay: Relay, where: str, remote: RemoteSaves, folder: Path, action: str, after: str = "") -> None:
    """Kill a process doing this when it asks for what `where` begins with; the relay never passes that on.

    after: but not before a request that begins with this has been passed on.
    """
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
            deadline = time.monotonic() + 30
            while not any(f"{method} {key(path)}".startswith(after) for method, path in map(str.split, relay.paths)):
                assert time.monotonic() < deadline, f"no {after}"
                time.sleep(0.01)
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
    kill_at(relay, where, remote, folder, "saved", after="PUT step2/")
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
    saves.delete_leftovers(other.folder)  # as a run does when it begins
    assert contents(other.folder) == contents(remote.folder)


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
