"""Which checkpoints a run saves, and which of them it keeps."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.running import (
    checkpoints,
    train,
    write_world,
)


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
