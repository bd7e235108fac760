"""Packages that a plain PyTorch image lacks, in a folder that `make gpu-carry` fills on a machine with a network."""

from __future__ import annotations

import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from olmo.exceptions import ConfigurationError, listed

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "gpu-site"
NAMES = Path(__file__).with_name("carried.txt")
IMAGE = ("torch>=2.11", "transformers", "numpy>=2.0", "safetensors")  # what the image itself must have


def use_carried() -> None:
    """Let this process import what is carried, before what is installed, which may be too old.

    Raises ConfigurationError where a package is neither installed nor carried, or is too old.
    """
    if str(FOLDER) not in sys.path:
        sys.path.insert(0, str(FOLDER))
    if wrong := [problem for problem in map(_problem, IMAGE) if problem]:
        raise ConfigurationError(
            f"{listed(wrong, len(wrong))}, in {sys.executable}: name the Python that has them: make gpu PYTHON=..."
        )
    lines = [line for line in NAMES.read_text("utf-8").splitlines() if not line.startswith("#")]
    if wrong := [problem for problem in map(_problem, lines) if problem]:
        raise ConfigurationError(
            f"{listed(wrong, len(wrong))}: on a machine with a network, run make gpu-carry and copy "
            f"{FOLDER.relative_to(ROOT)} here, or install them"
        )


def _problem(requirement: str) -> str:
    """What is wrong with the package that a line of a file of requirements names; "" where nothing is."""
    name, _, least = requirement.partition(">=")
    if (release := _release(name)) is None:
        return f"{name} is not installed"
    is_old = least and _numbers(release) < _numbers(least)
    return f"{name} {release} is older than {least}" if is_old else ""


def _release(package: str) -> str | None:
    """The release that this process imports."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _numbers(release: str) -> tuple[int, ...]:
    """2, 11, 0 of 2.11.0a0+cu130."""
    return tuple(map(int, re.findall(r"\d+", re.split(r"[^\d.]", release)[0])))
