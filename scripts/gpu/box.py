"""One measurement, in the process that `runner.py` starts for it: `python -m scripts.gpu.box NAME FOLDER SETTINGS`.

Writes to FOLDER/rows.jsonl: first what the machine is, then every row as soon as it is measured, and the reason where
the machine cannot make the measurement.
"""

from __future__ import annotations

import importlib
import json
import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from olmo.exceptions import ConfigurationError, exit_status
from scripts.gpu.boxes import BOXES
from scripts.gpu.carried import use_carried
from scripts.gpu.rows import ROWS, Skipped, append, to_entry


def main(argv: Sequence[str]) -> None:
    if len(argv) != 3:
        raise ConfigurationError("scripts.gpu.box: python -m scripts.gpu starts this with NAME FOLDER SETTINGS")
    name, folder, settings = argv[0], Path(argv[1]), json.loads(argv[2])
    use_carried()
    from scripts.gpu.place import Place

    place = Place(folder, **settings)
    if name == "peak":
        append(folder / ROWS, about=about(place))
    try:
        for row in importlib.import_module(BOXES[name].module).measure(place):
            append(folder / ROWS, row=to_entry(row))
    except Skipped as reason:
        append(folder / ROWS, skipped=str(reason))


def about(place: Any) -> dict[str, Any]:
    """The machine and its programs."""
    import torch

    known: dict[str, Any] = {"device": platform.processor() or platform.machine(), "cuda": None, "driver": None}
    if place.device.type == "cuda":
        memory = torch.cuda.get_device_properties(place.device).total_memory / 2**30
        known = {"device": torch.cuda.get_device_name(place.device), "memory_gib": memory, "cuda": torch.version.cuda}
        known["driver"] = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    versions = {"torch": torch.__version__, "transformers": version("transformers")}
    changed = _output("git", "status", "--porcelain")
    git = {"commit": _output("git", "rev-parse", "HEAD"), "changed": None if changed is None else bool(changed)}
    return {**known, **versions, "python": platform.python_version(), **git}


def _output(*command: str) -> str | None:
    """The first line that a program prints; None where there is no such program or it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip().partition("\n")[0] if done.returncode == 0 else None


if __name__ == "__main__":
    sys.exit(exit_status(main))
