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
from importlib import import_module
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

from olmo import checkpoint
from olmo.eval.evaluators import Evaluators
from olmo.reporting import Reporter
from olmo.train import Trainer
from tests.running import ROOT, command, indices, metrics, train, write_world

INJECTED = {2: 1, 4: 2}  # step -> round
SETTINGS = ["--max_duration=5", "--eval_interval=2", "--save_num_checkpoints_to_keep=2"]
PROBES = "--evaluators=[{{label: once_memorization, data: {{dataset_path: '{}/once.json'}}}}]"
AROUND = ("before the step", "after the step", "half a line", "line", "logged", "evaluating", "evaluated")
CASES = [
    *((moment, 3, 1) for moment in ("after the step", "saving", "saved")),
    *((moment, 4, 1) for moment in (*AROUND, "saving", "saved")),
    *((moment, 5, 1) for moment in ("after the step", "logged", "saving")),
    *(("logged", step, 3) for step in (4, 5)),  # beyond its last checkpoint, before and after which are injections
]  # (moment, step, save_interval)


def name_of(case: tuple[str, int, int]) -> str:
    return f"{case[0]} {case[1]} of every {case[2]}"


def kill_at(moment: str, step: int) -> None:
    """From now on this process dies when it comes to that moment."""

    def reached(name: str, now: int) -> None:
        if (name, now) == (moment, step):
            os.kill(os.getpid(), signal.SIGKILL)

    def around(owner: Any, name: str, before: str, after: str, now: Callable[..., int]) -> None:
        real = getattr(owner, name)

        def wrapped(*arguments: Any, **named: Any) -> Any:
            reached(before, now(*arguments))
            result = real(*arguments, **named)
            reached(after, now(*arguments))
            return result

        setattr(owner, name, wrapped)

    rename, injection = Path.rename, Reporter.injection

    def renamed(path: Path, target: Path) -> Path:
        if target.name == f"step{step}":
            reached("saving", step)  # all is written, under another name
        return rename(path, target)

    def half_written(reporter: Reporter, now: int, *arguments: Any) -> None:
        injection(reporter, now, *arguments)
        if (moment, step) == ("half a line", now):
            lines = reporter.folder / "injections.jsonl"
            os.truncate(lines, lines.stat().st_size - 30)
        reached("half a line", now)

    def trained_to(evaluators: Evaluators, *_: Any) -> int:
        return trainers[0].state.step

    trainers: list[Trainer] = []
    begin = Trainer.fit
    Trainer.fit = lambda trainer: (trainers.append(trainer), begin(trainer))[1]  # type: ignore[assignment,method-assign]
    Path.rename = renamed  # type: ignore[assignment,method-assign]
    Reporter.injection = half_written  # type: ignore[assignment,method-assign]
    around(Trainer, "_train_step", "before the step", "after the step", lambda _, batch, now, length: now)
    around(Reporter, "injection", "", "line", lambda _, now, *rest: now)
    around(Trainer, "_log", "", "logged", lambda _, now, *rest: now)
    around(Evaluators, "run", "evaluating", "", trained_to)
    around(Reporter, "evaluation", "", "evaluated", lambda _, now, *rest: now)
    around(checkpoint, "save", "", "saved", lambda path, *rest: int(path.name.removeprefix("step")))


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

    def run(folder: str, interval: int, *more: str) -> object:
        probes = PROBES.format(world)
        return train(world / "config.yaml", world / folder, *SETTINGS, probes, f"--save_interval={interval}", *more)

    def killed(moment: str, step: int, interval: int) -> object:
        kill_at(moment, step)
        return run(name_of((moment, step, interval)), interval)

    for name in ("torch._dynamo", "pandas"):  # the first optimizer and the first table would, in every fork anew
        import_module(name)
    ended = {}
    for interval in (1, 3):
        ended[f"unbroken {interval}"] = [in_a_fork(run, f"unbroken {interval}", interval)]
    for case in CASES:
        first = in_a_fork(killed, *case)
        ended[name_of(case)] = [first, in_a_fork(run, name_of(case), case[2], "--try_load_latest_save")]
    return ended


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def ended(world: Path) -> dict[str, list[int]]:
    done = command([str(ROOT / "tests/olmo/test_restart.py"), str(world)], world)
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
