"""Run measurements one after another, each in a process of its own, and keep what each has measured.

Memory, caches of compiled code and crashes are then a measurement's own. Box k is killed when the time of boxes 1 to k
is over, so that what one leaves unused is the next one's, and the whole run ends in time.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scripts.gpu.boxes import SMALL_SCALE, Box
from scripts.gpu.rows import ROWS, Row, entries, from_entry

ROOT = Path(__file__).resolve().parents[2]
COMMAND = (sys.executable, "-m", "scripts.gpu.box")
GRACE = 2.0  # seconds between SIGTERM and SIGKILL


@dataclass
class Outcome:
    """What a box has measured, and how it ended: done, skipped, failed, overran."""

    box: Box
    allowed: float  # seconds
    seconds: float = 0.0
    status: str = "done"
    reason: str = ""
    rows: list[Row] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)  # the machine; from the first box


def run_boxes(
    boxes: Sequence[Box], output: Path, small: bool, limit: float, ended: Callable[[list[Outcome]], None]
) -> list[Outcome]:
    """The outcomes of all boxes; `ended` gets those so far after each. Logs are written to OUTPUT/NAME.log.

    A box that would begin after `limit` seconds, or after a first one that failed, is skipped.
    """
    outcomes: list[Outcome] = []
    started, planned = time.monotonic(), 0.0
    scale = SMALL_SCALE if small else 1
    for box in boxes:
        planned = min(planned + scale * box.seconds, limit)
        allowed = planned - (time.monotonic() - started)
        if outcomes and outcomes[0].status != "done":
            outcome = Outcome(box, allowed, status="skipped", reason=f"{boxes[0].name} was not measured")
        elif allowed <= 0:
            outcome = Outcome(box, 0.0, status="skipped", reason=f"no time left of {limit:g} s")
        else:
            peak = outcomes[0].rows[0].value * 1e12 if outcomes else None
            earlier = {f"{one.box.name}: {row.name}": row.value for one in outcomes for row in one.rows}
            outcome = run_box(box, output, {"small": small, "peak": peak, "earlier": earlier}, allowed)
        outcomes.append(outcome)
        ended(outcomes)
    return outcomes


def run_box(box: Box, output: Path, settings: dict[str, Any], allowed: float) -> Outcome:
    """Run one box in a folder that is deleted at its end, for at most `allowed` seconds."""
    folder, log = output / f".{box.name}", output / f"{box.name}.log"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    outcome, started = Outcome(box, allowed), time.monotonic()
    command = [*COMMAND, box.name, str(folder), json.dumps(settings)]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    own = {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **own},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(allowed)
        except subprocess.TimeoutExpired:
            status, outcome.status = None, "overran"
            outcome.reason = f"killed after {allowed:.0f} s; {log} has its output"
        finally:
            _end(process)
    outcome.seconds = time.monotonic() - started
    for entry in entries(folder / ROWS):
        outcome.about = entry.get("about", outcome.about)
        if "row" in entry:
            outcome.rows.append(from_entry(entry["row"]))
        if "skipped" in entry:
            outcome.status, outcome.reason = "skipped", entry["skipped"]
    if status:
        lines = log.read_text("utf-8", errors="replace").strip().splitlines()
        outcome.status = "failed"
        outcome.reason = f"status {status}: {lines[-1] if lines else 'no output'}; {log} has its output"
    shutil.rmtree(folder)
    return outcome


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and those that it has started, of its session."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            continue
    process.wait()
