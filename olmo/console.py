"""What a person sees while a command works: bars of progress, and log lines above them.

On a terminal rich draws the bars. While there are any it also prints, above them, whatever Python writes to stdout or
stderr. It is imported for the first bar, which comes when work has taken a second. Where stderr is no terminal, or one
that cannot rewrite its lines (TERM=dumb), progress is plain lines without control characters.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import threading
import time
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.live import Live

_LEAST_BAR, _LARGEST_BAR = 5, 40  # columns


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def on_terminal() -> bool:
    """Whether stderr is a terminal that can rewrite its lines."""
    return _itself(sys.stderr).isatty() and os.environ.get("TERM", "") not in ("", "dumb", "unknown")


def _itself(stream: TextIO) -> TextIO:
    """The stream behind the one that rich puts in its place while there are bars."""
    return getattr(stream, "rich_proxied_file", stream)


class Progress:
    """Progress of work of known size: a bar on a terminal, plain lines every ten seconds elsewhere.

    Work that ends within a second shows nothing. `done`: what had been done before, and says nothing of the rate.
    """

    def __init__(self, description: str, total: int, unit: str, *, show: bool = True, done: int = 0):
        self.description, self.total, self.unit, self.show = description, total, unit, show
        self.done = self._before = done
        self.started = time.monotonic()
        self.note = ""  # shown behind the rate, for instance a running estimate
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
        """Pieces a second, of those done here."""
        return (self.done - self._before) / max(time.monotonic() - self.started, 1e-9)

    @property
    def left(self) -> str:
        """The time that the rest takes."""
        rate = self.rate
        return clock((self.total - self.done) / rate) if rate else "?"

    def __str__(self) -> str:
        done = f"{self.description}: {self.done}/{self.total} {self.unit}"
        return f"{done}, {self.rate:,.1f}/s, {self.left} left{self.note}"

    def close(self) -> None:
        """Take the bar away."""
        _bars.remove(self)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Bars:
    """The bars of all work that goes on, of any thread, in the one display that a terminal can have."""

    def __init__(self) -> None:
        self.shown: list[Progress] = []
        self._display: Live | None = None
        self._lock = threading.RLock()

    def draw(self, progress: Progress) -> None:
        """Draw all bars anew, and from now on also this one."""
        # A terminal that is gone fails a write, not the work.
        with self._lock, suppress(OSError):
            if progress not in self.shown:
                self.shown.append(progress)
            if self._display is None:
                self._display = self._start()
            self._display.refresh()

    def remove(self, progress: Progress) -> None:
        with self._lock, suppress(OSError):
            display, is_last = self._display, self.shown == [progress]
            try:
                if display is not None and is_last:  # it draws the bar once more before it erases it
                    self._display = None
                    display.stop()
            finally:
                if progress in self.shown:
                    self.shown.remove(progress)
            if self._display is not None:
                self._display.refresh()

    def _start(self) -> Live:
        from rich.console import Console
        from rich.live import Live

        # Long lines are the terminal's to wrap, so that a path can be copied from it.
        console = Console(stderr=True, force_terminal=True, soft_wrap=True)
        display = Live(
            self, console=console, auto_refresh=False, transient=True, redirect_stdout=_itself(sys.stdout).isatty()
        )
        display.start()
        console.show_cursor(True)  # a process that is killed could not bring it back
        return display

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """A row for each bar; where lines are short, without the bar itself."""
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        shown = list(self.shown)
        texts = [Text(str(progress), no_wrap=True, overflow="ellipsis") for progress in shown]
        room = options.max_width - max((text.cell_len for text in texts), default=0) - 1
        width = min(room, _LARGEST_BAR) if room >= _LEAST_BAR else 0
        table = Table.grid(padding=(0, 1, 0, 0))
        for progress, text in zip(shown, texts):
            bar = [ProgressBar(total=progress.total, completed=progress.done, width=width)] if width else []
            table.add_row(*bar, text)
        yield table


_bars = _Bars()


class Lines(logging.StreamHandler):
    """Log lines on stdout, or on what rich puts in its place while there are bars."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stdout
        super().emit(record)


def above_bars(message: str) -> str:
    """What puts a line above the bars when it is written past Python and rich, as a signal handler does.

    Rich goes up from where the cursor is to where it drew the first bar, and would erase the line.
    """
    bars = len(_bars.shown)
    return ("\n" if bars else "") + message + "\n" * max(bars, 1)
