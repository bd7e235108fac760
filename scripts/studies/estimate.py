"""How long a plan takes and how much disk it needs, before anything runs.

Time: stages of a kind that have finished in the study's folder give seconds for each operation; without any, the speed
is that of a matrix product on this machine's cores, or stated for GPUs, times EFFICIENCY, and every command takes START
seconds more. Where stages run side by side, the plan takes as long as its longest chain, or all of it divided by the
jobs, whichever is more.

Measured on the demo: docs/studies.md.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from olmo.console import clock
from olmo.files.paths import read_json
from scripts.studies.costs import Cost, Costs
from scripts.studies.plan import Plan, Stage
from scripts.studies.records import FINISHED, Records

EFFICIENCY = {"cpu": 0.5, "gpu": 0.35}  # of a matrix product, in training and evaluation
A100 = 312e12  # operations per second in bfloat16, from its data sheet
START = 4.0  # seconds that a command takes before and after its work
_FIXED = {"edit": 0.0, "acquisition": 20.0, "report": 30.0, "fetch": 0.0}  # seconds of kinds without operations
_DOWNLOAD = 20e6  # bytes per second
_MARGIN = 1.1  # of the disk: logs, tables, figures


@dataclass(frozen=True)
class Estimate:
    """Of the stages that have not finished: seconds with all of them one after another and side by side, bytes by
    place; what the seconds are based on, and the stages that are left out because they cannot be known."""

    alone: float
    together: float
    written: dict[Path, float]
    basis: str
    unknown: list[str]

    def lines(self, jobs: int) -> list[str]:
        """As they are printed."""
        side = f" with {jobs} stages side by side ({in_time(self.alone)} one after another)" if jobs > 1 else ""
        found = [f"time: about {in_time(self.together)}{side}, {self.basis}"]
        found += [f"disk: about {in_bytes(n)}, {in_bytes(_free(p))} are free in {p}" for p, n in self.written.items()]
        return found + [f"not known, and not in these: {text}" for text in self.unknown]


def estimate(records: Records, stages: Sequence[Stage], jobs: int, threads: int, gpus: int = 0) -> Estimate:
    """What the stages of a plan that have not finished need, `jobs` at a time with `threads` threads or `gpus` each."""
    plan, costs = records.plan, Costs(records.plan)
    left = [stage for stage in stages if not records.is_finished(stage)]
    cost = {stage.name: costs.of(stage) for stage in left}
    rates, own = _rates(plan, costs, records.folder)
    width = max((c.width or 0 for c in cost.values()), default=0) or 1024
    seconds: dict[str, float] = {}
    unknown: dict[str, list[str]] = {}
    measured = False
    for stage in left:
        known = cost[stage.name]
        if stage.name in own:
            seconds[stage.name] = own[stage.name]
        elif stage.kind in rates and known.operations is not None:
            seconds[stage.name] = rates[stage.kind] * _work(known)
        elif known.operations is None:
            seconds[stage.name] = 0.0
            unknown.setdefault(f"{stage.kind}: {known.unknown}", []).append(stage.name)
        else:
            measured = measured or known.operations > 0
            work = known.operations / _speed(gpus, width, threads)[0] if known.operations else 0.0
            seconds[stage.name] = START + _FIXED.get(stage.kind, 0.0) + work
        if stage.kind == "fetch" and known.written:
            seconds[stage.name] = known.written / _DOWNLOAD
    alone = sum(seconds.values())
    together = max(alone / jobs, _longest(left, seconds))
    basis = "from stages of these kinds that have finished" if rates or own else ""
    if measured:
        speed, source = _speed(gpus, width, threads)
        basis += f"{' and ' if basis else ''}from operations (6 a weight and token, 2 in evaluations) at {speed:.2g} a "
        basis += f"second: {source}"
    written = {_existing(plan.folder): 0.0}
    for stage in left:
        place = _existing(stage.outputs[0] if stage.kind == "fetch" else plan.folder)
        same = next((p for p in written if p.stat().st_dev == place.stat().st_dev), place)  # one disk
        written[same] = written.get(same, 0.0) + _MARGIN * (cost[stage.name].written or 0.0)
    named = [
        f"{names[0]}{f' and {len(names) - 1} more' if names[1:] else ''} ({why})" for why, names in unknown.items()
    ]
    return Estimate(alone, together, written, basis or "from what commands take to start", named)


def check_space(found: Estimate) -> None:
    """Raise OSError where a disk has not enough room for what the stages leave on it."""
    for place, needed in found.written.items():
        if needed > (free := _free(place)):
            raise OSError(
                f"{place}: the study needs about {in_bytes(needed)} here, and {in_bytes(free)} are free; free "
                f"{in_bytes(needed - free)}, or name a folder on another disk with --output"
            )


def _existing(place: Path) -> Path:
    """The folder, or the nearest one around it that exists."""
    return next(path for path in (place.absolute(), *place.absolute().parents) if path.exists())


def _free(place: Path) -> int:
    return shutil.disk_usage(place).free


def in_time(seconds: float) -> str:
    """14:03, 2:10:00, or 12 days."""
    return clock(seconds) if seconds < 48 * 3600 else f"{seconds / 86400:,.0f} days"


def in_bytes(number: float) -> str:
    """1.2 GB."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number / 1e3:.0f} kB"


def _work(cost: Cost) -> float:
    """What seconds are proportional to: operations, or 1 for kinds that have none."""
    return cost.operations or 1.0


def _rates(plan: Plan, costs: Costs, folder: Path) -> tuple[dict[str, float], dict[str, float]]:
    """(seconds of a unit of `_work` by kind, seconds of stages by name), from records of stages that have finished,
    also with other settings."""
    total: dict[str, tuple[float, float]] = {}
    own: dict[str, float] = {}
    for path in sorted(folder.glob("*.json")):
        with suppress(OSError, ValueError, KeyError, TypeError):
            record = read_json(path)
            if record["state"] != FINISHED:
                continue
            seconds = float(record["seconds"])
            if record["kind"] == "prepare":
                own[record["name"]] = seconds
                continue
            known = costs.of(Stage(record["name"], record["kind"], tuple(_command(record["command"])), ()))
            if known.operations is not None:
                before = total.get(record["kind"], (0.0, 0.0))
                total[record["kind"]] = before[0] + seconds, before[1] + _work(known)
    return {kind: seconds / work for kind, (seconds, work) in total.items()}, own


def _command(recorded: Sequence[str]) -> Sequence[str]:
    """Module and arguments of a recorded command, without Python and the launcher."""
    return recorded[max(i for i, word in enumerate(recorded) if word == "-m") + 1 :]


def _longest(stages: Sequence[Stage], seconds: dict[str, float]) -> float:
    """The longest chain of stages that need one another."""
    ends: dict[str, float] = {}
    for stage in stages:  # what a stage needs is before it
        ends[stage.name] = seconds[stage.name] + max((ends.get(name, 0.0) for name in stage.needs), default=0.0)
    return max(ends.values(), default=0.0)


def _speed(gpus: int, width: int, threads: int) -> tuple[float, str]:
    """Operations per second of a stage, and where the number comes from."""
    if gpus:
        return EFFICIENCY["gpu"] * A100 * gpus, f"{EFFICIENCY['gpu']:.0%} of {gpus} A100 ({A100:.3g} each)"
    source = f"{EFFICIENCY['cpu']:.0%} of a matrix product on {threads} of these cores"
    return EFFICIENCY["cpu"] * threads * _product(width), source


@cache
def _product(width: int) -> float:
    """Operations per second of one core in a product of the shape of a feed-forward layer, float32; the best of some
    short measurements, in which the time of other programs does not count."""
    one, other = np.ones((1024, width), np.float32), np.ones((width, 4 * width), np.float32)
    best, until = 0.0, time.perf_counter() + 0.3
    while best == 0 or time.perf_counter() < until:
        started = time.process_time()  # of all threads together
        for _ in range(10):
            one @ other
        best = max(best, 10 * 2.0 * one.size * 4 * width / max(time.process_time() - started, 1e-6))
    return best
