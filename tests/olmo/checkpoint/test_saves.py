"""The checkpoints of a run: damage, links, which go, and what killed processes left."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from olmo.checkpoint import saves
from olmo.distributed import Ranks
from olmo.exceptions import ConfigurationError
from olmo.files.tensors import read_training_state
from olmo.train import Trainer
from olmo.train.schedule import StepSettings
from olmo.train.step import TrainStep
from tests.running import (
    CPU,
    checkpoints,
    configure,
    metrics,
    modes_hold,
    same,
    series,
    train,
    weights,
)

SAVES = ("--save_interval=2", "--try_load_latest_save")


@pytest.fixture
def run(whole: tuple[Path, Any], tmp_path: Path) -> Path:
    """A copy of it, killed before its last checkpoint."""
    folder = tmp_path / "run"
    shutil.copytree(whole[0], folder, symlinks=True)
    shutil.rmtree(folder / "step7")
    return folder


def flip_a_bit(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 4]))


PART = "model_and_optim/__0_0.distcp"
DAMAGE = {
    "a bit of the numbers": lambda folder: flip_a_bit(folder / PART),
    "a bit of the index": lambda folder: flip_a_bit(folder / "model_and_optim/.metadata"),
    "half a file": lambda folder: os.truncate(folder / PART, 1000),
    "no index": lambda folder: (folder / "model_and_optim/.metadata").unlink(),
    "a file is missing": lambda folder: (folder / "train.pt").unlink(),
    "no manifest worth the name": lambda folder: (folder / "manifest.json").write_text("{"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_the_checkpoint_before_a_damaged_one_is_used(
    plain: Path, whole: tuple[Path, Any], run: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    DAMAGE[damage](run / "step6")
    trainer = train(plain, run, *SAVES)
    assert [m for m in caplog.messages if m.startswith(f"damaged checkpoint: {run / 'step6'}/")]
    assert same(weights(trainer), whole[1]) and metrics(run) == metrics(whole[0])
    assert checkpoints(run) == {"step2", "step4", "step6", "step7"} and saves.latest(run) == run / "step7"
    caplog.clear()
    for folder in run.glob("step*"):
        saves.check_complete(folder)


def test_damaged_ones_are_not_among_those_to_keep(plain: Path, run: Path) -> None:
    flip_a_bit(run / "step6" / PART)
    train(plain, run, *SAVES, "--save_num_checkpoints_to_keep=2")
    assert checkpoints(run) == {"step6", "step7"}


def test_where_all_are_damaged_nothing_begins(plain: Path, run: Path) -> None:
    for step in (2, 4, 6):
        flip_a_bit(run / f"step{step}" / PART)
    before = metrics(run)
    with pytest.raises(
        ValueError, match=r"step6/model_and_optim/__0_0.distcp: its checksum is .*; no checkpoint in .* is complete"
    ):
        Trainer(configure(plain, run, *SAVES), CPU, Ranks())
    assert metrics(run) == before and len(checkpoints(run)) == 3


def test_a_damaged_starting_point_is_named(plain: Path, tmp_path: Path) -> None:
    train(plain, tmp_path, "--save_steps_unsharded=[6]", "--stop_at=6")
    flip_a_bit(tmp_path / "step6-unsharded/optim.pt")
    start = (f"--load_path={tmp_path / 'step6-unsharded'}", "--stop_at=7")
    with pytest.raises(ValueError, match=r"damaged checkpoint: .*step6-unsharded/optim.pt: its checksum") as caught:
        train(plain, tmp_path / "new", *start)
    assert "\n" not in str(caught.value) and not (tmp_path / "new").exists()
    train(plain, tmp_path / "new", *start, "--reset_optimizer_state")  # then it is not read
    assert series(tmp_path / "new").keys() == {7}


def test_links_to_the_newest(plain: Path, tmp_path: Path) -> None:
    train(plain, tmp_path, "--save_interval=3", "--save_interval_unsharded=2", "--stop_at=5")
    links = {name: os.readlink(tmp_path / name) for name in ("latest", "latest-unsharded")}
    assert links == {"latest": "step5", "latest-unsharded": "step5-unsharded"}
    train(plain, tmp_path, "--save_interval=3", "--try_load_latest_save", "--stop_at=6")
    assert (os.readlink(tmp_path / "latest"), os.readlink(tmp_path / "latest-unsharded")) == (
        "step6",
        "step5-unsharded",
    )
    train(plain, tmp_path / "other", f"--load_path={tmp_path / 'latest'}", "--max_duration=8")
    assert series(tmp_path / "other").keys() == {7, 8}
    train(plain, tmp_path, "--save_overwrite")  # a run without checkpoints
    assert not list(tmp_path.glob("latest*")) and not os.path.lexists(tmp_path / "latest")


def test_a_link_that_a_killed_process_did_not_move(plain: Path, run: Path) -> None:
    (run / "latest").unlink()
    (run / "latest").symlink_to("step4")
    train(plain, run, *SAVES, "--stop_at=6")
    assert os.readlink(run / "latest") == "step6"


@pytest.mark.parametrize(
    "settings, expected",
    [
        (("--save_interval_ephemeral=2",), "step6"),
        (("--save_interval_ephemeral=2", "--save_interval=5"), "step5 step7"),
        (("--save_interval_ephemeral=3", "--save_interval=4", "--stop_at=6"), "step4 step6"),  # 6 is the last
        (("--save_interval_ephemeral=1", "--save_interval_unsharded=4"), "step4-unsharded step7-unsharded"),
        (("--save_interval_ephemeral=1", "--save_steps_unsharded=[4]"), "step4-unsharded step7"),
    ],
)
def test_ephemeral_checkpoints_go_when_a_newer_one_is_whole(
    plain: Path, tmp_path: Path, settings: tuple[str, ...], expected: str
) -> None:
    train(plain, tmp_path, *settings)
    assert checkpoints(tmp_path) == set(expected.split())


def test_a_restart_knows_which_checkpoints_are_ephemeral(plain: Path, tmp_path: Path) -> None:
    train(plain, tmp_path, "--save_interval_ephemeral=2", "--stop_at=5")
    assert checkpoints(tmp_path) == {"step4"}
    train(plain, tmp_path, "--save_interval=6", "--try_load_latest_save")
    assert checkpoints(tmp_path) == {"step6", "step7"}


def test_what_killed_processes_left_goes(plain: Path, run: Path) -> None:
    for name in (".step7.partial", ".step1.removed", ".step7-unsharded.partial"):
        (run / name).mkdir()
        (run / name / "model.safetensors").write_bytes(b"half")
    (run / ".step8.mine").mkdir()
    train(plain, run, *SAVES)
    assert {path.name for path in run.glob(".step*")} == {".step8.mine"}


def test_what_a_kill_left_does_not_stand_in_the_way(tmp_path: Path) -> None:
    """Of moving a link, or of removing a checkpoint of the same name again."""
    for step in (4, 6):
        (tmp_path / f"step{step}").mkdir()
        (tmp_path / f"step{step}/model.safetensors").write_bytes(b"whole")
    (tmp_path / ".latest.partial").symlink_to("step4")
    saves.link_latest(tmp_path / "step6")
    assert os.readlink(tmp_path / "latest") == "step6"
    shutil.copytree(tmp_path / "step4", tmp_path / ".step4.removed")
    saves.delete(tmp_path / "step4")
    assert {path.name for path in tmp_path.iterdir()} == {"latest", "step6"}


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="this system does not tell which file is open")
def test_what_a_checkpoint_counts_on_is_on_the_disk_before_its_name(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files, and the names in their folders. Tables are synced as they are written."""
    synced: list[str] = []
    real_sync, real_rename = os.fsync, Path.rename

    def sync(opened: int) -> None:
        synced.append(os.path.relpath(os.readlink(f"/proc/self/fd/{opened}"), tmp_path))
        real_sync(opened)

    def rename(path: Path, target: Path) -> Path:
        synced.append(f"now {target.name}")
        return real_rename(path, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(Path, "rename", rename)
    data = f'{{"label": "walk", "data": {{"paths": ["{plain.parent / "heldout32.npy"}"]}}}}'
    train(plain, tmp_path, *SAVES, "--stop_at=2", f"--evaluators=[{data}]", "--eval_interval=2")
    before = synced[: synced.index("now step2")]
    assert any(name.startswith("losses/.step2.") for name in before)  # the table, before it gets its name
    wanted = {"metrics.jsonl", "data-indices/rank0.tsv", "losses", "data-indices", "."}
    wanted |= {".step2.partial", *(f".step2.partial/{name}" for name in os.listdir(tmp_path / "step2"))}
    assert wanted <= set(before)
    assert "." in synced[len(before) :]


def test_a_kill_between_two_saves_of_a_step_loses_neither(plain: Path, tmp_path: Path) -> None:
    both = (*SAVES, "--save_interval_unsharded=2", "--save_num_checkpoints_to_keep=1")
    train(plain, tmp_path, *both)
    whole = {path.name: (path / "manifest.json").read_text() for path in tmp_path.glob("step*")}
    assert whole.keys() == {"step7", *(f"step{step}-unsharded" for step in (2, 4, 6, 7))}
    rate = read_training_state(tmp_path / "step7-unsharded", "optim")["param_groups"][0]["lr"]
    shutil.copytree(tmp_path / "step7", tmp_path / "step6")  # before the older one was removed
    for lost in ("step7", "step7-unsharded"):
        shutil.rmtree(tmp_path / lost)
        (tmp_path / "latest").unlink()
        train(plain, tmp_path, *both)
        assert {path.name for path in tmp_path.glob("step*")} == whole.keys()
        saves.check_complete(tmp_path / lost)
        links = {name: os.readlink(tmp_path / name) for name in ("latest", "latest-unsharded")}
        assert links == {"latest": "step7", "latest-unsharded": "step7-unsharded"}
    assert read_training_state(tmp_path / "step7-unsharded", "optim")["param_groups"][0]["lr"] == rate


def test_a_run_killed_before_its_first_checkpoint_begins_anew(plain: Path, tmp_path: Path) -> None:
    settings = ("--save_interval=5", "--try_load_latest_save")
    train(plain, tmp_path / "whole", *settings)
    train(plain, tmp_path / "run", *settings)
    for path in tmp_path.glob("run/step*"):
        shutil.rmtree(path)
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "run/metrics.jsonl").write_text("".join(lines[:3]) + lines[3][:10])
    with pytest.raises(ConfigurationError, match="holds a run without a checkpoint"):  # another run
        train(plain, tmp_path / "run", *settings, "--seed=12")
    train(plain, tmp_path / "run", *settings)
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    for path in tmp_path.glob("run/step*"):
        shutil.rmtree(path)
    with pytest.raises(ConfigurationError, match="holds a run without a checkpoint"):  # one that was done
        train(plain, tmp_path / "run", *settings)


def test_a_run_goes_on_from_its_step_0(plain: Path, tmp_path: Path, whole: tuple[Path, Any]) -> None:
    settings = (*SAVES, "--no_pre_train_checkpoint=false")
    train(plain, tmp_path, *settings)
    for step in (2, 4, 6, 7):
        shutil.rmtree(tmp_path / f"step{step}")
    assert same(weights(train(plain, tmp_path, *settings)), whole[1])
    assert metrics(tmp_path) == metrics(whole[0])


def test_a_folder_that_becomes_read_only_is_named(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = TrainStep.run

    def close_the_folder(train_step: TrainStep, batch: Any, step: int, settings: StepSettings) -> Any:
        if step == 4:
            trainer.saver.wait()
            tmp_path.chmod(0o555)
        return real(train_step, batch, step, settings)

    monkeypatch.setattr(TrainStep, "run", close_the_folder)
    trainer = Trainer(configure(plain, tmp_path, *SAVES), CPU, Ranks())
    try:
        with modes_hold(), pytest.raises(OSError, match=r"/step4: cannot be saved \(Permission denied\); the"):
            trainer.fit()
    finally:
        tmp_path.chmod(0o755)
    assert saves.latest(tmp_path) == tmp_path / "step2"


def test_a_folder_that_cannot_be_written_is_named(plain: Path, run: Path) -> None:
    before = metrics(run)
    with modes_hold():
        for path in (run, *run.glob("*.jsonl"), run / "train.log"):
            path.chmod(0o555 if path.is_dir() else 0o444)
        try:
            with pytest.raises(PermissionError, match=r"run/\.lock"):
                train(plain, run, *SAVES)
        finally:
            run.chmod(0o755)
    assert metrics(run) == before and saves.latest(run) == run / "step6"
