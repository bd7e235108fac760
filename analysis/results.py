"""The two result files of a measured checkpoint: `knowledge_entropy.json` and the average coefficients beside it."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open

from analysis.choices import EDITS, RESULT
from olmo.data.ranges import cache_folder
from olmo.exceptions import ConfigurationError
from olmo.files.atomic import atomic_path, write_text
from olmo.files.paths import as_json, check_readable, read_json
from olmo.files.tensors import read_tensor, write_safetensors
from olmo.memory.by_layer import ByLayer, layers_of, tensors_of

_KEY = "mlp_average_coefficients"
_MOST_ACTIVE = "most_active_memories"
COEFFICIENTS_FILE = f"{_KEY}.safetensors"


def save_result(
    folder: Path,
    content: dict[str, Any],
    coefficients: Mapping[int, NDArray[np.floating]],
    most_active: NDArray[np.uint8] | None,
) -> None:
    """Write `content`, that of `knowledge_entropy.json`, and the average coefficients in float32 with the bits of the
    most active memories (`analysis/breadth.py`), each atomically: after a crash between the two, the coefficients are
    there without a result. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {
        "checkpoint_fingerprint": _weights(content),
        "coefficient": content["coefficient"],
        "data_sha256": content["data"]["sha256"],
    }
    average = {number: torch.from_numpy(values).float() for number, values in coefficients.items()}
    with atomic_path(folder / RESULT) as partial_result, atomic_path(folder / COEFFICIENTS_FILE) as partial:
        partial_result.write_text(as_json(content, folder / RESULT, 1), encoding="utf-8")
        bits = {} if most_active is None else {_MOST_ACTIVE: torch.from_numpy(most_active)}
        write_safetensors(partial, {**tensors_of(_KEY, average), **bits}, metadata)
        (folder / RESULT).unlink(missing_ok=True)  # it would stand beside coefficients of another measurement


def find_result(
    folder: Path, wanted: dict[str, Any], instances: str, measures: Sequence[str], overwrite: bool
) -> dict[str, Any] | None:
    """The result in a folder if it has the identity `wanted` and all measures; None where there is none or where the
    same measurement, incomplete, may be replaced, or with `overwrite` any.

    wanted: keys of `knowledge_entropy.json` with their values; that of the weights, `checkpoint.fingerprint`, may be
    missing as long as they are not read. instances: what was asked for, in words.
    Raises ConfigurationError where the files there are of something else: results are never replaced silently.
    """
    try:
        result = read_json(folder / RESULT)
    except (FileNotFoundError, NotADirectoryError):
        if overwrite or "fingerprint" not in wanted["checkpoint"] or not (folder / COEFFICIENTS_FILE).exists():
            return None
        about = read_coefficients(folder / COEFFICIENTS_FILE)  # of an interrupted measurement, or somebody's
        if (about.checkpoint, about.data) == (_weights(wanted), wanted["data"]["sha256"]):
            return None
        raise _kept(folder / COEFFICIENTS_FILE, "has no result beside it, so its instances are unknown") from None
    except ValueError:
        result = None
    complete = isinstance(result, dict) and set(measures) <= set(result.get("measures", ("knowledge",)))
    if complete and (folder / COEFFICIENTS_FILE).is_file() and _contains(result, wanted):
        return result
    reason = None if overwrite else _difference(result, wanted, instances, measures)
    if reason is not None:
        raise _kept(folder / RESULT, reason)
    return None


def _weights(result: dict[str, Any]) -> str:
    """The identity of the weights that were measured, with what changed them."""
    words = {**EDITS, "resuscitation": "resuscitated by"}
    edits = [f" {word} {result[key]}" for key, word in words.items() if result.get(key) is not None]
    return f"{result['checkpoint']['fingerprint']}{''.join(edits)}"


def is_edited(result: dict[str, Any]) -> bool:
    """Whether a result is of weights or temperatures that are not the checkpoint's own."""
    return any(result.get(key) is not None for key in EDITS)


def _kept(path: Path, reason: str) -> ConfigurationError:
    return ConfigurationError(f"{path}: already exists and {reason}; name another --output, or replace it: --overwrite")


def _difference(result: Any, wanted: dict[str, Any], instances: str, measures: Sequence[str]) -> str | None:
    """In which respect a result is another measurement than the one that is wanted; None if in no respect."""
    if not isinstance(result, dict) or not all(isinstance(result.get(key), dict) for key in ("checkpoint", "data")):
        return "is not a result of analysis.entropy"
    fingerprint = wanted["checkpoint"].get("fingerprint")
    if fingerprint is not None and result["checkpoint"].get("fingerprint") != fingerprint:
        return f"belongs to other weights, of {result['checkpoint'].get('path')}"
    if result["data"].get("sha256") != wanted["data"]["sha256"]:
        asked = result["data"].get("instances", result.get("number_of_instances"))
        return (
            f"belongs to other instances, {asked} of {result.get('sequence_length')} tokens from "
            f"{result['data'].get('path')}, not {instances}"
        )
    for key in ("coefficient", "precision", "tolerance", *EDITS):
        if key == "precision" and key not in wanted:
            continue  # that of the weights themselves, which are not read yet
        if result.get(key) != wanted.get(key):
            return f"was measured with {key} {result.get(key)}, not {wanted[key]}"
    extra = [name for name in result.get("measures", ()) if name not in ("knowledge", *measures)]
    return f"has {extra[0]} entropy too, which --measures does not name" if extra else None


def _contains(result: Any, wanted: Any) -> bool:
    """Whether a result has all that is wanted; it may have more."""
    if isinstance(wanted, dict):
        return isinstance(result, dict) and all(_contains(result.get(key), value) for key, value in wanted.items())
    return result == wanted


def find_coefficients(folder: Path) -> Path:
    """The file of average coefficients of a checkpoint folder, ours or the published one: in it, or else in the one
    folder into which analysis.entropy has written its result on this machine (--output).

    Raises FileNotFoundError where there is none, ConfigurationError where several measurements are known.
    """
    if (beside := coefficients_in(folder)) is not None:
        return beside
    found = [path for output in _outputs(folder) if (path := coefficients_in(output)) is not None]
    if len(found) > 1:
        listed = ", ".join(str(path.parent) for path in found)
        raise ConfigurationError(f"{folder}: measured several times, in {listed}; name one with --coefficients")
    if not found:
        command = shlex.join(["python", "-m", "analysis.entropy", "--checkpoint", str(folder)])
        raise FileNotFoundError(
            f"{folder}: no {COEFFICIENTS_FILE}; name that of another folder with --coefficients, or measure it first: "
            f"{command}"
        )
    return found[0]


def coefficients_in(folder: Path) -> Path | None:
    """The file of average coefficients in a folder."""
    paths = (folder / COEFFICIENTS_FILE, (folder / COEFFICIENTS_FILE).with_suffix(".pt"))
    return next((path for path in paths if path.is_file()), None)


def record_output(folder: Path, output: Path) -> None:
    """Record that the result of a checkpoint folder, of its own weights, is in another folder, for
    `find_coefficients`. Where the record cannot be written it is left out: --coefficients names the folder too."""
    outputs = [path for path in _outputs(folder) if path != output.resolve()]
    with suppress(OSError):
        _record_of(folder).parent.mkdir(parents=True, exist_ok=True)
        write_text(_record_of(folder), json.dumps([str(path) for path in (*outputs, output.resolve())]))


def results_of(folder: Path) -> list[Path]:
    """The folders with a `knowledge_entropy.json` of a checkpoint folder: itself, and those it was written to."""
    beside = [folder] if (folder / RESULT).is_file() else []
    return beside + [path for path in _outputs(folder) if path != folder.resolve()]


def _outputs(folder: Path) -> list[Path]:
    """The folders that are recorded for a checkpoint folder and still hold a result."""
    try:
        return [path for path in map(Path, read_json(_record_of(folder))) if (path / RESULT).is_file()]
    except (OSError, ValueError, TypeError):
        return []


def _record_of(folder: Path) -> Path:
    name = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:32]
    return cache_folder() / "results" / f"{name}.json"


@dataclass(frozen=True)
class Coefficients:
    """Average coefficients of a file, (M_l,) float32 of each layer, and the identities of checkpoint and data if the
    file has them.

    Raises ValueError unless all of them are finite and not negative."""

    path: Path
    average: ByLayer
    checkpoint: str | None
    data: str | None = None
    most_active: NDArray[np.uint8] | None = None  # of `analysis.breadth.Breadth`; earlier versions had none

    def __post_init__(self) -> None:
        for number, values in self.average.items():
            if not values.isfinite().all() or (values < 0).any():
                raise ValueError(f"{self.path}: layer {number}: expected finite coefficients, 0 or above")
        wanted, bits = (sum(map(len, self.average.values())) + 7) // 8, self.most_active
        if bits is not None and (bits.dtype != np.uint8 or bits.ndim != 2 or bits.shape[1] != wanted or not len(bits)):
            raise ValueError(f"{self.path}: {_MOST_ACTIVE}: expected uint8 of {wanted} columns")


def read_coefficients(path: Path) -> Coefficients:
    """Read the safetensors of analysis.entropy or the published `mlp_average_coefficients.pt`.

    Raises OSError, or ValueError where the file is damaged, unsafe or something else.
    """
    metadata: dict[str, str] = {}
    tensors = {_KEY: read_tensor(path)} if path.suffix == ".pt" else {}
    check_readable(path)
    try:
        if not tensors:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        average = {number: values.float() for number, values in layers_of(_KEY, tensors).items()}
        bits = tensors[_MOST_ACTIVE].numpy() if _MOST_ACTIVE in tensors else None
    except Exception as error:  # safetensors raises its own error type
        raise ValueError(f"{path}: not a file of average coefficients: {error}") from error
    return Coefficients(path, average, metadata.get("checkpoint_fingerprint"), metadata.get("data_sha256"), bits)
