"""Which checkpoints a run saves, and which of them it keeps."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from olmo.exceptions import Interrupted
from tests.running import (
    checkpoints,
    same,
    train,
    weights,
    write_world,
)

WEIGHTS = ("--save_unsharded_optimizer=false",)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def plain(folder: Path) -> Path:
    """The configuration with neither: the least that trains."""
    return folder / "plain.yaml"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("--no_pre_train_checkpoint=false", "--save_interval=3"), "step0 step3 step6 step7"),
        (("--save_interval=3",), "step3 step6 step7"),
        (("--save_interval=3", "--save_num_checkpoints_to_keep=1"), "step7"),
        (("--save_interval=3", "--save_num_checkpoints_to_keep=0"), "step7"),  # never none
        (("--save_interval=3", "--save_num_checkpoints_to_keep=2"), "step6 step7"),
        (("--save_interval_unsharded=4",), "step4-unsharded step7-unsharded"),
        (("--save_interval_unsharded=2", "--save_num_unsharded_checkpoints_to_keep=1"), "step7-unsharded"),
        (("--save_steps_unsharded=[2,5]",), "step2-unsharded step5-unsharded"),
        (("--save_steps_unsharded=[0,2]", "--no_pre_train_checkpoint=false"), "step0-unsharded step2-unsharded"),
        (("--force_save_unsharded",), "step7-unsharded"),
        (
            ("--save_interval=3", "--save_num_checkpoints_to_keep=1", "--save_interval_unsharded=6"),
            "step7 step6-unsharded step7-unsharded",
        ),
        (  # weights alone replace no checkpoint that can resume the run
            (*WEIGHTS, "--save_interval_unsharded=3", "--save_interval_ephemeral=2"),
            "step3-unsharded step6 step6-unsharded step7-unsharded",
        ),
        (("--save_interval=3", "--save_interval_unsharded=3", "--dry_run", "--no_pre_train_checkpoint=false"), ""),
        ((), ""),
    ],
)  # fmt: skip
def test_which_checkpoints_a_run_leaves(plain: Path, tmp_path: Path, overrides: tuple[str, ...], expected: str) -> None:
    train(plain, tmp_path / "run", *overrides)
    assert checkpoints(tmp_path / "run") == set(expected.split())


def test_a_restart_still_counts_the_checkpoints_to_keep(plain: Path, tmp_path: Path) -> None:
    settings = ("--save_interval=2", "--save_num_checkpoints_to_keep=2", "--save_steps_unsharded=[1]")
    train(plain, tmp_path, *settings, "--stop_after=4")
    assert checkpoints(tmp_path) == {"step2", "step4", "step1-unsharded"}
    train(plain, tmp_path, *settings, "--try_load_latest_save")
    assert checkpoints(tmp_path) == {"step6", "step7", "step1-unsharded"}


def test_files_of_a_run_have_the_modes_that_the_umask_gives(plain: Path, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        train(plain, tmp_path / "run", "--save_interval=1", "--save_interval_unsharded=1", "--stop_at=1")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert {"model.safetensors", "__0_0.distcp"} <= modes.keys()
    assert set(modes.values()) == {0o640}, modes


# --- weights alone ---


def test_unsharded_checkpoints_without_the_optimizer(
    plain: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A third of the size. A run resumes from its other checkpoints, and to start from one both states are reset."""
    unbroken = train(plain, tmp_path / "unbroken", "--save_interval_unsharded=7")
    settings = (*WEIGHTS, "--save_interval_unsharded=3", "--save_interval_ephemeral=2")
    train(plain, tmp_path / "run", *settings, "--stop_after=6")
    assert not any("begins anew" in message for message in caplog.messages)
    alone = tmp_path / "run" / "step6-unsharded"
    assert {path.name for path in alone.iterdir()} == {"config.yaml", "manifest.json", "model.safetensors"}
    sizes = [sum(path.stat().st_size for path in folder.iterdir()) for folder in (alone, tmp_path / "unbroken/latest/")]
    assert sizes[0] < 0.4 * sizes[1]
    links = {name: os.readlink(tmp_path / "run" / name) for name in ("latest", "latest-unsharded")}
    assert links == {"latest": "step6", "latest-unsharded": "step6-unsharded"}
    resumed = train(plain, tmp_path / "run", *settings, "--try_load_latest_save")
    assert resumed.resumed_at == 6 and same(weights(resumed), weights(unbroken))
    with pytest.raises(FileNotFoundError, match=r"\.pt: missing; set reset_optimizer_state and reset_trainer_state to"):
        train(plain, tmp_path / "other", f"--load_path={alone}")
    resets = ("--reset_optimizer_state", "--reset_trainer_state", "--stop_at=1")
    train(plain, tmp_path / "other", f"--load_path={alone}", *resets)


def test_a_run_that_saves_weights_alone_warns_and_can_still_be_cancelled(
    plain: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = (*WEIGHTS, "--save_interval_unsharded=1")
    with pytest.raises(Interrupted, match=r"at step 1; saved .*/step1; add"):
        train(plain, tmp_path, *settings, "--time_limit=1e-9", "--extra_steps_after_cancel=0")
    assert any("if this run is killed, it begins anew" in message for message in caplog.messages)
    assert train(plain, tmp_path, *settings, "--try_load_latest_save").resumed_at == 1
