"""What a command prints: log lines, bars of progress, and no secrets.

On a terminal rich draws the bars, and prints above them whatever Python writes to stdout or stderr. It is imported for
the first bar, which is drawn once work has taken a second. Where stderr is not a terminal, or is one that cannot
rewrite its lines (TERM=dumb), progress is printed as plain lines without control characters.
"""

from __future__ import annotations

import io
import logging
import math
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as Display
    from rich.progress import TaskID

_LARGEST_BAR = 40  # columns

# Secret -> what is printed and saved in its place. A configuration may take a secret from the environment
# (`${oc.env:TOKEN}`); errors and saved configurations name the variable.
_SECRETS: dict[str, str] = {}
_SECRET_VARIABLE = re.compile(r"(^|_)(TOKEN|SECRET|PASSWORD|API_?KEY|ACCESS_KEY|SECRET_KEY)$", re.IGNORECASE)
_SHORTEST_SECRET = 8  # characters
_USER = re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^/\s@'\"]+@", re.IGNORECASE)
_QUERY = re.compile(r"(?<=[\w/.-])\?[\w%.~-]+=[^\s'\"]*?(?=[:;,)]*(\s|['\"]|$))")
# All but tabs and ends of lines; those that turn the direction of a text, too.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")

log = logging.getLogger("olmo")


def remember_secret(value: str, shown: str) -> None:
    """Let `conceal` replace this value by `shown`."""
    if value:
        _SECRETS[value] = shown


def conceal(text: str) -> str:
    """The text with every known secret replaced by the name of its variable."""
    for value in sorted(_SECRETS, key=len, reverse=True):
        text = text.replace(value, _SECRETS[value])
    return text


def printable(text: str) -> str:
    """A text to print or log that may hold what others have written: control characters are escaped, passwords and
    queries of URLs removed (a query can be a signature), secrets of the environment and of `conceal` replaced."""
    text = conceal(text)
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST_SECRET and _SECRET_VARIABLE.search(name):
            text = text.replace(value, f"${name}")
    text = _QUERY.sub("?...", _USER.sub(r"\1", text))
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def _make_printable(record: logging.LogRecord) -> bool:
    record.msg, record.args = printable(record.getMessage()), ()
    return True


log.addFilter(_make_printable)


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def fixed(value: float, digits: int, sign: str = "") -> str:
    """A number with so many digits after the point; with its sign for `sign` "+". Zero is never negative: -0.001 with
    two digits is 0.00."""
    return f"{round(float(value), digits) + 0.0:{sign}.{digits}f}"


def on_terminal() -> bool:
    """Whether stderr is a terminal that can rewrite its lines."""
    return _itself(sys.stderr).isatty() and os.environ.get("TERM", "") not in ("", "dumb", "unknown")


def _itself(stream: TextIO) -> TextIO:
    """The stream that rich replaces with its own while there are bars."""
    return getattr(stream, "rich_proxied_file", stream)


class Progress:
    """Progress of work: a bar on a terminal, plain lines every ten seconds elsewhere.

    Work that ends within a second shows nothing. `total`: 0 where it is unknown. `done`: what was done before, not
    counted in the rate.
    """

    def __init__(self, description: str, total: int, unit: str, *, show: bool = True, done: int = 0):
        self.description, self.total, self.unit, self.show = description, total, unit, show
        self.done = self._before = done
        self.started = time.monotonic()
        self.note = ""  # shown after the rate, for instance a running estimate
        self._terminal = on_terminal()
        self._next = self.started + (1.0 if self._terminal else 10.0)

    def advance(self, count: int = 1) -> None:
        self.done += count
        now = time.monotonic()
        if self.show and now >= self._next:
            self._next = now + (0.2 if self._terminal else 10.0)
            if self._terminal:
                _bars.draw(self)
            else:
                sys.stderr.write(f"{self}\n")
                sys.stderr.flush()

    @property
    def rate(self) -> float:
        """Items per second, without those done before."""
        return (self.done - self._before) / max(time.monotonic() - self.started, 1e-9)

    @property
    def left(self) -> str:
        """Estimated time to the end, as `clock` prints it."""
        rate = self.rate
        return clock((self.total - self.done) / rate) if rate else "?"

    def __str__(self) -> str:
        if not self.total:
            return f"{self.description}: {self.done} {self.unit}, {self.rate:,.1f}/s{self.note}"
        done = f"{self.description}: {self.done}/{self.total} {self.unit}"
        return f"{done}, {self.rate:,.1f}/s, {self.left} left{self.note}"

    def close(self) -> None:
        """Remove the bar."""
        _bars.remove(self)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Bars:
    """The bars of all work in progress, of any thread, in the one display that a terminal can have."""

    def __init__(self) -> None:
        self._display: Display | None = None
        self.tasks: dict[Progress, TaskID] = {}
        self._lock = threading.RLock()

    def draw(self, progress: Progress) -> None:
        """Show a bar, or draw it anew."""
        # A terminal that was closed fails the write; the work continues.
        with self._lock, suppress(OSError):
            if self._display is None:
                self._display = _start_display()
            if progress not in self.tasks:
                self.tasks[progress] = self._display.add_task("", total=progress.total or None)
            self._display.update(self.tasks[progress], completed=progress.done, description=str(progress), refresh=True)

    def remove(self, progress: Progress) -> None:
        with self._lock, suppress(OSError):
            display, is_last = self._display, list(self.tasks) == [progress]
            try:
                if display is not None and is_last:  # stop() draws the bar once more, then erases it
                    self._display = None
                    display.stop()
            finally:
                task = self.tasks.pop(progress, None)
            if task is not None and self._display is not None:
                self._display.remove_task(task)
                self._display.refresh()


def _start_display() -> Display:
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Display
    from rich.table import Column

    # The terminal wraps long lines, so that a path can be copied in one piece.
    console = Console(stderr=True, force_terminal=True, soft_wrap=True)
    display = Display(
        BarColumn(_LARGEST_BAR, table_column=Column(no_wrap=False)),  # narrowed to what the text leaves
        TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")),
        console=console,
        auto_refresh=False,
        transient=True,
        redirect_stdout=_itself(sys.stdout).isatty(),
    )
    display.start()
    console.show_cursor(True)  # a process that is killed could not show it again
    return display


_bars = _Bars()


class StdoutHandler(logging.StreamHandler):
    """Log lines on stdout, or on the stream that replaces it while there are bars."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stdout
        super().emit(record)


def above_bars(message: str) -> str:
    """A message as a line that bars do not erase, for a signal handler, which writes past Python and rich.

    Rich moves the cursor up by as many lines as there are bars, and erases from there.
    """
    bars = len(_bars.tasks)
    return ("\n" if bars else "") + message + "\n" * max(bars, 1)


class Stream:
    """Stdout or stderr of a command: characters it cannot encode are escaped, and once it cannot be written the rest is
    discarded. `error`: the reason."""

    def __init__(self, stream: TextIO | None):
        # Python has None for a stream that was closed before it started.
        self._stream = open(os.devnull, "w") if stream is None else stream  # noqa: SIM115 (open to the end)
        self.error: OSError | None = None
        if isinstance(self._stream, io.TextIOWrapper):
            self._stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        self._unless_failed(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._unless_failed(self._stream.flush)

    def _unless_failed(self, call: Callable[..., object], *arguments: Any) -> None:
        if self.error is not None:
            return
        try:
            call(*arguments)
        except OSError as error:
            self.error = error
            # What is still buffered would fail again when the interpreter ends.
            with suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
