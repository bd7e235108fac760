"""Checkpoints on S3: there and back, which is the newest, and what happens while S3 is out of reach."""

from __future__ import annotations

import json
import re
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from olmo.checkpoint import manifest
from olmo.checkpoint import s3 as remote_folder
from olmo.checkpoint.remote_saves import RemoteSaves
from tests.remote_runs import (
    LARGE,
    LISTED,
    contents,
    drop,
    elsewhere,
    flip,
    key,
    make,
    metrics_of,
    objects,
    save,
    tell,
    warned,
)
from tests.s3 import Relay, client_of


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


OUTSIDE = json.dumps({"files": {"../../evil": {"size": 0, "crc32": "00000000"}}}).encode()
DAMAGE: dict[str, tuple[str, bytes | None, str]] = {
    "bytes": ("train/rank0.pt", bytes(900), "train/rank0.pt: its checksum is .*, and was .* when it was written"),
    "half": ("train/rank0.pt", bytes(450), "train/rank0.pt: 450 bytes of 900"),
    "missing": ("model_and_optim/.metadata", None, "model_and_optim/.metadata: missing"),
    "no manifest": ("manifest.json", b"{", "manifest.json: not a checkpoint manifest"),
    "outside": ("manifest.json", OUTSIDE, r"manifest.json: names '../../evil', a path outside"),
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
    with pytest.raises(ValueError, match=rf"step2/{said}.*; no checkpoint in {remote.place.url} is complete"):
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
