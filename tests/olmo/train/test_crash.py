"""The short form of `make crash`: forks of one process are killed, and end as the run that was not."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.crash import differences, same
from tests.running import ROOT, command, train, write_world


@pytest.mark.parametrize("kills, more", [(5, []), (1, ["--family=Qwen2", "--eval_interval=9", "--max_duration=3"])])
def test_a_run_that_is_killed_anywhere_ends_with_the_same_bits(kills: int, more: list[str], tmp_path: Path) -> None:
    options = [f"--kills={kills}", "--each=5", "--seed=1", "--fork", "--small", *more]
    done = command([str(ROOT / "tests/crash.py"), str(tmp_path / "runs"), *options], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["kills"] == sum(report["places"].values()) == kills and not report["differences"]


def test_differences_are_found(tmp_path: Path) -> None:
    world = write_world(tmp_path / "world")
    settings = ("--max_duration=2", "--save_interval=2", "--save_interval_unsharded=2", "--eval_interval=1")
    for name in ("a", "b"):
        train(world / "config.yaml", tmp_path / name, *settings)
    a, b = tmp_path / "a", tmp_path / "b"
    assert differences(a, b) == []
    (b / "latest").unlink()
    os.symlink("step2-unsharded", b / "latest")
    (b / "step2").rename(b / "step1")
    with (b / "injections.jsonl").open("a") as file:
        file.write("{}\n")
    (b / "losses/step1.parquet").unlink()
    assert differences(a, b) == ["checkpoints", "injections", "losses", "latest"]
    train(world / "config.yaml", tmp_path / "c", *settings, "--seed=12")
    found = differences(a, tmp_path / "c")
    assert {"metrics", "weights of step2", "optim of step2-unsharded"} <= set(found)


@pytest.mark.parametrize("one, other", [({"a": 1}, {"b": 1}), ([1], [1, 2]), ([1, {"a": 2}], [1, {"a": 3}])])
def test_values_that_differ(one: object, other: object) -> None:
    assert same(one, one) and not same(one, other)
