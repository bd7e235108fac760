"""Runs that copy their checkpoints to S3 and continue on another machine."""

from __future__ import annotations

import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from olmo.checkpoint.remote_saves import RemoteSaves
from olmo.distributed import Ranks
from olmo.exceptions import ConfigurationError, Interrupted
from olmo.train import Trainer
from olmo.train.stopping import Signals
from tests.remote_runs import contents, elsewhere, key, make, objects, save, warned
from tests.running import (
    CPU,
    checkpoints,
    command,
    configure,
    metrics,
    same,
    series,
    train,
    weights,
    write_family,
)
from tests.s3 import Relay


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


def test_a_run_of_another_family_goes_on_on_another_machine(remote: RemoteSaves, plain: Path) -> None:
    shutil.rmtree(remote.folder)
    write_family(plain.parent, "OLMoE")
    family = plain.parent / "family-plain.yaml"
    settings = options(remote, "--save_interval_unsharded=3", "--max_duration=4")
    whole = train(family, plain.parent / "family", settings[0], settings[-1])
    train(family, remote.folder, *settings, "--stop_at=3")
    other = elsewhere(remote).folder
    resumed = train(family, other, *settings)
    assert same(weights(resumed), weights(whole)) and metrics(other) == metrics(plain.parent / "family")
    assert remote.steps() == [(2, ""), (3, "-unsharded"), (3, ""), (4, "-unsharded"), (4, "")]
    assert contents(other / "step3").keys() == contents(remote.folder / "step3").keys()
    here, there = (contents(folder / "step3-unsharded") for folder in (remote.folder, other))  # saved again
    assert {n for n in here if here[n] != there.get(n)} <= {"config.yaml", "manifest.json", "optim.pt", "train.pt"}


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
    assert len([line for line in warned(caplog) if "not uploaded" in line]) == 4 and remote.steps() == []
    assert checkpoints(remote.folder) == checkpoints(whole[0])
    signals = Signals()
    signals.received = signal.SIGTERM
    trainer = Trainer(configure(plain, remote.folder, *options(remote, "--max_duration=9")), CPU, Ranks(), signals)
    with pytest.raises(Interrupted, match=r"^SIGTERM at step 8; saved .*/step8"):  # it goes on as it can
        trainer.fit()
    relay.before = lambda method, path: None
    train(plain, remote.folder, *options(remote, "--max_duration=8", "--allow_changed_settings"))
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

    def seen(self: Ranks, value: int, group: Any = None) -> int:
        shared.append(value)
        return largest(self, value, group)

    monkeypatch.setattr(Ranks, "largest", seen)
    relay.before = lambda method, path: time.sleep(0.3) if key(path) == "step2/train.pt" else None
    more = ("--collective_timeout=0.2", "--stop_at=2")
    train(plain, elsewhere(remote).folder, *options(remote, *more))
    # The place can be written to; the first rank still works, at least three times, and is done.
    assert shared[0] == 0 and shared[1:].index(1) >= 3 and set(shared[1 : shared[1:].index(1)]) == {0}
    assert "resuming from " + str(elsewhere(remote).folder / "step2") in caplog.messages
