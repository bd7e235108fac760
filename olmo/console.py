"""Progress of a command on the console: bars, and log lines above them.

On a terminal rich draws the bars, and prints above them whatever Python writes to stdout or stderr. It is imported for
the first bar, which is drawn once work has taken a second. Where stderr is not a terminal, or is one that cannot
rewrite its lines (TERM=dumb), progress is printed as plain lines without control characters.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, TextIO

from .exceptions import printable

if TYPE_CHECKING:
    from rich.progress import Progress as Display
    from rich.progress import TaskID

_LARGEST_BAR = 40  # columns

log = logging.getLogger("olmo")


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
    """Progress of work of known size: a bar on a terminal, plain lines every ten seconds elsewhere.

    Work that ends within a second shows nothing. `done`: what was done before, not counted in the rate.
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
                self.tasks[progress] = self._display.add_task("", total=progress.total)
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
