"""Kill commands of the analysis again and again (SIGKILL), and compare what they leave with uninterrupted ones.

    python -m tests.crash_analysis FOLDER --kills 30                 # of each command
    python -m tests.crash_analysis FOLDER --commands convert entropy

Each attempt is a fork of this process. Half of the kills are at any time of its life; the others follow the appearance
of a temporary file, within milliseconds. After a kill every file of the output must be absent or equal to that of the
uninterrupted command, byte for byte; after the same command has then run to its end all must be there, and no temporary
file. The last line of the output is JSON: what was killed where, and what differed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from analysis import canvas, change_parameters, entropy, entropy_series  # noqa: F401 (every fork would anew)
from olmo.exceptions import exit_status
from scripts import convert
from tests.analysis.editing import LENGTH, uneven_model, write

Main = Callable[[Sequence[str]], None]
SERIES = "knowledge_entropy_series.json"  # grows with each checkpoint


def write_world(folder: Path) -> dict[str, tuple[Main, list[str]]]:
    """Two checkpoints, measured, and what to run on them: a command and its arguments, in which OUT is replaced."""
    tokens = folder / "tokens.npy"
    folder.mkdir(parents=True)
    np.random.default_rng(0).integers(2, 128, 40 * LENGTH).astype("<u2").tofile(tokens)
    steps = [str(write(folder / f"step{step}-unsharded", uneven_model(step))) for step in (90, 91)]
    data = ["--data", str(tokens), "--data_size", "40"]
    results = folder / "results"
    for argv in (["--checkpoint", *steps, "--output", str(results), *data], ["--checkpoint", steps[0], *data]):
        assert Attempt(folder / "world.log", entropy.main, argv).ended(wait=True) == 0
    edit = ["--checkpoint", steps[0], "--resuscitation_ratio", "0.5", "--amplifying_factor", "2"]
    return {
        "entropy": (entropy.main, ["--checkpoint", *steps, "--output", "OUT", *data]),
        "entropy_series": (entropy_series.main, [str(results), "--output", "OUT"]),
        "change_parameters": (change_parameters.main, [*edit, "--output", "OUT/edit.safetensors", "--verify"]),
        "change_parameters full": (change_parameters.main, [*edit, "--output", "OUT/edit.pt", "--format", "full"]),
        "convert": (convert.main, [steps[0], "OUT/hf", "--to", "hf"]),
    }


class Attempt:
    """A command in a fork of this process, which lives until it is done or killed."""

    def __init__(self, log: Path, main: Main, argv: Sequence[str]):
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            descriptor = os.open(log, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            status = 70
            try:
                status = exit_status(main, argv)
            finally:
                os._exit(status)

    def ended(self, wait: bool = False) -> int | None:
        """The exit status (minus the signal), None while it lives."""
        pid, status = os.waitpid(self.pid, 0 if wait else os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if pid else None


def contents(folder: Path) -> dict[str, bytes]:
    """What has its final name, but PDF figures, which state when they were made."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pdf")
    named = {str(path.relative_to(folder)): path for path in files}
    return {name: content(path) for name, path in named.items() if "/." not in f"/{name}"}


def content(path: Path) -> bytes:
    """The bytes of a file; of safetensors with the keys of the header in order, which it does not keep."""
    found = path.read_bytes()
    if path.suffix != ".safetensors":
        return found
    end = 8 + int.from_bytes(found[:8], "little")
    return json.dumps(json.loads(found[8:end]), sort_keys=True).encode() + found[end:]


def temporary(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob(".*"))


def differences(out: Path, whole: dict[str, bytes], complete: bool) -> list[str]:
    """What an output has that the one of the uninterrupted command has not; if `complete`, also what it lacks."""
    found = contents(out)
    wrong = [name for name, content in found.items() if content != whole.get(name)]
    if not complete:  # the table of the checkpoints so far
        wrong = [name for name in wrong if not (Path(name).name == SERIES and json.loads(found[name])["rows"])]
    missing = sorted(whole.keys() - found.keys()) if complete else []
    return [*wrong, *(f"{name} is missing" for name in missing), *(temporary(out) if complete else [])]


def crash(folder: Path, main: Main, argv: Sequence[str], kills: int, chance: random.Random) -> dict[str, Any]:
    """Kill the command `kills` times, each time in a new output folder; the report."""
    log, whole = folder.with_suffix(".log"), folder / "whole"

    def attempt(out: Path) -> Attempt:
        out.mkdir(parents=True, exist_ok=True)
        return Attempt(log, main, [argument.replace("OUT", str(out)) for argument in argv])

    started = time.monotonic()
    assert attempt(whole).ended(wait=True) == 0, log.read_text()[-2000:]
    length, wanted = time.monotonic() - started, contents(whole)
    places: Counter[str] = Counter()
    wrong: list[str] = []
    for number in range(kills):
        out = folder / str(number)
        while True:  # until a kill comes before the end
            shutil.rmtree(out, ignore_errors=True)
            running, aimed = attempt(out), number % 2 == 1
            until = time.monotonic() + chance.uniform(0, length)
            which, status = chance.randrange(4), running.ended()
            while status is None and (not (temporary(out) and which == 0) if aimed else time.monotonic() < until):
                which -= bool(aimed and which and temporary(out) and chance.random() < 0.3)
                status = running.ended()
            if status is None:
                if aimed:
                    time.sleep(chance.uniform(0, 0.002))
                os.kill(running.pid, signal.SIGKILL)
                status = running.ended(wait=True)
            if status == -signal.SIGKILL:
                break
            assert status == 0, log.read_text()[-2000:]
        done = len(contents(out))
        state = "while writing" if temporary(out) else "before any output" if not done else "between or after files"
        places[state] += 1
        wrong += [f"kill {number}, {state}: {what}" for what in differences(out, wanted, complete=False)]
        if attempt(out).ended(wait=True):
            wrong.append(f"kill {number}: the same command failed: {log.read_text().splitlines()[-1]}")
        wrong += [f"kill {number}, again: {what}" for what in differences(out, wanted, complete=True)]
        print(f"kill {number}: {state}, {len(wrong)} differences so far", flush=True)
    return {"kills": kills, "places": dict(places), "differences": wrong}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of all outputs; anew each time")
    parser.add_argument("--kills", type=int, default=20, help="of each command")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commands", nargs="+", help="default: all")
    options = parser.parse_args()
    shutil.rmtree(options.folder, ignore_errors=True)
    folder = options.folder.resolve()
    chance, report = random.Random(options.seed), {}
    for name, (command, argv) in write_world(folder / "world").items():
        if options.commands is None or name in options.commands:
            report[name] = crash(folder / name.replace(" ", "-"), command, argv, options.kills, chance)
            print(f"{name}: {report[name]}", flush=True)
    print(json.dumps(report))
    sys.exit(any(found["differences"] for found in report.values()))


if __name__ == "__main__":
    main()
