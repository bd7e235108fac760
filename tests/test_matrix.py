"""The workflow, the Makefile, pyproject.toml and constraints.txt agree on targets, Pythons and releases."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:  # pytest brings it
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PYTHONS = [line.rpartition(" ")[2] for line in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", line)]
JOBS: dict[str, dict[str, Any]] = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text())["jobs"]
ENTRIES = [entry for job in JOBS.values() for entry in job["strategy"]["matrix"]["include"]]
# A python that writes its arguments to a file and makes environments of such pythons.
STUB = """#!/bin/sh
if [ "$1" = --version ]; then echo Python {version}; exit; fi
echo "$0 $*" >> {log}
if [ "$2" = venv ]; then mkdir -p "$4/bin" && cp "$0" "$4/bin/python"; fi
"""


def test_every_target_of_the_workflow_is_in_the_makefile() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    used = {entry["make"] for entry in ENTRIES}
    assert {"checks", "docs", "wheel", "test", "test-lowest", "test-highest", "test-smoke"} <= used <= targets
    for job in JOBS.values():
        assert {"run": "make ${{ matrix.make }} PYTHON=python"} in job["steps"]


def test_the_smoke_test_has_files_of_every_folder_of_olmo() -> None:
    listed = re.findall(r"^SMOKE \+?= ((?:.*\\\n)*.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    paths = " ".join(listed).replace("\\\n", " ").split()
    assert all((ROOT / path).exists() for path in paths)
    folders = {path for path in (ROOT / "tests/olmo").iterdir() if path.is_dir() and list(path.glob("test_*.py"))}
    assert folders <= {parent for path in paths for parent in ((ROOT / path), (ROOT / path).parent)}


def test_the_workflow_has_the_pythons_of_the_classifiers() -> None:
    wanted = {"test": PYTHONS, "test-lowest": PYTHONS[:1], "test-highest": PYTHONS[-1:]}
    assert {make: [entry["python"] for entry in ENTRIES if entry["make"] == make] for make in wanted} == wanted
    assert PROJECT["requires-python"] == f">={PYTHONS[0]}"


def test_every_job_ends_and_has_actions_of_a_major_version() -> None:
    for job in JOBS.values():
        assert job["timeout-minutes"] <= 60
        actions = [step["uses"] for step in job["steps"] if "uses" in step]
        assert len(actions) == 2 and all(re.fullmatch(r"actions/[a-z-]+@v\d+", action) for action in actions)


@pytest.mark.parametrize(
    ("target", "option"),
    [
        ("test-lowest", "uv pip install .* --upgrade --resolution lowest-direct"),
        ("test-highest", "--upgrade --upgrade-strategy eager"),
    ],
)
def test_releases_are_those_of_the_target_and_the_python_is_the_one_named(
    target: str, option: str, tmp_path: Path
) -> None:
    """An environment of another Python is made anew; one of the same Python is kept; no constraints are used."""
    variable, log, python = target.removeprefix("test-").upper(), tmp_path / "log", tmp_path / "python"

    def make(version: str) -> list[str]:
        log.write_text("")
        python.write_text(STUB.format(version=version, log=log))
        python.chmod(0o755)
        command = ["make", target, f"{variable}={tmp_path}/environment", f"PYTHON={python}"]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        return log.read_text().splitlines()

    created, *steps = make("3.10.1")
    assert created == f"{python} -m venv --clear {tmp_path}/environment"
    assert any(re.search(f"{option} .*--editable .*dev,real", step) for step in steps)
    assert not any("constraint" in step for step in steps)
    assert steps[-1].startswith(f"{tmp_path}/environment/bin/python -m pytest -m ")
    assert make("3.10.1") == steps
    assert make("3.11.1") == [created, *steps]


def test_the_pinned_releases_are_ones_that_pyproject_permits() -> None:
    """Those for other Pythons and systems included; extras that need no pin: liger, of CUDA alone."""
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = {pin.name: Version(str(pin.specifier).removeprefix("==")) for pin in map(Requirement, lines)}
    extras = PROJECT["optional-dependencies"]
    needed = [*PROJECT["dependencies"], *(line for extra in extras for line in extras[extra] if extra != "liger")]
    for requirement in map(Requirement, needed):
        if requirement.name != PROJECT["name"]:
            assert requirement.name in pins, f"constraints.txt has no release of {requirement.name}"
            assert pins[requirement.name] in requirement.specifier, requirement
