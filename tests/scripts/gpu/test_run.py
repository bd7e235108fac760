"""The runner of `make gpu`: what measurements leave behind, however they end, and the table of it."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from olmo.exceptions import ConfigurationError, exit_status
from scripts.gpu import __main__ as command
from scripts.gpu import box, carried, report, runner
from scripts.gpu import tests as gpu_tests
from scripts.gpu.boxes import BOXES, FIRST, LIMIT, SMALL_SCALE, Box
from scripts.gpu.rows import Row, Skipped, to_entry
from scripts.gpu.runner import Outcome, run_boxes

run = functools.partial(exit_status, command.main)

# A measurement of the tests: box k runs the k-th of the lines of Python in BODIES.
BODY = """
import json, os, subprocess, sys, time
name, folder, settings = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
def line(**entry):
    with open(folder + "/rows.jsonl", "a") as file:
        file.write(json.dumps(entry) + "\\n")
def row(value):
    line(row=dict(name="x", value=value, unit="", at_least=None, at_most=None, note="", samples=[value]))
exec(BODIES[int(name[3:])])
"""


@pytest.fixture
def boxed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs boxes that do what the given lines of Python do."""
    script = tmp_path / "body.py"
    monkeypatch.setattr(runner, "GRACE", 0.2)
    monkeypatch.setattr(runner, "COMMAND", (sys.executable, str(script)))

    def boxed(*bodies: str, seconds: int = 20, limit: float = LIMIT, small: bool = False) -> list[Outcome]:
        boxes = [Box(f"box{number}", body, seconds, "") for number, body in enumerate(bodies)]
        script.write_text(BODY.replace("BODIES", repr([box.module for box in boxes])))
        return run_boxes(boxes, tmp_path / "out", small, limit, lambda outcomes: None)

    return boxed


def test_a_box_that_fails_or_overruns_keeps_its_rows_and_others_run(boxed: Any) -> None:
    hangs = "row(5.0); import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    started = time.monotonic()
    first, failed, skipped, hung, last = boxed(
        "line(about={'device': 'd'}); row(2.0)",
        "row(3.0); sys.exit('error: broken')",
        "line(skipped='no such library')",
        hangs,
        "row(settings['peak'] + settings['earlier']['box1: x'])",
        seconds=2,
    )
    assert time.monotonic() - started < 15
    assert first.about == {"device": "d"} and first.status == "done"
    assert failed.status == "failed" and failed.reason.startswith("status 1: error: broken; ")
    assert (skipped.status, skipped.reason) == ("skipped", "no such library")
    assert hung.status == "overran" and "killed after" in hung.reason
    assert [outcome.rows[0].value for outcome in (first, failed, hung)] == [2.0, 3.0, 5.0]
    assert last.rows[0].value == 2e12 + 3  # operations per second of the first box, and a number of the second


def test_what_a_box_has_started_ends_with_it(boxed: Any, tmp_path: Path) -> None:
    child = "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(30)']).pid"
    (outcome,) = boxed(f"row(float({child}))")
    time.sleep(0.1)
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(int(outcome.rows[0].value))], capture_output=True, text=True)
    assert state.stdout.strip()[:1] in ("", "Z")


def test_unused_seconds_are_the_next_ones_and_the_run_has_a_limit(boxed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(monotonic=iter([0.0, 1.0, 4.0, 16.0, 0.0, 0.0]).__next__)
    monkeypatch.setattr(runner, "time", clock)
    monkeypatch.setattr(runner, "run_box", lambda box, *_: outcome(box.name, Row("x", 1.0), allowed=_[-1]))
    found = boxed("", "", "", seconds=10, limit=15)
    assert [one.allowed for one in found] == [9.0, 11.0, 0.0]
    assert (found[2].status, found[2].reason) == ("skipped", "no time left of 15 s")
    assert boxed("", seconds=3, small=True)[0].allowed == 3 * SMALL_SCALE


def test_a_small_run_has_more_seconds_unless_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(monotonic=iter([0.0] * 9).__next__)
    monkeypatch.setattr(runner, "time", clock)
    monkeypatch.setattr(runner, "run_box", lambda box, *_: outcome(box.name, Row("x", 1.0), allowed=_[-1]))
    boxes = [Box("a", "", 10, ""), Box("b", "", 10, "")]
    found = run_boxes(boxes, Path(), True, 50, lambda outcomes: None)
    assert [one.allowed for one in found] == [40, 50]
    limits = [
        command._parse(["--small"]).limit,
        command._parse([]).limit,
        command._parse(["--small", "--limit=9"]).limit,
    ]
    assert limits == [SMALL_SCALE * LIMIT, LIMIT, 9]


def test_boxes_keep_the_callers_path(boxed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/site/of/the/cluster")
    (found,) = boxed("line(about=dict(path=os.environ['PYTHONPATH']))")
    assert found.about["path"] == f"{runner.ROOT}:/site/of/the/cluster"


def test_nothing_runs_after_a_first_box_that_failed(boxed: Any) -> None:
    first, second = boxed("sys.exit(1)", "row(1.0)")
    assert first.status == "failed" and second.status == "skipped" and not second.rows


def outcome(name: str, *rows: Row, status: str = "done", reason: str = "", allowed: float = 1.0) -> Outcome:
    return Outcome(Box(name, "", 1, ""), allowed, status=status, reason=reason, rows=list(rows))


OUTCOMES = [
    outcome("a", Row("rate", 12345.6, "tokens/s"), Row("MFU", 54.0, "%", at_least=60)),
    outcome("b", Row("memory", 40.0, at_most=80), Row("share", 90.0, at_least=60), Row("failures", 0, at_most=0)),
    outcome("c", status="skipped", reason="no such library"),
    outcome("d", Row("memory", 160.0, "GiB", at_most=80, note="n"), status="overran", reason="killed"),
    outcome("e", Row("wrong", 2, at_most=0), Row("nan", float("nan"), at_least=1), status="failed", reason="broken"),
]


def test_the_table_has_the_worst_first() -> None:
    found = [(state, box, name) for state, box, name, *_ in report.lines_of(OUTCOMES)]
    assert found[:3] == [("failed", "e", ""), ("failed", "e", "nan"), ("overran", "d", "")]
    assert {state for state, *_ in found[3:6]} == {"missed"}
    assert {name for *_, name in found[3:6]} == {"wrong", "memory", "MFU"}
    assert found.index(("missed", "d", "memory")) < found.index(("missed", "a", "MFU"))
    assert found[6:] == [
        ("skipped", "c", ""),
        ("met", "b", "share"),
        ("met", "b", "memory"),
        ("met", "b", "failures"),
        ("", "a", "rate"),
    ]
    text = report.table(OUTCOMES)
    assert "missed   a    MFU       54 %             >= 60" in text and "12,346 tokens/s" in text
    assert report.problems(OUTCOMES) == [
        *("d overran: killed", "e failed: broken", "a: MFU: 54 %, bar >= 60", "d: memory: 160 GiB, bar <= 80"),
        *("e: wrong: 2, bar <= 0", "e: nan: nan, bar >= 1"),
    ]


def test_gpu_json_has_all_samples(tmp_path: Path) -> None:
    row = Row("MFU", 54.0, "%", at_least=60, samples=(53.0, 54.0, 55.0))
    OUTCOMES[0].about = {"device": "NVIDIA H200", "torch": "2.11.0"}
    report.write(tmp_path / "gpu.json", [*OUTCOMES, outcome("f", row)], False, "2026-01-01", 3.0)
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["device"] == "NVIDIA H200"
    assert [box["status"] for box in found["boxes"]] == ["done", "done", "skipped", "overran", "failed", "done"]
    assert found["boxes"][-1]["rows"] == [to_entry(row)]


def test_numbers_that_are_not_finite_are_null_and_failures(tmp_path: Path) -> None:
    rows = Row("nan", float("nan"), note="n", samples=(1.0, float("inf"))), Row("sample", 1.0, samples=(float("nan"),))
    outcomes = [outcome("a", *rows)]
    report.write(tmp_path / "gpu.json", outcomes, False, "2026-01-01", 3.0)
    found = json.loads((tmp_path / "gpu.json").read_text(), parse_constant=pytest.fail)["boxes"][0]["rows"]
    assert [(row["value"], row["samples"], row["note"]) for row in found] == [
        (None, [1.0, None], "failed: not finite (nan); n"),
        (1.0, [None], "failed: not finite (1.0)"),
    ]
    assert {state for state, *_ in report.lines_of(outcomes)} == {"failed"}
    assert report.problems(outcomes) == ["a: nan: nan, bar none", "a: sample: 1, bar none"]


def test_the_whole_run_has_eight_minutes() -> None:
    assert sum(box.seconds for box in BOXES.values()) <= LIMIT == 480
    assert next(iter(BOXES)) == FIRST.name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "entropy,speed"], "--only speed: choose from peak, entropy, "),
        (["--limit", "0"], "--limit 0: must be"),
        (["--only", "entropy, tests"], "torch sees no CUDA device here; --small runs on a CPU"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_status_2(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    output = tmp_path / "gpu"
    assert run([*arguments, "--output", str(output)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not output.exists()


def test_packages_that_are_missing_or_too_old_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    release = carried._release
    there = {"omegaconf": "2.3.0", "requests": "2.32.2", "urllib3": None, "torch": "2.11.0a0+cu130"}
    monkeypatch.setattr(carried, "_release", lambda name: there[name] if name in there else release(name))
    with pytest.raises(
        ConfigurationError,
        match=r"^omegaconf 2.3.0 is older than 2.4; urllib3 is not installed: .* make gpu-carry and copy build/",
    ):
        carried.use_carried()
    there["torch"] = None
    with pytest.raises(
        ConfigurationError, match=r"^torch is not installed, in .*: name the Python .* make gpu PYTHON="
    ):
        carried.use_carried()


def test_what_is_carried_is_imported_before_what_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "omegaconf-99.dist-info").mkdir()
    (tmp_path / "omegaconf-99.dist-info" / "METADATA").write_text("Name: omegaconf\nVersion: 99\n")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(carried, "FOLDER", tmp_path)
    carried.use_carried()
    assert carried._release("omegaconf") == "99"


def test_releases_are_those_of_the_project() -> None:
    project = (carried.ROOT / "pyproject.toml").read_text("utf-8")
    stated = [line for line in (*carried.IMAGE, *carried.NAMES.read_text("utf-8").splitlines()) if ">=" in line]
    assert len(stated) == 5 and all(f'"{line}"' in project for line in stated)


def test_a_box_started_by_hand_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status(box.main, []) == 2
    assert "python -m scripts.gpu starts this" in capsys.readouterr().err


def test_without_git_nothing_is_known_of_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    place = SimpleNamespace(device=torch.device("cpu"))
    for printed, changed in ((None, None), ("", False), (" M file", True)):
        monkeypatch.setattr(box, "_output", lambda *_, printed=printed: printed)
        assert box.about(place)["changed"] is changed


def test_without_pytest_its_box_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_tests, "find_spec", lambda name: None)
    with pytest.raises(Skipped, match=r"^pytest is not installed$"):
        next(gpu_tests.measure(SimpleNamespace()))
