"""A run that is killed (SIGKILL) at any moment around an injection and started again is the run that was never killed.

As a program, this file trains once undisturbed, then once for each case: a forked process that kills itself at that
moment, and a second one that goes on. Forks, because importing everything takes longer than training.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

from olmo import checkpoint
from olmo.checkpoint import writing
from olmo.checkpoint.background import BackgroundTask
from olmo.distributed import Ranks
from olmo.report.reporter import Reporter
from olmo.train import Trainer
from olmo.train.step import TrainStep
from tests.running import CPU, ROOT, command, configure, indices, metrics, write_world

INJECTED = {2: 1, 4: 2}  # step -> round
SETTINGS = ["--max_duration=5", "--eval_interval=2", "--save_num_checkpoints_to_keep=2"]
PROBES = "--evaluators=[{{label: once_memorization, data: {{dataset_path: '{}/once.json'}}}}]"
MOMENTS = ("after the step", "half a line", "line", "logged", "evaluated", "saving", "saved")
CASES = [
    *((moment, 3, 1) for moment in ("after the step", "saved")),
    *((moment, 4, 1) for moment in MOMENTS),
    ("after the step", 5, 1),
    *(("logged", step, 3) for step in (4, 5)),  # beyond its last checkpoint, before and after which are injections
]  # (moment, step, save_interval)


def name_of(case: tuple[str, int, int]) -> str:
    return f"{case[0]} {case[1]} of every {case[2]}"


def kill_at(moment: str, step: int) -> None:
    """From now on this process dies when it comes to that moment of that step."""

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def tear(reporter: Reporter, *_: Any) -> None:
        lines = reporter.folder / "injections.jsonl"
        os.truncate(lines, lines.stat().st_size - 30)

    # moment -> what is called then, where its arguments tell the step, and what of the call still happens.
    owner, name, step_of, happens = {
        "after the step": (TrainStep, "run", lambda _, batch, now, *rest: now, True),
        "half a line": (Reporter, "injection", lambda _, now, *rest: now, True),
        "line": (Reporter, "injection", lambda _, now, *rest: now, True),
        "logged": (Reporter, "metrics", lambda _, now, *rest: now, True),
        "evaluated": (Reporter, "evaluation", lambda _, now, *rest: now, False),
        # The rename is the last of saving: all is written, under another name.
        "saving": (Path, "rename", lambda _, path: step if path.name == f"step{step}" else 0, False),
        "saved": (writing, "save_sharded", lambda path, *rest: int(path.name.removeprefix("step")), True),
    }[moment]
    real = getattr(owner, name)

    def wrapped(*arguments: Any, **named: Any) -> Any:
        due = step_of(*arguments) == step
        if due and not happens:
            die()
        result = real(*arguments, **named)
        if due and moment == "half a line":
            tear(*arguments)
        if due:
            die()
        return result

    setattr(owner, name, wrapped)


def in_a_fork(work: Callable[..., object], *arguments: Any) -> int:
    """Call it in another process; how that ended: its exit status, or minus the signal."""
    child = os.fork()
    if child == 0:
        try:
            work(*arguments)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_and_go_on(world: Path) -> dict[str, list[int]]:
    """All runs, in folders beside the world's files; name -> how its processes ended."""
    config = configure(world / "config.yaml", world, *SETTINGS, PROBES.format(world))

    def run(folder: str, interval: int, goes_on: bool = False) -> None:
        own = {"save_folder": str(world / folder), "save_interval": interval, "try_load_latest_save": goes_on}
        Trainer(replace(config, **own), CPU, Ranks()).fit()

    def killed(moment: str, step: int, interval: int) -> None:
        begin = BackgroundTask.start
        # On a slow machine the thread would still write the checkpoint that the moment is to come after.
        BackgroundTask.start = lambda task, work: (begin(task, work), task.wait())  # type: ignore[assignment,method-assign]
        kill_at(moment, step)
        run(name_of((moment, step, interval)), interval)

    for name in ("torch._dynamo", "pandas"):  # the first optimizer and the first table would, in every fork anew
        import_module(name)
    ended = {}
    for interval in (1, 3):
        ended[f"unbroken {interval}"] = [in_a_fork(run, f"unbroken {interval}", interval)]
    for case in CASES:
        first = in_a_fork(killed, *case)
        ended[name_of(case)] = [first, in_a_fork(run, name_of(case), case[2], True)]
    return ended


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def ended(world: Path) -> dict[str, list[int]]:
    done = command([str(ROOT / "tests/olmo/train/test_restart.py"), str(world)], world)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", CASES, ids=map(name_of, CASES))
def test_a_killed_run_goes_on_as_if_it_never_had_been(
    world: Path, ended: dict[str, list[int]], case: tuple[str, int, int]
) -> None:
    assert ended[name_of(case)] == [-signal.SIGKILL, 0]
    whole, mine = world / f"unbroken {case[2]}", world / name_of(case)
    assert metrics(mine) == metrics(whole)
    assert indices(mine) == indices(whole)
    assert (mine / "injections.jsonl").read_bytes() == (whole / "injections.jsonl").read_bytes()
    for table in ("probes/step2.parquet", "probes/step4.parquet", "probes/step5.parquet"):
        assert pyarrow.parquet.read_table(mine / table).equals(pyarrow.parquet.read_table(whole / table))
    weights, expected = (checkpoint.read_state(folder / "step5") for folder in (mine, whole))
    assert weights.keys() == expected.keys() and all(weights[name].equal(expected[name]) for name in expected)


@pytest.mark.parametrize("interval", [1, 3])
def test_the_unbroken_run_injected_every_round_once(world: Path, ended: dict[str, list[int]], interval: int) -> None:
    assert ended[f"unbroken {interval}"] == [0]
    lines = (world / f"unbroken {interval}" / "injections.jsonl").read_text(encoding="utf-8").splitlines()
    assert {line["step"]: line["round"] for line in map(json.loads, lines)} == INJECTED and len(lines) == 2


if __name__ == "__main__":
    print(json.dumps(kill_and_go_on(Path(sys.argv[1]))))
