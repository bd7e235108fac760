"""Exit statuses and the one line on stderr."""

import errno
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from olmo.console import log
from olmo.exceptions import DISTRIBUTIONS, ConfigurationError, Interrupted, MissingPackage, Parser, exit_status, needs
from tests.running import ROOT
from tests.test_house import modules


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


# --- output that cannot be printed, and signals: as processes ---

PRINTS = """
import os, signal, sys, time
from pathlib import Path
from olmo.exceptions import exit_status
def main(argv):
    for line in range(3):
        print("line", line, *argv, flush=True)
        time.sleep(0.05)
    Path("finished").touch()
sys.exit(exit_status(main))
"""


def shell(line: str, cwd: object, code: str = PRINTS) -> subprocess.CompletedProcess[str]:
    """Run a line of bash in which $RUN is a command that executes `code`."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHON": sys.executable, "CODE": code}
    command = ["bash", "-c", 'RUN() { "$PYTHON" -c "$CODE" "$@"; }; ' + line]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("line", "status", "out", "err"),
    [
        ("RUN | head -1; exit ${PIPESTATUS[0]}", 0, "line 0\n", ""),
        ("RUN 2>&1 >&- | cat; exit ${PIPESTATUS[0]}", 0, "", ""),
        ("RUN > /dev/full", 1, "", "error: stdout: No space left on device\n"),
        ("PYTHONIOENCODING=ascii RUN \u2192", 0, "line 0 \\u2192\nline 1 \\u2192\nline 2 \\u2192\n", ""),
    ],
)
def test_output_that_cannot_be_printed_does_not_end_the_work(
    line: str, status: int, out: str, err: str, tmp_path: os.PathLike[str]
) -> None:
    done = shell(line, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (status, out, err)
    assert os.listdir(tmp_path) == ["finished"]


def test_help_into_a_closed_pipe_is_silent(tmp_path: os.PathLike[str]) -> None:
    code = "import sys, time; from olmo.exceptions import *; time.sleep(0.1)\n"
    code += "sys.exit(exit_status(lambda argv: Parser(prog='tool').parse_args(argv)))"
    done = shell("RUN --help | true; exit ${PIPESTATUS[0]}", tmp_path, code)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("sent", "status", "said"),
    [("INT", 130, "interrupted\n"), ("TERM", 143, "ended by SIGTERM\n"), ("HUP", 129, "ended by SIGHUP\n")],
)
def test_a_signal_is_one_line_and_what_was_begun_is_deleted(
    sent: str, status: int, said: str, tmp_path: os.PathLike[str]
) -> None:
    code = (
        "import os, signal, sys, time; from pathlib import Path; from olmo.exceptions import exit_status\n"
        "from olmo.files.atomic import atomic_path\n"
        "def main(argv):\n"
        "    with atomic_path(Path('output')) as partial:\n"
        "        partial.write_text('half')\n"
        f"        os.kill(os.getpid(), signal.SIG{sent})\n"
        "        time.sleep(60)\n"
        "sys.exit(exit_status(main))"
    )
    done = shell("RUN", tmp_path, code)
    assert (done.returncode, done.stdout, done.stderr) == (status, "", said)
    assert os.listdir(tmp_path) == []


def test_handlers_of_others_stay_and_ours_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal that is ignored (nohup) or handled stays so; a process of torchrun and a thread install nothing."""

    def handlers(argv: Sequence[str] = ()) -> None:
        seen.append([signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)])

    seen: list[list[object]] = []
    default = [signal.SIG_DFL, signal.SIG_DFL]
    exit_status(handlers, [])
    handlers()
    assert not set(seen[0]) & set(default) and seen[1] == default
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_IGN)
    exit_status(handlers, [])
    monkeypatch.undo()
    handlers()
    assert seen[2] == [signal.SIG_IGN] * 2 and seen[3] == default
    thread = threading.Thread(target=exit_status, args=(handlers, []))
    thread.start()
    thread.join()
    monkeypatch.setenv("WORLD_SIZE", "2")
    exit_status(handlers, [])
    assert seen[4:] == [default, default]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EIO, errno.EDQUOT])
def test_an_error_of_the_system_is_its_words_and_the_name_of_the_file(
    number: int, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, said in (("a file", f"a file: {os.strerror(number)}"), (None, os.strerror(number))):
        assert exit_status(failing(OSError(number, os.strerror(number), name)), []) == 1
        assert capsys.readouterr().err == f"error: {said}\n"


@pytest.mark.parametrize("name", ["HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "WANDB_API_KEY"])
def test_secrets_of_the_environment_are_neither_printed_nor_logged(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(name, "5ecr3t/+value")

    def main(argv: Sequence[str]) -> None:
        log.warning("%s: \x1b[2J refused", "Bearer 5ecr3t/+value")
        raise OSError("Bearer 5ecr3t/+value was refused")

    assert exit_status(main, []) == 1
    assert capsys.readouterr().err.splitlines()[-1] == f"error: Bearer ${name} was refused"
    assert caplog.messages == [f"Bearer ${name}: \\x1b[2J refused"]


def test_a_name_of_several_lines_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    exit_status(failing(FileNotFoundError(errno.ENOENT, "No such file", "a\nerror: b\x1b[2J")), [])
    assert capsys.readouterr().err == "error: a\\nerror: b\\x1b[2J: No such file\n"


def test_a_missing_package_is_one_line_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "boto3", None)
    assert exit_status(lambda _: needs("boto3.session", "s3", "--data s3://b/a.npy")) == 1
    line = "error: --data s3://b/a.npy: boto3 is not installed: pip install 'knowledge-entropy[s3]'\n"
    assert capsys.readouterr().err == line
    (tmp_path / "half_there.py").write_text("import a_package_that_it_needs\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingPackage, match=r"half_there cannot be imported \(No module named 'a_package_that_it_nee"):
        needs("half_there", "s3", "--data")
    assert needs("json.decoder", "s3", "--data").__name__ == "json.decoder"


def test_packages_that_errors_name_are_installed_by_their_extra() -> None:
    """Each `needs("package", "extra", ...)` of the source."""
    tomllib = pytest.importorskip("tomllib", reason="part of Python 3.11")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    extras["demo"] = extras["eval"]  # which it includes
    calls = [
        call
        for path in modules().values()
        for call in re.findall(r'\b(?:needs|missing_package)\(\s*"([\w.]+)", "(\w+)"', path.read_text("utf-8"))
    ]
    assert len(calls) > 5
    for module, extra in calls:
        package = module.partition(".")[0]
        package = DISTRIBUTIONS.get(package, package)
        assert any(re.match(rf"{package}>=", requirement) for requirement in extras[extra]), (module, extra)
