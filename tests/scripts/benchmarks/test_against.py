"""Comparing two checkouts, at tiny size: this one with itself, and with what is none."""

from __future__ import annotations

import functools
import re
import sys
import zlib
from pathlib import Path

import pytest

from olmo.exceptions import exit_status
from scripts import bench
from scripts.benchmarks import against
from tests.running import ROOT
from tests.warm import warm_python

run = functools.partial(exit_status, bench.main)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = {"d_model": 32, "n_heads": 2, "n_layers": 1, "mlp_hidden_size": 64}
    monkeypatch.setattr(against, "SHAPE", shape)
    sizes = {"LENGTH": 64, "INSTANCES": 4, "BATCHES": 2, "BATCH": 8, "TOKENS": 2**13, "ENTRIES": 2, "STEPS": 3}
    for name, value in sizes.items():
        monkeypatch.setattr(against, name, value)


@pytest.fixture
def forks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands are forks, whose memory is not seen: that of the process which asks for them is."""
    monkeypatch.setattr(sys, "executable", warm_python())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def test_a_checkout_agrees_with_itself(tiny: None, forks: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--against", str(ROOT), "--rounds", "1"]) == 0, capsys.readouterr().err
    _, *lines = capsys.readouterr().out.splitlines()
    assert [line.partition(",")[0] for line in lines] == list(against.WORKS)
    for line, numbers in zip(lines, ("2", "3", "1", "[1-9][0-9]+")):
        assert re.search(f"; {numbers} numbers equal$", line), line
        ratio, _ = re.findall(r"([\d.]+) x", line)
        assert float(ratio) > 0, line


def test_time_and_memory_are_those_of_the_command(tmp_path: Path) -> None:
    code = "import sys\nheld = b'x' * 2**28\nopen(sys.argv[sys.argv.index('--output') + 1], 'wb').write(held[:9])"
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "__init__.py").touch()  # without it, an installed package would be found first
    (tmp_path / "scripts" / "extract_data.py").write_text(code)
    found = against.run("loader", tmp_path, tmp_path)
    assert 256 < found.peak < 320 and found.seconds > 0 and found.numbers == {"checksum": float(zlib.crc32(b"x" * 9))}


@pytest.mark.parametrize(
    ("theirs", "agreement"),
    [
        ({"a": 1.0, "b": 2.5}, "2 numbers differ by 2.0e-01 at most"),
        ({"a": 1.0, "c": 2.5}, "1 numbers equal (1 only here, 1 only there)"),
        ({"a": 1.0}, "1 numbers equal (1 only here)"),
        ({"c": 1.0}, "no number in both (2 only here, 1 only there)"),
    ],
)
def test_numbers_that_differ_are_reported(
    tiny: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    theirs: dict[str, float],
    agreement: str,
) -> None:
    outcomes = iter([against.Outcome(2.0, 100.0, {"a": 1.0, "b": 2.0}), against.Outcome(1.0, 50.0, theirs)])
    monkeypatch.setattr(against, "run", lambda *_: next(outcomes))
    assert run(["--against", str(ROOT), "--rounds", "1", "--only", "loader"]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert "time 2.00 x (2.00 to 2.00) over 1 rounds (2.00 s, 1.00 s), peak memory 2.00 x (100 MiB, 50 MiB)" in line
    assert line.endswith(f"; {agreement}")


def test_a_command_that_fails_is_one_line(
    tiny: None, forks: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "__init__.py").touch()
    (tmp_path / "scripts" / "train.py").write_text("raise SystemExit('error: broken')")
    assert run(["--against", str(tmp_path), "--rounds", "1", "--only", "training"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(tmp_path) in error and error.endswith("error: broken\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "--rounds must be at least 1"),
        (["--against", str(ROOT), "--rounds", "0"], "--rounds must be at least 1"),
        (
            ["--only", "loss,speed"],
            "--only speed: choose from training, family, saves, loss, entropy, probes, loader",
        ),
        (["--against", str(ROOT), "--only", "saves"], "choose from entropy, training, loader, probes"),
        (["--against", "no-such-folder"], "no-such-folder: not a checkout of this project"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_status_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
