"""What a job of SLURM records of its stage: here without SLURM, with commands that signal their job themselves."""

from __future__ import annotations

import resource
import signal
from pathlib import Path

import pytest

from scripts.studies.job import run_in_job
from scripts.studies.plan import Stage
from scripts.studies.records import Record, read_record, write_record

# The job passes a signal on, which ends a command that does not expect it.
SIGNAL = "import os, signal; os.kill(os.getppid(), signal.{}); signal.pause()"
SAVES = "import os, signal; signal.signal(signal.{0}, lambda *_: os._exit(75)); " + SIGNAL.replace("{}", "{0}")
BOTH = (signal.SIGUSR1, signal.SIGTERM)


@pytest.fixture
def end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs a command given as Python text in a job; returns (exit status, record)."""
    before = [signal.getsignal(number) for number in BOTH]
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    file, log = tmp_path / "stage.json", tmp_path / "stage.log"

    def run(text: str, outputs: tuple[Path, ...] = (), task: int = 0) -> tuple[int, Record]:
        (tmp_path / "command.py").write_text(text)
        monkeypatch.setenv("SLURM_PROCID", str(task))
        if not file.is_file():
            write_record(file, Record("a stage", "train", "key", ["python", "-m", "command"]))
        status = 0
        try:
            run_in_job(Stage("a stage", "train", ("command",), outputs), file, log)
        except SystemExit as end:
            status = int(end.code or 0)
        return status, read_record(file)

    yield run
    for number, handler in zip(BOTH, before):
        signal.signal(number, handler)


def test_a_finished_stage_is_recorded_with_time_memory_and_job(end, tmp_path: Path) -> None:
    status, record = end("print('done')")
    assert (status, record.state, record.status, record.job) == (0, "finished", 0, "12")
    # A process counts what its parent held when it began, here this one.
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    assert record.seconds > 0 and 1 < record.peak_memory_mib < own + 100 and record.started > 1e9
    assert (tmp_path / "stage.log").read_text() == "$ python -m command\ndone\n"


def test_a_failed_stage_has_the_reason_of_its_log(end, tmp_path: Path) -> None:
    status, record = end("import sys; sys.exit('error: no such file')")
    assert (status, record.state, record.reason) == (1, "failed", "no such file")
    status, record = end("", outputs=(tmp_path / "absent",))
    assert (status, record.state, record.reason) == (1, "failed", f"finished without {tmp_path}/absent")


def test_a_run_that_has_saved_ends_with_75_and_adds_its_time(end) -> None:
    text = SAVES.format("SIGUSR1")
    status, first = end(text)
    assert (status, first.state, first.status) == (75, "interrupted", 75)
    status, second = end(text)
    assert (status, second.state) == (75, "interrupted") and second.seconds > first.seconds


def test_scancel_ends_a_stage_that_may_continue_and_is_not_queued_again(end) -> None:
    status, record = end(SAVES.format("SIGTERM"))
    assert (status, record.state, record.status) == (143, "interrupted", 143)
    status, record = end(SIGNAL.format("SIGTERM"))  # a command that the signal ends
    assert (status, record.state, record.reason) == (143, "interrupted", None)


def test_a_stage_that_does_not_save_before_the_time_limit_has_failed(end) -> None:
    status, record = end(SIGNAL.format("SIGUSR1"))
    assert (status, record.state) == (138, "failed") and "raise cluster.hours" in record.reason


def test_other_tasks_only_record_a_failure(end, tmp_path: Path) -> None:
    status, record = end("", task=3)
    assert (status, record.state) == (0, "waiting")
    status, record = end("import sys; sys.exit('error: no memory left')", task=3)
    assert (status, record.state, record.reason) == (1, "failed", "no memory left")
    assert "no memory left" in (tmp_path / "stage.task3.log").read_text()
    assert not (tmp_path / "stage.log").exists()
