"""Packages that a plain PyTorch image lacks, in a folder that `make gpu-carry` fills on a machine with a network."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

from olmo.exceptions import ConfigurationError

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "gpu-site"
NAMES = Path(__file__).with_name("carried.txt")


def use_carried() -> None:
    """Let this process import what is carried; what is installed comes before it.

    Raises ConfigurationError where a package is neither installed nor carried.
    """
    if str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))
    lines = [line for line in NAMES.read_text("utf-8").splitlines() if not line.startswith("#")]
    missing = [name for name in ("torch", "transformers", "numpy", "safetensors", *lines) if not _is_there(name)]
    if missing:
        raise ConfigurationError(
            f"{', '.join(missing)}: not installed; on a machine with a network, run make gpu-carry and copy "
            f"{FOLDER.relative_to(ROOT)} here, or install them"
        )


def _is_there(package: str) -> bool:
    return find_spec(package.replace("-", "_")) is not None
