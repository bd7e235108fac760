"""Where the modules of a model are to be: `--device_map`, read and checked; `olmo/model/placement.py` places them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from olmo.exceptions import ConfigurationError
from olmo.files.paths import read_json

DeviceMap = str | Mapping[str, Any]  # "auto", or modules and their places


def read_device_map(text: str) -> DeviceMap:
    """The value of --device_map: auto, or the map in a JSON file. Raises ConfigurationError for anything else."""
    if text == "auto":
        return check_device_map(text)
    if not Path(text).is_file():
        raise ConfigurationError(f"--device_map {text}: neither auto nor a JSON file of modules and their devices")
    try:
        found = read_json(Path(text))
    except ValueError as error:
        raise ConfigurationError(f"--device_map: {error}") from error
    return check_device_map(found)


def check_device_map(given: Any) -> DeviceMap:
    """A device map that a user wrote. Raises ConfigurationError for anything else, and under several processes."""
    mapped = isinstance(given, Mapping) and given and all(isinstance(name, str) for name in given)
    if given != "auto" and not mapped:
        raise ConfigurationError("--device_map: expected auto, or modules and their devices, such as {'': 0}")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigurationError("--device_map: one process only, which uses all devices; start it without a launcher")
    return given
