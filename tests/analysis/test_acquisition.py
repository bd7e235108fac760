"""The command: its table, its notes, its files, its errors; and real runs from beginning to end."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest

from analysis import acquisition, estimates
from analysis.outcomes import compare
from analysis.runs import read_run
from olmo.exceptions import exit_status
from tests.run_folders import AFTER, BEFORE, TASKS, probe_table, write_run

command = functools.partial(exit_status, acquisition.main)
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _fewer_resamples(monkeypatch):
    monkeypatch.setattr(estimates, "RESAMPLES", 1000)


def test_the_command_prints_a_line_a_run_and_writes_what_it_prints(tmp_path, capsys):
    tables = {0: probe_table(BEFORE), 20: probe_table(AFTER)}
    worse = {0: probe_table(BEFORE), 20: probe_table(BEFORE)}
    losses = {0: {"general": [4.0, 5.0]}, 20: {"general": [4.4, 5.5]}}
    accuracy = {step: dict.fromkeys(TASKS, p) for step, p in ((0, 0.5), (20, 0.4))}
    one = write_run(tmp_path / "one", tables, losses, accuracy, injections=[10, 20])
    other = write_run(tmp_path / "other", worse, losses)
    output = tmp_path / "deep" / "output"
    assert command([str(one), str(other), "--output", str(output)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["run", "one", "other", "other"]
    assert "-5.8750" in lines[1] and "+26.60" in lines[1] and "general +10.00, F +20.00" in lines[1]
    assert lines[3].startswith("other minus one: A -26.60 points [")
    result = json.loads((output / "acquisition.json").read_text())
    assert [r["run"] for r in result["runs"]] == ["one", "other"]
    assert result["runs"][0] == summarise(read_run(one))
    assert result["comparisons"][0]["A"] == compare([read_run(one)], [read_run(other)])["A"].as_json()
    assert (result["comparisons"][0]["from"], result["comparisons"][0]["to"]) == ("one", "other")
    drawn = {p.name for p in output.iterdir()} - {"acquisition.json"}
    stems = ("acquisition_and_forgetting", "probes_over_steps")
    assert drawn == {f"{stem}.{kind}" for stem in stems for kind in ("png", "pdf")}


def test_the_command_works_without_losses_and_downstream_tasks(tmp_path, capsys):
    folder = write_run(tmp_path / "run", {0: probe_table(BEFORE), 20: probe_table(AFTER)})
    assert command([str(folder), "--output", str(tmp_path / "output")]) == 0
    assert (tmp_path / "output" / "probes_over_steps.png").is_file()


def missing(folder: Path) -> None:
    """Nothing at all."""


def empty(folder: Path) -> None:
    folder.mkdir()


def one_evaluation(folder: Path) -> None:
    write_run(folder, {0: probe_table(BEFORE)})


def only_paragraphs(folder: Path) -> None:
    table = probe_table(BEFORE).assign(kind="paragraph")
    write_run(folder, {0: table, 20: table})


def no_probes(folder: Path) -> None:
    write_run(folder, {})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (missing, "no run here (no metrics.jsonl)"),
        (empty, "no run here (no metrics.jsonl)"),
        (one_evaluation, "1 evaluation(s) with probes, before and after are needed"),
        (no_probes, "0 evaluation(s) with probes, before and after are needed"),
        (only_paragraphs, "no probes in this table"),
    ],
)
def test_a_folder_without_what_is_needed_is_an_error_that_names_it(tmp_path, capsys, make, message):
    folder = tmp_path / "the_run"
    make(folder)
    assert command([str(folder)]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and str(folder) in said and message in said


def test_runs_with_other_entries_end_the_command_with_one_line(tmp_path, capsys):
    one = write_run(tmp_path / "one", {0: probe_table(BEFORE), 20: probe_table(AFTER)})
    fewer = probe_table({"once": [-5.0]})
    other = write_run(tmp_path / "other", {0: fewer, 20: fewer})
    assert command([str(one), str(other)]) == 1
    assert capsys.readouterr().err == "error: one and other were probed with different entries\n"


@pytest.mark.parametrize("arguments", [[], ["run", "--nonsense"]])
def test_a_wrong_command_line_is_status_2(capsys, arguments):
    assert command(arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_module_as_a_program(tmp_path):
    """Exit status and one line on stderr, as a user sees them."""
    done = subprocess.run(
        [sys.executable, "-m", "analysis.acquisition", str(tmp_path / "absent")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"error: {tmp_path}/absent: no run here (no metrics.jsonl)\n"
