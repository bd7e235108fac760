"""`python -m tests.killed MODULE ARGUMENTS`: a command, killed (SIGKILL) at its first rename, when all is written."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from pathlib import Path
from typing import Any


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main = importlib.import_module(sys.argv[1]).main
    for owner, name in ((Path, "replace"), (Path, "rename"), (os, "replace"), (os, "rename")):
        setattr(owner, name, die)
    main(sys.argv[2:])
