"""Probes in windows around injections: at which steps, what is asked there, and that a restart finds the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch

from olmo.config import load
from olmo.eval import evaluators
from olmo.eval.probes import score_probes
from olmo.exceptions import ConfigurationError
from tests.running import metrics, series, train, write_world

PROBES = 96  # of all eight evaluators: 6 entries with 15 probes each, and 6 paragraphs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def world(folder: Path) -> Path:
    return folder / "config.yaml"


def settings(interval: int, probing: str, last: int = 10, regular: int = 100) -> tuple[str, ...]:
    """A run of `last` steps that injects every `interval` steps."""
    return (
        f"--inject_interval={interval}",
        f"--probing={probing}",
        f"--max_duration={last}",
        f"--eval_interval={regular}",
    )


def tables(folder: Path) -> dict[int, Any]:
    """Step -> table of probes."""
    paths = {int(p.stem.removeprefix("step")): p for p in (folder / "probes").iterdir()}
    return {step: pyarrow.parquet.read_table(paths[step]) for step in sorted(paths)}


def windows(injections: list[int], length: int, interval: int, last: int) -> set[int]:
    """By definition: s - 1, and s, s + interval, ... up to s + length - 1, of every injection at a step s."""
    steps = {s - 1 for s in injections}
    steps |= {s + n for s in injections for n in range(0, length, interval)}
    return {step for step in steps if step <= last}


@pytest.fixture(scope="module")
def everywhere(world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A run that injects at 4 and 8 and evaluates everything after each of its ten steps, without windows."""
    folder = tmp_path_factory.mktemp("everywhere")
    trainer = train(world, folder, *settings(4, "null", regular=1), "--eval_on_load")
    return folder, trainer.model.state_dict()


@pytest.mark.parametrize(
    ("probing", "length", "interval"),
    [
        ("{steps: 1, interval: 1}", 1, 1),
        ("{steps: 3, interval: 2}", 3, 2),
        ("{steps: 4, interval: 3}", 4, 3),
        ("{steps: 6, interval: 5}", 6, 5),  # one window reaches into the next
        ("{}", 50, 1),
    ],
)
def test_a_window_is_scored_step_by_step(
    world: Path,
    tmp_path: Path,
    everywhere: tuple[Path, dict[str, torch.Tensor]],
    probing: str,
    length: int,
    interval: int,
) -> None:
    trainer = train(world, tmp_path, *settings(4, probing))
    expected = windows([4, 8], length, interval, last=10) | {10}  # all evaluators run after the last step
    found, whole = tables(tmp_path), tables(everywhere[0])
    assert found.keys() == expected == series(tmp_path, "eval/K").keys()
    for step, table in found.items():
        assert table.num_rows == PROBES and table.equals(whole[step])
    assert series(tmp_path, "eval/walk/heldout/CrossEntropyLoss").keys() == {10}, "held-out losses are no probes"
    # Looking changes nothing.
    assert all(torch.equal(a, b) for a, b in zip(trainer.model.state_dict().values(), everywhere[1].values()))
    assert series(tmp_path) == series(everywhere[0])


def test_windows_merge_with_regular_evaluations(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, everywhere: tuple[Path, dict[str, torch.Tensor]]
) -> None:
    scored: list[int] = []
    monkeypatch.setattr(evaluators, "score_probes", lambda *a: scored.append(len(a[1])) or score_probes(*a))
    once = next(i for i, e in enumerate(load(world).evaluators) if e.label == "once_semantic")
    own = f"--evaluators.{once}.eval_interval=3"
    train(world, tmp_path, *settings(4, "{steps: 2}", regular=5), own)
    # Windows: 3, 4, 5 and 7, 8, 9; regular: 5 and 10, of once_semantic 3, 6, 9 and the last step.
    expected = {3: 96, 4: 96, 5: 96, 6: 15, 7: 96, 8: 96, 9: 96, 10: 96}
    assert scored == list(expected.values()), "once a step"
    assert {step: table.num_rows for step, table in tables(tmp_path).items()} == expected
    assert series(tmp_path, "eval/once_semantic/log_probability").keys() == expected.keys()
    assert series(tmp_path, "eval/walk/heldout/CrossEntropyLoss").keys() == {5, 10}
    wanted = [line for line in metrics(everywhere[0]) if "eval/K" in line and line["step"] == 5]
    assert [line for line in metrics(tmp_path) if "eval/K" in line and line["step"] == 5] == wanted


@pytest.mark.parametrize("everything", [True, False])
def test_an_injection_at_the_first_step(world: Path, tmp_path: Path, everything: bool) -> None:
    start = ["--eval_on_load"] if everything else []
    train(world, tmp_path, *settings(1, "{steps: 1}", last=2), *start)
    assert tables(tmp_path).keys() == series(tmp_path, "eval/K").keys() == {0, 1, 2}
    losses = series(tmp_path, "eval/walk/heldout/CrossEntropyLoss")
    assert losses.keys() == ({0, 2} if everything else {2})


def test_no_injection_near_the_start_leaves_it_alone(world: Path, tmp_path: Path) -> None:
    train(world, tmp_path, *settings(2, "{steps: 1}", last=3))
    assert tables(tmp_path).keys() == {1, 2, 3}


def test_a_restart_finds_what_an_unbroken_run_finds(world: Path, tmp_path: Path) -> None:
    wanted = (*settings(4, "{steps: 3}"), "--save_interval=5")
    whole = tmp_path / "whole"
    train(world, whole, *wanted)
    stopped = tmp_path / "stopped"
    train(world, stopped, *wanted, "--stop_at=5")  # within a window
    train(world, stopped, *wanted, "--try_load_latest_save")
    killed = tmp_path / "killed"  # after it had scored the probes of step 9: step 5 is the newest checkpoint
    shutil.copytree(whole, killed)
    shutil.rmtree(killed / "step10")
    with (killed / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 11, "eval/K": 0.0}) + "\n")
    train(world, killed, *wanted, "--try_load_latest_save")
    assert metrics(killed) == metrics(whole)
    for run in (stopped, killed):
        assert tables(run) == tables(whole)
        assert series(run, "eval/K") == series(whole, "eval/K")
        assert series(run, "eval/once_semantic/CrossEntropyLoss") == series(
            whole, "eval/once_semantic/CrossEntropyLoss"
        )


def test_the_console_tells_k_of_a_window_and_no_more(
    world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(world, tmp_path, *settings(4, "{steps: 1}", last=5))
    k = series(tmp_path, "eval/K")
    said = [
        message for message in caplog.messages if "eval/" in message or ": evaluation" in message or message[:2] == "  "
    ]
    assert said[:2] == [f"step {step}: eval/K = {k[step]:.4f}" for step in (3, 4)]
    assert said[2] == "step 5: evaluation" and any(m.startswith("  loss: walk/heldout ") for m in said[3:])


# --- what makes no sense ---


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["--injection=null"], "probing: probes injections, and nothing is injected; leave it out"),
        (["--injection.rounds=0"], "probing: probes injections, and nothing is injected; leave it out"),
        (["--evaluators=[]"], "probing: no evaluator has probes; add one of type lm with data.dataset_path"),
        (
            ["--evaluators=[{label: a, data: {paths: [b]}}, {label: c, type: knowledge_entropy}]"],
            "probing: no evaluator has probes",
        ),
        (["--probing.steps=0"], "probing.steps: 0 must be at least 1"),
        (["--probing.interval=0"], "probing.interval: 0 must be at least 1"),
        (["--probing.steps=3", "--probing.interval=4"], "probing.interval: 4 must be at most probing.steps: 3"),
        (["--probing.step=3"], "command line: unknown key 'probing.step', did you mean 'probing.steps'?"),
    ],
)
def test_windows_that_make_no_sense(world: Path, overrides: list[str], told: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        load(world, ["--probing.steps=50", *overrides])
    message = str(caught.value).removeprefix(f"{world}: ").removeprefix("command line: ")
    assert message.startswith(told.removeprefix("command line: ")) and message.count("; ") <= 1


def test_windows_are_off_unless_asked_for(world: Path, tmp_path: Path) -> None:
    config = load(world)
    assert config.probing is None
    config.save(tmp_path / "config.yaml")
    assert "probing" not in (tmp_path / "config.yaml").read_text()  # OLMo reads it
    assert load(world, ["--probing={}"]).probing == load(world, ["--probing.steps=50", "--probing.interval=1"]).probing
