"""The two result files of a measured checkpoint: `knowledge_entropy.json` and the average coefficients beside it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from analysis.measure import Measurement
from olmo.files.atomic import atomic_path, write_text
from olmo.files.paths import check_readable
from olmo.files.tensors import read_tensor, write_safetensors

RESULT = "knowledge_entropy.json"
COEFFICIENTS_FILE = "mlp_average_coefficients.safetensors"


def save_result(folder: Path, measurement: Measurement, result: dict[str, Any]) -> None:
    """Write `result`, the content of `knowledge_entropy.json`, and the average coefficients (L, M) in float32, each
    atomically. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    edited = "" if result["resuscitation"] is None else f" resuscitated by {result['resuscitation']}"
    metadata = {
        "checkpoint_fingerprint": f"{result['checkpoint']['fingerprint']}{edited}",
        "coefficient": result["coefficient"],
    }
    average = torch.from_numpy(measurement.coefficients).float()
    with atomic_path(folder / COEFFICIENTS_FILE) as partial:
        write_safetensors(partial, {"mlp_average_coefficients": average}, metadata)
    write_text(folder / RESULT, json.dumps(result, indent=1) + "\n")


def find_coefficients(folder: Path) -> Path:
    """The file of average coefficients in a checkpoint folder, ours or the published one."""
    for path in (folder / COEFFICIENTS_FILE, (folder / COEFFICIENTS_FILE).with_suffix(".pt")):
        if path.is_file():
            return path
    raise FileNotFoundError(f"{folder}: no {COEFFICIENTS_FILE}; run python -m analysis.entropy on it first")


@dataclass(frozen=True)
class Coefficients:
    """Average coefficients of a file, (L, M) float32, and the identity of their checkpoint if the file has it."""

    path: Path
    average: Tensor
    checkpoint: str | None


def read_coefficients(path: Path) -> Coefficients:
    """Read the safetensors of analysis.entropy or the published `mlp_average_coefficients.pt`.

    Raises OSError, or ValueError where the file is damaged, unsafe or something else.
    """
    if path.suffix == ".pt":
        average = read_tensor(path)
        if average.ndim != 2:
            raise ValueError(f"{path}: expected one row for each layer")
        return Coefficients(path, average.float(), None)
    check_readable(path)
    try:
        with safe_open(path, "pt") as file:
            checkpoint = (file.metadata() or {}).get("checkpoint_fingerprint")
            return Coefficients(path, file.get_tensor("mlp_average_coefficients").float(), checkpoint)
    except Exception as error:  # safetensors raises its own error type
        raise ValueError(f"{path}: not a file of average coefficients: {error}") from error
