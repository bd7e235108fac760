"""The tests that are marked gpu, file by file: how many fail, which must be none."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from scripts.gpu.place import Place
from scripts.gpu.rows import Row, Skipped

ROOT = Path(__file__).resolve().parents[2]


class Reports:
    """A plugin of pytest: counts of outcomes, names of what failed, reasons of what was skipped."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.failed: list[str] = []
        self.reasons: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:  # also before and after the test itself
            self.counts["failed"] += 1
            self.failed.append(report.nodeid.rpartition("::")[2])
        elif report.skipped:
            self.counts["skipped"] += 1
            self.reasons[report.longrepr[2].removeprefix("Skipped: ")] += 1
        elif report.when == "call":
            self.counts["passed"] += 1


def measure(place: Place) -> Iterator[Row]:
    """A row for each test_gpu.py: the number of tests that failed. In a small run they run on a CPU where they can."""
    if find_spec("pytest") is None:
        raise Skipped("pytest is not installed")
    import pytest

    files = sorted((ROOT / "tests").rglob("test_gpu.py"))
    if not files:
        raise Skipped("tests/ is not here: run in a checkout of the repository")
    if place.device.type == "cpu":
        os.environ["GPU_TESTS_ON_CPU"] = "1"  # tests/devices.py
    os.environ["XDG_CACHE_HOME"] = str(place.folder / "cache")  # commands record results in the user's otherwise
    for file in files:
        reports, name = Reports(), str(file.relative_to(ROOT))
        # Without tests/conftest.py, which needs hypothesis.
        options = ["--noconftest", "-p", "tests.devices", "-m", "gpu", "--basetemp", str(place.folder / "tests")]
        status = pytest.main([*options, str(file)], plugins=[reports])
        if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            raise RuntimeError(f"{name}: pytest ended with status {int(status)}")
        reasons = "; ".join(f"{count} x {reason}" for reason, count in reports.reasons.items())
        notes = [f"{reports.counts['passed']} passed", reasons and f"skipped: {reasons}", ", ".join(reports.failed[:5])]
        yield Row(f"failures of {name}", reports.counts["failed"], "", at_most=0, note="; ".join(filter(None, notes)))
