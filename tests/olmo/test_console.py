"""Bars and log lines: on real terminals, whose screen is read, and where there is none."""

from __future__ import annotations

import math
import re
import time
from pathlib import Path

import pytest

from olmo.console import Progress, clock, fixed, printable
from tests.running import command, write_world
from tests.terminal import on_terminal, screen

BAR = r"[━╸╺]+ "


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        *((0, "0:00"), (9.6, "0:10"), (59.7, "1:00"), (61, "1:01"), (3599, "59:59"), (3600, "1:00:00")),
        *((90061, "25:01:01"), (math.inf, "?"), (math.nan, "?")),
    ],
)
def test_a_clock(seconds: float, shown: str) -> None:
    assert clock(seconds) == shown


@pytest.mark.parametrize(
    ("value", "sign", "shown"),
    [
        *((-0.0, "+", "+0.00"), (-0.004, "", "0.00"), (-0.004, "+", "+0.00"), (0.004, "+", "+0.00")),
        *((-0.006, "", "-0.01"), (2.675, "+", "+2.67"), (math.inf, "", "inf"), (math.nan, "", "nan")),
    ],
)
def test_a_number_that_rounds_to_zero_has_no_minus(value: float, sign: str, shown: str) -> None:
    assert fixed(value, 2, sign) == shown


# --- where there is no terminal ---


class Time:
    """A clock that the test winds."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def hands(monkeypatch: pytest.MonkeyPatch) -> Time:
    made = Time()
    monkeypatch.setattr(time, "monotonic", made.monotonic)
    return made


def test_progress_in_a_log_is_a_plain_line_every_ten_seconds(hands: Time, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("evaluating", 100, "items") as progress:
        for _ in range(30):
            hands.now += 1.0
            progress.advance(2)
            progress.note = f", note {progress.done}"
    out, err = capsys.readouterr()
    assert out == ""
    assert err == (
        "evaluating: 20/100 items, 2.0/s, 0:40 left, note 18\n"
        "evaluating: 40/100 items, 2.0/s, 0:30 left, note 38\n"
        "evaluating: 60/100 items, 2.0/s, 0:20 left, note 58\n"
    )


def test_what_was_done_before_says_nothing_of_the_rate(hands: Time, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("measuring", 100, "items", done=60) as progress:
        hands.now += 10.0
        progress.advance(10)
    assert capsys.readouterr().err == "measuring: 70/100 items, 1.0/s, 0:30 left\n"


def test_short_or_hidden_work_shows_nothing(hands: Time, capsys: pytest.CaptureFixture[str]) -> None:
    for seconds, show in ((9.9, True), (90.0, False)):
        with Progress("measuring", 8, "items", show=show) as progress:
            hands.now += seconds
            progress.advance()
    assert capsys.readouterr().err == ""


# --- on a terminal ---


def test_the_screen_of_the_tests() -> None:
    assert screen("one\r\nt\x1b[1mwo\x1b[0m\r\x1b[2Kthree\r\n\x1b[1A\x1b[2K2\r\n", 80) == ["one", "2"]
    assert screen("abcdef\r\n", 4) == ["abcd", "ef"] and screen("abcd\r\ne", 4) == ["abcd", "e"]
    with pytest.raises(AssertionError):
        screen("\x1b[5B", 80)


TWO_BARS = """
import logging, os, sys, threading, time
from olmo.console import StdoutHandler, Progress, above_bars
logging.basicConfig(format="%(message)s", handlers=[StdoutHandler()], level=logging.INFO)

def inner():
    with Progress("second", 40, "items") as progress:
        progress.note = ", a note"
        for _ in range(40):
            time.sleep(0.04)
            progress.advance()

thread = threading.Thread(target=inner)
with Progress("first", 60, "steps") as progress:
    for step in range(60):
        if step == 30:  # below the first one
            thread.start()
        time.sleep(0.04)
        progress.advance()
        if step % 5 == 0:
            logging.info("line %d", step)
    os.write(2, above_bars("past rich").encode())
    print("printed " + "x" * 130)
    print("an error", file=sys.stderr)
    thread.join()
with Progress("short", 2, "items") as progress:
    progress.advance()
with Progress("again", 14, "items") as progress:
    for _ in range(14):
        time.sleep(0.1)
        progress.advance()
logging.info("the end")
"""
LONG = "printed " + "x" * 130
TOLD = [*(f"line {step}" for step in range(0, 60, 5)), "past rich", LONG[:100], LONG[100:], "an error", "the end"]


def test_bars_of_several_threads_stand_below_what_is_told_and_go() -> None:
    session = on_terminal(["-c", TWO_BARS], width=100)
    # Bars stay where something was written past them.
    assert session.status == 0 and [line for line in session.lines if not re.match(BAR, line)] == TOLD
    assert LONG in session.output  # in one piece, for a person to copy
    assert re.search(BAR + r"first: \d+/60 steps, \d+\.\d/s, 0:0\d left", plain(session.output))
    assert re.search(BAR + r"second: \d+/40 items, \d+\.\d/s, 0:0\d left, a note", plain(session.output))
    assert re.search(BAR + r"again: \d+/14 items", plain(session.output)) and "short" not in session.output
    assert not re.search(r"\x1b\[\?25l(?!\x1b\[\?25h)", session.output)  # the cursor is always there


ONE_BAR = """
import logging, sys, time
from olmo.console import StdoutHandler, Progress
sys.{stream} = open({file!r}, "w")
logging.basicConfig(format="%(message)s", handlers=[StdoutHandler()], level=logging.INFO)
with Progress("measuring", 14, "items") as progress:
    for _ in range(14):
        time.sleep(0.1)
        progress.advance()
    logging.info("a line")
    print("an error", file=sys.stderr)
"""


def test_what_goes_elsewhere_is_plain(tmp_path: Path) -> None:
    file = tmp_path / "file"
    session = on_terminal(["-c", ONE_BAR.format(stream="stdout", file=str(file))])
    assert session.status == 0 and session.lines == ["an error"] and re.search(BAR, plain(session.output))
    assert file.read_text() == "a line\n"
    session = on_terminal(["-c", ONE_BAR.format(stream="stderr", file=str(file))])
    assert session.status == 0 and session.output == "a line\r\n"
    assert file.read_text() == "an error\n"


def plain(output: str) -> str:
    """Output without styles."""
    return re.sub(r"\x1b\[[\d;]*m", "", output)


# --- a run ---


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


def arguments(folder: Path, seconds: int = 2) -> list[str]:
    """Of a run that ends after so many seconds, or a signal."""
    settings = [
        "--max_duration=100000",
        f"--time_limit={seconds}",
        "--canceled_check_interval=1",
        "--extra_steps_after_cancel=0",
    ]
    config = str(folder.parent / "plain.yaml")
    return ["-m", "scripts.train", config, f"--save_folder={folder}", *settings, "--console_log_interval=5"]


def logged(folder: Path) -> list[str]:
    """The lines of train.log, which has no control characters, without the time."""
    text = (folder / "train.log").read_text(encoding="utf-8")
    assert all(line.isprintable() for line in text.splitlines())
    return [re.sub(r"^\d{4}-\d\d-\d\d [\d:,]+ ", "", line) for line in text.splitlines()]


STEP = r"step \d+/100000: loss \d\.\d{4}, [\d,]+ tokens/s, \d+:[\d:]+ left"


def test_a_run_on_a_terminal_has_a_bar_below_its_log_lines(world: Path) -> None:
    # The limit counts from before the data are opened, and the first bar is drawn after a second of training.
    session = on_terminal(arguments(world / "wide", seconds=6), width=200)
    assert session.status == 75
    assert session.lines == logged(world / "wide") and len(session.lines) > 4
    assert session.lines[-1].startswith("interrupted: time_limit of 6 seconds")
    bars = re.findall(rf"\r\x1b\[2K({BAR}){STEP}", plain(session.output))
    assert bars and {len(bar) for bar in bars} == {41}
    assert re.search(r"\x1b\[38;", session.output)  # colours


def test_control_c_in_a_narrow_terminal_without_colours(world: Path) -> None:
    run = [*arguments(world / "narrow", seconds=30), "--run_name=" + "n" * 70]
    bar_with_loss = r"step [^\r\n]*: loss [^\r\n]*left\r\x1b"  # followed by its next drawing; no log line is
    session = on_terminal(run, 60, {"NO_COLOR": "1"}, control_c_at=bar_with_loss)
    assert session.status == 75 and not re.search(r"\x1b\[[\d;]*m", session.output)
    asked = "SIGINT: finishing the step and saving; another signal ends at once"
    before, _, after = "".join(session.lines).partition(asked)  # long lines go on in the next one
    assert any(line.startswith("SIGINT: finishing") for line in session.lines)
    # What the terminal shows of the key itself stands behind the bar, which stays.
    told = re.sub(rf"\s*{STEP}\s*\^C$", "", before) + after
    # A space at the end of a full line is not drawn; where lines end depends on the length of the folder's name.
    drawn, written = (re.sub(r"\s", "", text) for text in (told, "".join(logged(world / "narrow"))))
    assert drawn.startswith(written) and "interrupted:SIGINTatstep" in drawn


def test_a_run_on_a_terminal_that_cannot_rewrite_lines_is_plain(world: Path) -> None:
    session = on_terminal(arguments(world / "dumb"), 200, {"TERM": "dumb"})
    assert session.status == 75
    assert "\x1b" not in session.output and "\r" not in session.output.replace("\r\n", "")
    assert session.lines == logged(world / "dumb")


def test_a_run_without_a_terminal_is_plain_and_does_without_rich(world: Path) -> None:
    script = "import sys; from scripts.train import main; main(sys.argv[1:]); "
    script += "print('rich' in sys.modules, file=sys.stderr)"
    done = command(["-c", script, *arguments(world / "piped")[2:], "--stop_at=5"], world)
    assert done.stdout.splitlines() == logged(world / "piped") and done.stderr == "False\n"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a.\x1b[2J\x1b]0;title\x07\r\x9b31m", "a.\\x1b[2J\\x1b]0;title\\x07\\r\\x9b31m"),
        ("a\u202egnp.exe", "a\\u202egnp.exe"),
        ("Grüße, 日本語\tand\nlines", "Grüße, 日本語\tand\nlines"),
        ("https://user:pa55word@host/f: 404", "https://host/f: 404"),
        ("https://token@host/f", "https://host/f"),
        ("see https://host/f?X-Amz-Signature=abc&x=1: 403", "see https://host/f?...: 403"),
        ("GET '/f.npy?sig=abc%2F' failed", "GET '/f.npy?...' failed"),
        ("did you mean 'x'? a=b", "did you mean 'x'? a=b"),
        ("user@host, a@b.c and owner/name@revision", "user@host, a@b.c and owner/name@revision"),
    ],
)
def test_what_is_printable(text: str, shown: str) -> None:
    assert printable(text) == shown
