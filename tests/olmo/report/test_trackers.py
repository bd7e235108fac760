"""Weights & Biases and TensorBoard: what they show, and what they show of a run that was killed."""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from olmo.config import DataConfig, TrainConfig, WandbConfig
from olmo.exceptions import MissingPackage
from olmo.report import trackers
from olmo.report.reporter import Reporter
from tests.olmo.train.test_restart import in_a_fork
from tests.reporting import metrics, run_to
from tests.running import train, write_world


def test_wandb_that_is_not_installed_is_named(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(
        MissingPackage, match=r"wandb: wandb is not installed: pip install 'knowledge-entropy\[wandb\]'"
    ):
        trackers.start_wandb(TrainConfig(wandb=WandbConfig()), Path("wandb-id.txt"), resumed=False)


def test_wandb_gets_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: dict[str, Any] = {}
    started = SimpleNamespace(id="abc")
    fake = SimpleNamespace(init=lambda **given: sent.update(given) or started, Error=OSError)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr("olmo.console._SECRETS", {"6198": "${oc.env:BUCKET}"})  # the seed, too
    paths = ["https://user:passw0rd@host.org/a.npy", "https://6198.org/b.npy?X-Amz-Signature=abc"]
    config = TrainConfig(wandb=WandbConfig(), data=DataConfig(paths=paths))
    assert trackers.start_wandb(config, tmp_path / "id.txt", resumed=False) is started
    assert sent["config"]["data"]["paths"] == ["https://host.org/a.npy", "https://${oc.env:BUCKET}.org/b.npy?..."]
    assert sent["config"]["seed"] == 6198


def events(folder: Path) -> list[tuple[str, int, float]]:
    """Name, step and value of all that TensorBoard shows, as its own reader has it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    names = reader.Tags()["scalars"]
    return sorted((name, event.step, event.value) for name in names for event in reader.Scalars(name))


def as_events(folder: Path) -> list[tuple[str, int, float]]:
    """The same from metrics.jsonl, in float32 as TensorBoard has it."""
    lines = metrics(folder)
    return sorted(
        (k, int(line["step"]), float(np.float32(v))) for line in lines for k, v in line.items() if k != "step"
    )


def wait_for_the_next_second() -> None:
    """TensorBoard reads files in the order of their names, which begin with the second at which they were made."""
    time.sleep(1.01 - time.time() % 1)


@pytest.fixture
def board(config: TrainConfig) -> TrainConfig:
    return replace(config, tensorboard=True)


def test_tensorboard_shows_what_metrics_has(board: TrainConfig) -> None:
    run_to(board, [1, 2, 3])
    folder = Path(board.save_folder)
    assert events(folder) == as_events(folder) and len(events(folder)) == 9
    run_to(board, [7])  # a run that replaces it
    assert events(folder) == as_events(folder) and {step for _, step, _ in events(folder)} == {7}


def test_tensorboard_shows_no_step_twice_after_a_kill(board: TrainConfig) -> None:
    def work() -> None:
        reporter = Reporter(board, active=True, resume_step=None)
        for step in range(1, 9):
            reporter.metrics(step, {"train/CrossEntropyLoss": float(step), "learning rate": 0.1})
            if step == 4:
                reporter.on_disk()
        time.sleep(0.1)  # while events are being written, or not
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_a_fork(work) == -signal.SIGKILL
    folder = Path(board.save_folder)
    (file,) = (folder / "tensorboard").iterdir()
    assert [e for e in events(folder) if e[1] <= 4] == [e for e in as_events(folder) if e[1] <= 4] != []
    for torn in (b"\x20\0\0", b"\x20\0\0\0\0\0\0\0\1\2\3\4torn", bytes(20)):
        with file.open("ab") as end:
            end.write(torn)
        wait_for_the_next_second()
        run_to(board, [5, 6], resume_step=4)
        assert events(folder) == as_events(folder) and {step for _, step, _ in events(folder)} == set(range(1, 7))


def test_a_run_shows_the_same_in_tensorboard_and_goes_on_in_it(board: TrainConfig, tmp_path: Path) -> None:
    world = write_world(tmp_path / "world")
    settings = ("--tensorboard", "--save_interval=2", "--eval_interval=2")
    run = tmp_path / "own"
    train(world / "config.yaml", run, *settings, "--stop_after=3")
    wait_for_the_next_second()
    train(world / "config.yaml", run, *settings, "--try_load_latest_save", "--console_log_interval=3")
    assert events(run) == as_events(run)
    assert {step for name, step, _ in events(run) if name == "eval/K"} == {2, 3, 4, 6, 7}
    train(world / "config.yaml", run, "--dry_run", "--save_overwrite", *settings)
    assert events(run) == as_events(run)


@pytest.mark.parametrize(("active", "dry_run"), [(False, False), (True, True)])
def test_other_ranks_and_a_dry_run_write_no_events(board: TrainConfig, active: bool, dry_run: bool) -> None:
    reporter = Reporter(replace(board, dry_run=dry_run), active=active, resume_step=None)
    reporter.close()
    assert not Path(board.save_folder).exists()


def test_tensorboard_that_is_not_installed_is_named(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    run_to(config, [1])
    with pytest.raises(
        MissingPackage, match=r"tensorboard is not installed: pip install 'knowledge-entropy\[tensorboard\]'"
    ):
        Reporter(replace(config, tensorboard=True), active=True, resume_step=None)
    assert metrics(Path(config.save_folder))  # the older run is still there
