"""Errors a user can cause, and how every command reports them: one line, and a documented exit status."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

# What torchrun has time for between the end of one process and that of the others.
_TORCHRUN_DELAY = 10.0  # seconds


# Secret -> what is printed and saved in its place. A configuration may take a secret from the environment
# (`${oc.env:TOKEN}`); errors and saved configurations name the variable.
_SECRETS: dict[str, str] = {}


# What a user's files, settings or machine can cause; anything else is a programming error.
FAILURES = (ValueError, OSError, ImportError, RuntimeError, MemoryError)


class ConfigurationError(ValueError):
    """A wrong command line or configuration; commands exit with status 2."""


class FailedOnAllRanks(OSError):
    """An error of one of several processes that all of them raise; the first one prints it."""


class Interrupted(Exception):
    """A run that was asked to end before its last step and has saved: the same command continues it.

    Commands exit with status 75, EX_TEMPFAIL of sysexits.h: try again.
    """


def remember_secret(value: str, shown: str) -> None:
    """Let `conceal` replace this value by `shown`."""
    if value:
        _SECRETS[value] = shown


def conceal(text: str) -> str:
    """The text with every known secret replaced by the name of its variable."""
    for value in sorted(_SECRETS, key=len, reverse=True):
        text = text.replace(value, _SECRETS[value])
    return text


def check_new(output: Path) -> None:
    """Raise ConfigurationError if an output already exists; it may be what the command reads."""
    if output.exists() or output.is_symlink():
        raise ConfigurationError(f"{output}: already exists; delete it or choose another place")


def did_you_mean(name: str, known: Iterable[str], prefix: str = "") -> str:
    """The end of an error about an unknown name: the most similar known one, or nothing if none is similar."""
    nearest = difflib.get_close_matches(name, list(known), n=1)
    return f", did you mean '{prefix}{nearest[0]}'?" if nearest else ""


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
    file, wrong shapes, a NaN loss, no memory left), 75 where a run was interrupted and saved, 130 when interrupted from
    the keyboard otherwise. `--debug` anywhere on the command line is removed and lets the traceback through.
    Programming errors keep their traceback.

    All processes of torchrun make the same mistake; the first one prints it.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        main(arguments)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Interrupted as end:
        if not _is_another_rank():
            print(f"interrupted: {end}", file=sys.stderr)
        return 75
    except FAILURES as error:
        if isinstance(error, (ConfigurationError, FailedOnAllRanks)) and _is_another_rank():
            # torchrun ends this process as soon as the first has ended. One that lives on is alone with its error.
            time.sleep(_TORCHRUN_DELAY)
        if debug:
            traceback.print_exc()
        message = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, OSError) and error.strerror and error.filename:
            message = f"{error.filename}: {error.strerror}"
        if isinstance(error, MemoryError) or "out of memory" in message:
            message += "; use a smaller device_train_microbatch_size, device_eval_batch_size or --batch_size"
        print(f"error: {conceal(message)}", file=sys.stderr)
        return 2 if isinstance(error, ConfigurationError) else 1
    return 0


def _is_another_rank() -> bool:
    """Whether this is a process of torchrun, but not the first."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and os.environ.get("RANK", "0") != "0"
