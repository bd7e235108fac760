"""Several checkpoints in one `python -m analysis.entropy`, one after the other."""

from __future__ import annotations

import threading
import weakref
from pathlib import Path
from typing import Any

import pytest

from analysis import job, series
from analysis.job import Job
from analysis.locations import step_of
from analysis.prefetch import prefetch
from olmo import checkpoint
from olmo.distributed import Ranks
from tests.analysis.measuring import made_model, write
from tests.analysis.series_folders import SERIES, read, run, run_of_three, tokens_file
from tests.reference import tiny_tokenizer, to_transformers


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tokens_file(tmp_path_factory.mktemp("data"))


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    return run_of_three(tmp_path / "run")


@pytest.fixture(autouse=True)
def _undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures take longer than all else."""
    monkeypatch.setattr(series, "draw", lambda *_: None)


def test_the_next_is_prepared_while_one_is_measured_and_no_third_model_is_there(
    tmp_path: Path, run_folder: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A measurement that waits for the preparation of the next would never end without read-ahead."""
    order, prepared = [9, 10, 100], {step: threading.Event() for step in (9, 10, 100)}
    models: list[weakref.ref[Any]] = []
    alive: list[int] = []
    measured: list[int] = []
    real_measure, real_prepare, real_open, real_read = (
        job.measure,
        Job.prepare,
        job.open_model,
        checkpoint.read_state,
    )

    def prepare(one: Job) -> Any:
        step = step_of(one.location)
        assert len(measured) >= order.index(step) - 1, "two are prepared ahead"
        ready = real_prepare(one)
        prepared[step].set()
        return ready

    def count(new: Any) -> Any:
        models.append(weakref.ref(next(iter(new.values())) if isinstance(new, dict) else new))
        alive.append(sum(model() is not None for model in models))
        return new

    def measure(*args: Any, **kwargs: Any) -> Any:
        step = order[len(measured)]
        following = order[order.index(step) + 1 :][:1]
        assert all(prepared[other].wait(60) for other in following), "the next is not read while one is measured"
        measured.append(step)
        return real_measure(*args, **kwargs)

    monkeypatch.setattr(Job, "prepare", prepare)
    monkeypatch.setattr(job, "measure", measure)
    monkeypatch.setattr(job, "open_model", lambda *a: count(real_open(*a)))
    monkeypatch.setattr(checkpoint, "read_state", lambda *a: count(real_read(*a)))
    argv = ["--checkpoint", run_folder / "step*", "--data", tokens, "--data_size", 5]
    assert run(*argv, "--output", tmp_path / "out") == 0
    assert measured == order
    assert max(alive) <= 2


def test_an_interrupted_series_has_its_table_and_goes_on(
    tmp_path: Path, run_folder: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["--checkpoint", run_folder / "step*", "--data", tokens, "--data_size", 5, "--output", tmp_path / "out"]
    measured: list[int] = []
    figures: list[int] = []  # rows of each time they are drawn
    monkeypatch.setattr(series, "draw", lambda found, folder: figures.append(len(found["rows"])))
    real = job.measure

    def until_the_third(*args: Any, **kwargs: Any) -> Any:
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(job, "measure", until_the_third)
    assert run(*argv) == 130
    assert [row["name"] for row in read(tmp_path / "out" / SERIES)["rows"]] == ["step9-unsharded", "step10-unsharded"]
    measured.clear()
    assert run(*argv) == 0
    assert figures == [2, 3]
    assert len(measured) == 1 and len(read(tmp_path / "out" / SERIES)["rows"]) == 3
    assert not [path for path in (tmp_path / "out").rglob("*") if "partial" in path.name]


def test_one_that_cannot_be_read_does_not_lose_the_others(
    tmp_path: Path, run_folder: Path, tokens: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = run_folder / "step10-unsharded/model.safetensors"
    broken.write_bytes(broken.read_bytes()[:100])
    argv = ["--checkpoint", run_folder / "step*", "--data", tokens, "--data_size", 5]
    assert run(*argv) == 1
    shown = capsys.readouterr()
    assert [row["checkpoint"]["step"] for row in read(run_folder / SERIES)["rows"]] == [9, 100]
    lines = shown.err.splitlines()
    assert len(lines) == 2 and lines[0].startswith(f"{broken}: damaged")
    assert lines[1] == "error: 1 of 3 could not be measured; the same command continues from here"
    assert shown.out.count(": H = ") == 2


def test_a_wrong_command_line_ends_a_series_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No checkpoint is at fault, so the error is printed once."""
    (tmp_path / "data.txt").write_text("some text")
    for seed in (1, 2):
        to_transformers(made_model(seed)).save_pretrained(tmp_path / f"run/step{seed}")
    capsys.readouterr()  # transformers prints while it saves
    assert run("--checkpoint", tmp_path / "run/*", "--data", tmp_path / "data.txt", "--data_size", 1) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}/run/step1: names no tokenizer; give --tokenizer\n"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--data", "nowhere.txt"], "nowhere.txt: no such data (--data)"),
        (["--data", "nowhere.npy"], "nowhere.npy: no such token file"),
        (["--data", "{tokens}", "--data_size", "1000"], "asks for 1000"),
        (["--data", "empty.txt", "--tokenizer", "tokenizer.json", "--data_size", "1"], "0 tokens, 0 instances of 16"),
        (["--data", "empty.npy"], "empty.npy: "),
        (["--data", "empty.jsonl", "--tokenizer", "tokenizer.json", "--pack", "none"], "empty.jsonl: 0 texts"),
    ],
)
def test_data_that_cannot_be_used_ends_a_series_at_once(
    argv: list[str],
    said: str,
    tmp_path: Path,
    tokens: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("empty.txt", "empty.npy", "empty.jsonl"):
        Path(name).touch()
    tiny_tokenizer("tokenizer.json")
    for seed in (1, 2):
        write(tmp_path / f"run/step{seed}", made_model(seed))
    assert run("--checkpoint", "run/*", *(text.format(tokens=tokens) for text in argv)) == 1
    shown = capsys.readouterr()
    assert said in shown.err and shown.err.count("\n") == 1 and not shown.out
    assert "--data_size 0" not in shown.err and "use --data_size 1 " not in shown.err


@pytest.mark.parametrize("steps", [["all"], ["100", "9", "10"]])
def test_all_steps_or_several(steps: list[str], tmp_path: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for step in (9, 10, 100):
        write(Path(f"checkpoints/pretrained_1B/{step}-unsharded"), made_model(step))
    assert run("--step", *steps, "--data", tokens, "--data_size", 3) == 0
    rows = read(Path("checkpoints/pretrained_1B") / SERIES)["rows"]
    assert [row["checkpoint"]["step"] for row in rows] == [9, 10, 100]


def test_preparing_does_not_keep_a_failed_process_alive() -> None:
    """Python waits at its exit for an executor's threads, and would for one that downloads; not for daemons."""
    prepared = prefetch([1, 2], lambda _: threading.current_thread().daemon, Ranks())
    assert [result() for _, result in prepared] == [True, True]
