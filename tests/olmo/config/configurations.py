"""Configurations as text, and what `load` reports of wrong ones."""

from pathlib import Path

import pytest

from olmo.config import load
from olmo.exceptions import ConfigurationError

MINIMAL = "optimizer: {name: adamw}\n"


PIQA = MINIMAL + "evaluators:\n  - {label: piqa, type: downstream}\n"


def write(folder: Path, text: str, name: str = "config.yaml") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def problem(folder: Path, text: str, *overrides: str) -> str:
    """What `load` says about a wrong file, without the name of the file."""
    path = write(folder, text)
    with pytest.raises(ConfigurationError) as caught:
        load(path, overrides)
    return str(caught.value).removeprefix(f"{path}: ")
