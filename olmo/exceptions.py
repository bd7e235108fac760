"""Errors a user can cause, and how every command reports them: one line, and a documented exit status.

docs/checkpoints.md lists the statuses, and what happens to output that cannot be written.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO, cast

from .console import Stream, printable

# What torchrun has time for between the end of one process and that of the others.
_TORCHRUN_DELAY = 10.0  # seconds


# Packages of extras that pip knows by another name.
DISTRIBUTIONS = {"olmo_eval": "ai2-olmo-eval", "liger_kernel": "liger-kernel"}

# What a user's files, settings or machine can cause; anything else is a programming error.
FAILURES = (ValueError, OSError, ImportError, RuntimeError, MemoryError)


class ConfigurationError(ValueError):
    """A wrong command line or configuration; commands exit with status 2."""


class MissingPackage(ImportError):
    """A package that an extra of the project installs is missing; commands exit with status 1."""


if not TYPE_CHECKING:  # with it, mypy would accept every name

    def __getattr__(name: str) -> object:
        """Answer hf_olmo, the code of older OLMo models on the hub, which imports a name of ai2-olmo's olmo.

        With ImportError, although `hasattr` then raises it too: `from ... import` replaces the text of AttributeError.
        """
        if name == "OLMoConfigurationError":
            raise ImportError(
                "hf_olmo, of ai2-olmo, needs that project's package olmo, and finds the one of knowledge-entropy: use "
                "allenai/OLMo-1B-hf instead, or ai2-olmo in an environment of its own"
            )
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class FailedOnAllRanks(OSError):
    """An error of one of several processes that all of them raise; the first one prints it."""


class Interrupted(Exception):
    """A run that was asked to end before its last step and has saved: the same command continues it.

    Commands exit with status 75, EX_TEMPFAIL of sysexits.h: try again.
    """


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP as an exception: temporary files are deleted as after control-C. Its argument is the number."""


def check_new(output: Path) -> None:
    """Raise ConfigurationError if an output already exists; it may be what the command reads."""
    if output.exists() or output.is_symlink():
        raise ConfigurationError(f"{output}: already exists; delete it or choose another place")


def missing_package(package: str, extra: str, purpose: str, problem: str = "is not installed") -> MissingPackage:
    """The error of a package that the core does not install. package: as it is imported. extra: of pyproject.toml, that
    installs it. purpose: what needs it, the key, flag or file that the user gave.

    The remedy is also that of an editable install: pip then only adds what the extra lists.
    """
    name = DISTRIBUTIONS.get(package)
    named = f"{package} (of {name})" if name else package
    return MissingPackage(f"{purpose}: {named} {problem}: pip install 'knowledge-entropy[{extra}]'")


def needs(module: str, extra: str, purpose: str) -> Any:
    """The module, imported, of a package that the core does not install. Raises MissingPackage, also where the package
    is there and its own import fails."""
    package = module.partition(".")[0]
    try:
        importlib.import_module(package)
        return importlib.import_module(module)
    except ImportError as error:
        absent = isinstance(error, ModuleNotFoundError) and error.name == package
        problem = "is not installed" if absent else f"cannot be imported ({short_message(error)})"
        raise missing_package(package, extra, purpose, problem) from error


def did_you_mean(name: str, known: Iterable[str], prefix: str = "") -> str:
    """The end of an error about an unknown name: the most similar known one, or nothing if none is similar."""
    nearest = difflib.get_close_matches(name, list(known), n=1)
    return f", did you mean '{prefix}{nearest[0]}'?" if nearest else ""


def listed(problems: Sequence[str], most: int = 5) -> str:
    """Problems in one line, the first `most` of them, so that one attempt shows them all."""
    rest = len(problems) - most
    return "; ".join(problems[:most]) + (f"; and {rest} more" if rest > 0 else "")


def short_message(error: BaseException) -> str:
    """An error in one line; of those that torch gathers from several processes, the first."""
    for failure, _ in (getattr(error, "failures", None) or {}).values():
        return short_message(failure)
    lines = str(error).splitlines()
    return (isinstance(error, OSError) and error.strerror) or (lines[0] if lines else type(error).__name__)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are ConfigurationErrors, so that they too are one line; its help shows the
    description as it is written."""

    def __init__(self, prog: str, formatter_class: Any = argparse.RawDescriptionHelpFormatter, **options: Any):
        super().__init__(prog, formatter_class=formatter_class, **options)

    def error(self, message: str) -> NoReturn:
        raise ConfigurationError(f"{self.prog}: {message}")


def exit_status(main: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> int:
    """Run a command and turn errors a user can cause into one line on stderr.

    Returns 0 on success, 2 for a wrong command line or configuration, 1 for a failure while running (an unreadable
    file, wrong shapes, a NaN loss, no memory left), 75 where a run was interrupted and saved, otherwise 130 when
    interrupted from the keyboard and 128 + n after signal n (SIGTERM, SIGHUP). `--debug` anywhere on the command line
    is removed and lets the traceback through. Programming errors keep their traceback.

    A command continues if its output cannot be printed. At the end that is a failure (1), unless the reader of a pipe
    has closed it, as `| head` does.

    All processes of torchrun make the same mistake; the first one prints it.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    output, errors = Stream(sys.stdout), Stream(sys.stderr)
    with redirect_stdout(cast(TextIO, output)), redirect_stderr(cast(TextIO, errors)), _signals_raise():
        try:
            status = _status(main, arguments, debug)
        finally:
            output.flush()
        if output.error is not None and not isinstance(output.error, BrokenPipeError):
            print(f"error: stdout: {output.error.strerror or output.error}", file=sys.stderr)
            status = status or 1
        errors.flush()
    return status


def _status(main: Callable[[Sequence[str]], None], arguments: Sequence[str], debug: bool) -> int:
    """The exit status of `main(arguments)`; an error is printed."""
    try:
        main(arguments)
    except Terminated as end:
        print(f"ended by {signal.Signals(end.args[0]).name}", file=sys.stderr)
        return 128 + int(end.args[0])
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Interrupted as end:
        if not _is_another_rank():
            print(f"interrupted: {end}", file=sys.stderr)
        return 75
    except FAILURES as error:
        if isinstance(error, (ConfigurationError, FailedOnAllRanks, MissingPackage)) and _is_another_rank():
            # torchrun ends this process as soon as the first has ended. One that lives on is alone with its error.
            time.sleep(_TORCHRUN_DELAY)
        if debug:
            traceback.print_exc()
        message = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, OSError) and error.strerror:
            message = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        if isinstance(error, MemoryError) or "out of memory" in message:
            message += "; use a smaller device_train_microbatch_size, device_eval_batch_size or --batch_size"
        line = printable(message).replace("\n", "\\n")  # of the name of a file
        print(f"error: {line}", file=sys.stderr)
        return 2 if isinstance(error, ConfigurationError) else 1
    return 0


@contextmanager
def _signals_raise() -> Iterator[None]:
    """Raise Terminated in this process on the first SIGTERM or SIGHUP, if they would end it otherwise.

    Not in one of several processes: it would wait for the others at its next collective.
    """
    numbers = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is signal.SIG_DFL]
    if threading.current_thread() is not threading.main_thread() or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        numbers = []
    process = os.getpid()

    def end(number: int, _: object) -> None:
        signal.signal(number, signal.SIG_DFL)  # a second one ends at once
        if os.getpid() != process:  # a fork of this one
            os.kill(os.getpid(), number)
        raise Terminated(number)

    for number in numbers:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def _is_another_rank() -> bool:
    """Whether this is a process of torchrun, but not the first."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and os.environ.get("RANK", "0") != "0"
