"""Runs that are asked to end, or that lose a process, a disk or patience.

As a program, this file runs every case of two processes, as forks (importing takes longer than training), and prints
how they ended.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from olmo.checkpoint import manifest
from olmo.config import TrainConfig
from olmo.distributed import Ranks, exit_process
from olmo.exceptions import Interrupted, exit_status
from olmo.report.reporter import Reporter
from olmo.train import Trainer
from olmo.train.stopping import SIGNALS, Signals, Tags, Watch
from scripts.train import main as train_command
from tests.olmo.train.test_restart import in_a_fork
from tests.running import (
    CPU,
    ROOT,
    checkpoints,
    command,
    configure,
    indices,
    metrics,
    same,
    series,
    train,
    weights,
    write_world,
)

LONG = ("--max_duration=100000", "--save_interval=10", "--save_num_checkpoints_to_keep=2", "--try_load_latest_save")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


# --- signals ---


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_is_noted_and_the_handlers_before_come_back(
    number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    before = [signal.getsignal(n) for n in SIGNALS]
    with Signals() as signals:
        assert signals.received is None
        os.kill(os.getpid(), number)
        assert signals.received == number
        os.kill(os.getpid(), number)  # the same one once more, as torchrun would
    assert [signal.getsignal(n) for n in SIGNALS] == before
    assert capfd.readouterr().err == f"{number.name}: finishing the step and saving; another signal ends at once\n"


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_at_once(second: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("olmo.train.stopping._SAME_SIGNAL", 0.05)

    def busy() -> None:
        with Signals():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)
            os.kill(os.getpid(), second)

    assert in_a_fork(busy) == 128 + second


def test_another_thread_leaves_signals_alone() -> None:
    before = signal.getsignal(signal.SIGTERM)
    found = []

    def work() -> None:
        with Signals():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [before]


@pytest.fixture(scope="module")
def unbroken(world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("unbroken")
    return folder, weights(train(world / "config.yaml", folder, "--save_interval=5"))


@pytest.mark.parametrize("step", [2, 3, 5, 7])  # injected; evaluated; saved anyhow; the last
def test_a_run_that_gets_a_signal_saves_and_goes_on_to_the_same_end(
    world: Path, tmp_path: Path, unbroken: tuple[Path, Any], step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Reporter.metrics

    def metrics_and_signal(reporter: Reporter, now: int, values: dict[str, float]) -> None:
        real(reporter, now, values)
        if now == step and "train/CrossEntropyLoss" in values:
            os.kill(os.getpid(), signal.SIGUSR1)

    monkeypatch.setattr(Reporter, "metrics", metrics_and_signal)
    trainer = Trainer(
        configure(world / "config.yaml", tmp_path, "--save_interval=5"), CPU, Ranks(), signals := Signals()
    )
    with signals:
        if step == 7:
            trainer.fit()  # done before it could be stopped
        else:
            with pytest.raises(Interrupted, match=rf"^SIGUSR1 at step {step}; saved .*/step{step}; add --try"):
                trainer.fit()
    monkeypatch.undo()
    assert max(series(tmp_path)) == step
    assert manifest.is_ephemeral(tmp_path / f"step{step}") == (step in (2, 3))
    whole, final = unbroken
    trainer = train(world / "config.yaml", tmp_path, "--save_interval=5", "--try_load_latest_save")
    assert same(weights(trainer), final)
    assert metrics(tmp_path) == metrics(whole) and indices(tmp_path) == indices(whole)
    assert (tmp_path / "injections.jsonl").read_bytes() == (whole / "injections.jsonl").read_bytes()
    assert checkpoints(tmp_path) == checkpoints(whole) == {"step5", "step7"}


# --- the time limit ---


def test_after_the_time_limit_some_steps_more_which_a_restart_does_again(
    world: Path, tmp_path: Path, unbroken: tuple[Path, Any]
) -> None:
    limited = ("--time_limit=1e-9", "--extra_steps_after_cancel=4", "--save_interval=5")
    with pytest.raises(Interrupted, match=r"^time_limit of 1e-09 seconds at step 1; saved .*/step1; add --try_load"):
        train(world / "config.yaml", tmp_path, *limited)
    # Neither the evaluation of step 3 nor the checkpoint of step 5.
    assert set(series(tmp_path)) == {1, 2, 3, 4, 5} and not series(tmp_path, "eval/K")
    assert checkpoints(tmp_path) == {"step1"}
    train(world / "config.yaml", tmp_path, "--save_interval=5", "--try_load_latest_save")
    assert metrics(tmp_path) == metrics(unbroken[0]) and checkpoints(tmp_path) == {"step5", "step7"}


def test_steps_after_the_time_limit_do_not_reach_the_last_one(world: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted, match="at step 1"):
        train(world / "plain.yaml", tmp_path, "--time_limit=1e-9")
    assert set(series(tmp_path)) == {1, 2, 3, 4, 5, 6}


def test_a_signal_ends_the_steps_after_the_time_limit(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limited = ("--time_limit=1e-9", "--extra_steps_after_cancel=90", "--max_duration=99")
    signals, real = Signals(), Reporter.metrics

    def metrics_and_signal(reporter: Reporter, now: int, values: dict[str, float]) -> None:
        real(reporter, now, values)
        signals.received = signal.SIGTERM if now == 4 else None

    monkeypatch.setattr(Reporter, "metrics", metrics_and_signal)
    with pytest.raises(Interrupted, match=r"^time_limit of 1e-09 seconds at step 1; saved .*/step1; add --try_load"):
        Trainer(configure(world / "plain.yaml", tmp_path, *limited), CPU, Ranks(), signals).fit()
    assert max(series(tmp_path)) == 4


def test_a_run_that_ends_at_the_time_limit_is_done(world: Path, tmp_path: Path) -> None:
    train(world / "plain.yaml", tmp_path, "--time_limit=1e-9", "--stop_at=1")
    train(world / "plain.yaml", tmp_path / "enough", "--time_limit=1000")


def test_a_signal_is_heard_also_before_the_time_limit() -> None:
    signals = Signals()
    signals.received = signal.SIGTERM
    for limit, told in ((1000.0, "SIGTERM at step 4"), (None, "SIGTERM at step 4"), (1e-9, "time_limit of 1e-09")):
        config = TrainConfig(time_limit=limit)
        cancelled = Watch(config, Ranks(), signals).asked(4)
        assert cancelled is not None and cancelled.reason.startswith(told)
        assert cancelled.extra_steps == (config.extra_steps_after_cancel if limit == 1e-9 else 0)


def test_the_time_limit_is_checked_after_every_step_and_tags_at_least_every_minute(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Steps may take minutes, of which 50 would be hours."""
    now, asked = [1000.0], []
    monkeypatch.setattr("olmo.train.stopping.time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(Tags, "_read", lambda self: asked.append(now[0]))
    tags = Tags(SimpleNamespace(offline=False, disabled=False))
    watch = Watch(TrainConfig(time_limit=200, canceled_check_interval=10**6), Ranks(), Signals(), tags)
    for step, now[0] in enumerate((1001.0, 1050.0, 1062.0, 1130.0, 1199.9), start=1):
        assert watch.asked(step) is None
        if tags._request is not None:
            tags._request.join()
    assert asked == [1001.0, 1062.0, 1130.0, 1199.9]
    now[0] = 1200.0
    cancelled = watch.asked(7)
    assert cancelled is not None and cancelled.reason == "time_limit of 200 seconds at step 7"


# --- early stopping ---


@pytest.mark.parametrize(
    ("done", "loss", "stops"), [(4, 2.01, True), (4, 2.0, False), (4, 0.5, False), (3, 2.01, False), (5, 2.01, False)]
)
def test_a_loss_of_more_than_the_factor_times_the_lowest(done: int, loss: float, stops: bool) -> None:
    """After a warm-up of 3 steps, at every second one."""
    config = TrainConfig(early_stopping_factor=2.0, canceled_check_interval=2)
    config.scheduler.t_warmup = 3
    watch = Watch(config, Ranks(), Signals(), lowest_loss=1.0)
    watch.track(torch.tensor(loss))
    assert (watch.diverged(done, done) is not None) == stops


WILD = ("--optimizer.learning_rate=0.5", "--scheduler.name=constant", "--scheduler.t_warmup=3", "--max_duration=12")


@pytest.fixture(scope="module")
def wild(world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The losses of a run that does not get better."""
    folder = tmp_path_factory.mktemp("wild")
    train(world / "plain.yaml", folder, *WILD)
    return series(folder)


@pytest.mark.parametrize("factor, interval", [(1.0, 1), (1.05, 2), (1.0, 5), (100.0, 1)])
@pytest.mark.parametrize("restarted", [False, True])
def test_a_loss_that_rises_ends_the_run(
    world: Path, tmp_path: Path, wild: dict[int, float], factor: float, interval: int, restarted: bool
) -> None:
    expected = next(
        (
            step
            for step in range(4, 12)  # after the warm-up, before the last
            if step % interval == 0 and wild[step] > factor * min(wild[s] for s in range(1, step + 1))
        ),
        None,
    )
    watched = (*WILD, f"--early_stopping_factor={factor}", f"--canceled_check_interval={interval}")
    if restarted:
        train(world / "plain.yaml", tmp_path, *watched, "--stop_after=3", "--save_interval=100")
        watched = (*watched, "--try_load_latest_save")
    if expected is None:
        assert factor == 100
        train(world / "plain.yaml", tmp_path, *watched)
        return
    told = rf"^loss {wild[expected]:.4f} at step {expected} is more than early_stopping_factor {factor:g} times .*saved"
    with pytest.raises(ValueError, match=told):
        train(world / "plain.yaml", tmp_path, *watched)
    assert f"step{expected}" in checkpoints(tmp_path) and max(series(tmp_path)) == expected


# --- two processes ---


def await_step(folder: Path, step: int, patience: float = 60) -> None:
    deadline = time.monotonic() + patience
    while not (folder / f"step{step}").is_dir() and time.monotonic() < deadline:
        time.sleep(0.01)


def two(world: Path, name: str, act: Callable[[list[int]], None], *settings: str) -> dict[str, Any]:
    """Two processes train until `act`, called after step 10, has done something to them; how they ended."""
    folder = world / name
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    ranks = []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE="2", RANK=str(rank), LOCAL_RANK="0")
            log = os.open(world / f"{name}{rank}.log", os.O_CREAT | os.O_WRONLY)
            os.dup2(log, 1)
            os.dup2(log, 2)
            exit_process(
                exit_status(train_command, [str(world / "plain.yaml"), f"--save_folder={folder}", *LONG, *settings])
            )
        ranks.append(child)
    await_step(folder, 10)
    started = time.monotonic()
    act(ranks)
    status = {}
    while len(status) < 2:
        child, how = os.wait()
        status[child] = os.waitstatus_to_exitcode(how)
        if status[child] == 1 and len(status) == 1 and "hangs" in name:  # as torchrun or SLURM
            os.kill(next(rank for rank in ranks if rank != child), signal.SIGKILL)
    log = (world / f"{name}0.log").read_text()
    return {
        "status": [status[rank] for rank in ranks],
        "seconds": time.monotonic() - started,
        "error": [line for line in log.splitlines() if line.startswith(("error: ", "interrupted: "))],
        "damaged": [p.name for p in folder.glob("step*") if manifest.problem(p) or not (p / "manifest.json").is_file()],
        "saved": len(list(folder.glob("step*"))),
    }


def fill_the_disk(ranks: list[int]) -> None:
    """No file of the first process may grow beyond 50 kB: the weights do not fit, all it has told does."""
    resource.prlimit(ranks[0], resource.RLIMIT_FSIZE, (50_000, 50_000))


CASES: dict[str, tuple[Callable[[list[int]], None], tuple[str, ...]]] = {
    "a signal to one": (lambda ranks: os.kill(ranks[1], signal.SIGUSR1), ()),
    "one is killed": (lambda ranks: os.kill(ranks[1], signal.SIGKILL), ()),
    "the first is killed": (lambda ranks: os.kill(ranks[0], signal.SIGKILL), ()),
    "one hangs": (lambda ranks: os.kill(ranks[1], signal.SIGSTOP), ("--collective_timeout=2",)),
    "no space": (fill_the_disk, ()),
}


@pytest.fixture(scope="module")
def report(world: Path) -> Iterator[dict[str, dict[str, Any]]]:
    done = command([str(ROOT / "tests/olmo/train/test_stopping.py"), str(world)], world)
    assert done.returncode == 0, done.stderr[-3000:]
    yield json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("case", "status", "error"),
    [
        ("a signal to one", [75, 75], "interrupted: SIGUSR1 at step "),
        (
            "one is killed",
            [1, -9],
            "error: another process has ended; its own last lines may give the reason; --try_load_latest_save ",
        ),
        ("the first is killed", [-9, 1], ""),
        ("one hangs", [1, -9], "error: another process did not answer for 2 seconds (collective_timeout); "),
        ("no space", [1, 1], "cannot be saved (File too large); the checkpoints before it are intact"),
    ],
)
def test_what_happens_to_one_of_two_processes_ends_both(
    report: dict[str, dict[str, Any]], case: str, status: list[int], error: str
) -> None:
    found = report[case]
    assert found["status"] == status
    assert len(found["error"]) == bool(error) and error in "".join(found["error"])
    assert not found["damaged"] and found["saved"] >= 1
    assert found["seconds"] < 60


if __name__ == "__main__":
    for module in ("torch._dynamo", "pandas"):  # every fork would anew
        import_module(module)
    print(json.dumps({name: two(Path(sys.argv[1]), name, act, *more) for name, (act, more) in CASES.items()}))
