"""A terminal for tests: runs a program on a pseudo-terminal, and shows what a person would read there."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import termios
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tests.running import ROOT
from tests.warm import warm_python


@dataclass
class Session:
    status: int
    output: str  # all that was written, control characters and all
    width: int

    @property
    def lines(self) -> list[str]:
        """What stands on the screen in the end, and above it, without spaces at the ends of lines."""
        return [line.rstrip() for line in screen(self.output, self.width)]


def screen(output: str, width: int) -> list[str]:
    """The lines that the output leaves on a terminal of any height. AssertionError for control characters that it does
    not know."""
    lines, row, column = [""], 0, 0
    for token in re.findall(r"\x1b\[[?\d;]*[A-Za-z]|[\s\S]", output):
        if token == "\r":
            column = 0
        elif token == "\n":
            row += 1
        elif token == "\x1b[2K":
            lines[row] = ""
        elif up := re.fullmatch(r"\x1b\[(\d+)A", token):
            row -= int(up[1])
        elif len(token) > 1:
            assert token.endswith("m") or token in ("\x1b[?25l", "\x1b[?25h"), repr(token)  # style, cursor
        else:
            assert token.isprintable(), repr(token)
            if column == width:  # a line that is full goes on in the next with the next character
                row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
            line = lines[row].ljust(column)
            lines[row], column = line[:column] + token + line[column + 1 :], column + 1
        lines += [""] * (row + 1 - len(lines))
    while not lines[-1] and len(lines) > 1:
        lines.pop()
    return lines


def on_terminal(
    arguments: Sequence[str],
    width: int = 100,
    environment: Mapping[str, str] | None = None,
    control_c_at: str | None = None,
    directory: os.PathLike[str] | str = ".",
) -> Session:
    """Run `python ARGUMENTS` on a terminal of its own.

    Control-C is typed when the output so far matches `control_c_at`.
    """
    python = warm_python()
    process, terminal = pty.fork()
    if process == 0:
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
        os.chdir(directory)
        dropped = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR")
        for name in dropped:
            os.environ.pop(name, None)
        own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TERM": "xterm-256color"}
        os.environ.update({**own, **(environment or {})})
        # Not execv: readline has set COLUMNS behind Python's back.
        os.execve(python, [python, *arguments], dict(os.environ))
    output = b""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if not select.select([terminal], [], [], 0.1)[0]:
            continue
        try:
            piece = os.read(terminal, 1 << 16)
        except OSError:  # the last of its writers is gone
            break
        output += piece
        if control_c_at is not None and re.search(control_c_at, output.decode(errors="replace")):
            os.write(terminal, b"\x03")
            control_c_at = None
    else:
        os.kill(process, 9)
    os.close(terminal)
    return Session(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), output.decode(), width)
