"""Exit statuses and the one line on stderr."""

import subprocess
import sys
from collections.abc import Sequence

import pytest

from olmo.exceptions import ConfigurationError, Interrupted, Parser, exit_status


def failing(error: BaseException):
    def main(argv: Sequence[str]) -> None:
        raise error

    return main


def test_success_is_zero_and_silent(capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[str] = []
    assert exit_status(seen.extend, ["a", "--b"]) == 0
    assert seen == ["a", "--b"]
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "error, status",
    [
        (ConfigurationError("sed: unknown"), 2),
        (ValueError("sed: unknown"), 1),
        (OSError("sed: unknown"), 1),
        (FileNotFoundError("sed: unknown"), 1),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "sed: unknown"), 1),
        (ImportError("sed: unknown"), 1),
    ],
)
def test_a_users_error_is_one_line(capsys: pytest.CaptureFixture[str], error: Exception, status: int) -> None:
    assert exit_status(failing(error), []) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1
    assert "sed: unknown" in err


def test_a_message_of_several_lines_is_joined(capsys: pytest.CaptureFixture[str]) -> None:
    exit_status(failing(ValueError("first\n  second\n\nthird")), [])
    assert capsys.readouterr().err == "error: first second third\n"


def test_an_error_without_a_message_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    exit_status(failing(FileNotFoundError()), [])
    assert capsys.readouterr().err == "error: FileNotFoundError\n"


@pytest.mark.parametrize("arguments", [["--debug", "a"], ["a", "--debug"]])
def test_debug_shows_the_traceback_and_is_not_passed_on(
    capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    def main(argv: Sequence[str]) -> None:
        assert argv == ["a"]
        raise ConfigurationError("sed: unknown")

    assert exit_status(main, arguments) == 2
    err = capsys.readouterr().err
    assert "Traceback (most recent call last)" in err
    assert "in main" in err
    assert err.endswith("error: sed: unknown\n")


@pytest.mark.parametrize("error", [TypeError, KeyError, AttributeError, AssertionError, SystemExit])
def test_programming_errors_and_exits_pass_through(error: type[BaseException]) -> None:
    with pytest.raises(error):
        exit_status(failing(error("ours")), [])


def test_an_interrupt_is_one_line_and_status_130(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status(failing(KeyboardInterrupt()), []) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_an_interruption_is_one_line_of_the_first_process_and_status_75(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, told in (("0", "interrupted: SIGTERM at step 3\n"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        assert exit_status(failing(Interrupted("SIGTERM at step 3")), []) == 75
        assert capsys.readouterr().err == told


@pytest.mark.parametrize("error", [RuntimeError("CUDA out of memory. Tried to allocate 1 GiB"), MemoryError()])
def test_no_memory_left_is_one_line_with_advice(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status(failing(error), []) == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "use a smaller device_train_microbatch_size" in message


@pytest.mark.parametrize(("rank", "waits"), [("0", False), ("1", True)])
def test_of_several_processes_the_first_tells_of_a_wrong_configuration(
    rank: str, waits: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others wait for torchrun to end them; one that lives on has an error of its own and tells it."""
    waited: list[str] = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr("time.sleep", lambda seconds: waited.append(capsys.readouterr().err))
    assert exit_status(failing(ConfigurationError("sed: unknown")), []) == 2
    assert waited == ([""] if waits else [])
    assert capsys.readouterr().err == "error: sed: unknown\n"
    assert exit_status(failing(ValueError("of this process alone")), []) == 1
    assert len(waited) == waits


def test_arguments_come_from_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["prog", "x", "--debug", "y"])
    seen: list[str] = []
    assert exit_status(seen.extend) == 0
    assert seen == ["x", "y"]


def test_wrong_flags_are_configuration_errors(capsys: pytest.CaptureFixture[str]) -> None:
    def main(argv: Sequence[str]) -> None:
        parser = Parser(prog="tool")
        parser.add_argument("--step", type=int, required=True)
        parser.parse_args(argv)

    assert exit_status(main, ["--step", "3"]) == 0
    assert exit_status(main, ["--step", "x"]) == 2
    assert capsys.readouterr().err == "error: tool: argument --step: invalid int value: 'x'\n"
    assert exit_status(main, []) == 2
    assert capsys.readouterr().err == "error: tool: the following arguments are required: --step\n"


@pytest.mark.parametrize("error, status", [("ConfigurationError", 2), ("ValueError", 1), ("TypeError", 1)])
def test_as_a_process(error: str, status: int) -> None:
    """The status reaches the shell; a programming error keeps its traceback there."""
    code = (
        "import sys; from olmo.exceptions import *\n"
        f"def main(argv): raise {error}('what and where')\n"
        "sys.exit(exit_status(main))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == status
    assert ("Traceback" in done.stderr) == (error == "TypeError")
    assert done.stderr.splitlines()[-1].endswith("what and where")
