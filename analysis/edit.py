"""Write the edit of a checkpoint (paper, algorithm 1): multipliers, the full edited state dict, or temperatures."""

from __future__ import annotations

import filecmp
import hashlib
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from analysis.choices import SUFFIXES
from analysis.locations import check_writable
from analysis.models import open_model, state_of_files
from analysis.results import Coefficients
from analysis.resuscitation import Resuscitation, resuscitate
from olmo import checkpoint
from olmo.checkpoint import identity_of
from olmo.exceptions import ConfigurationError
from olmo.files.atomic import atomic_path
from olmo.files.lock import writing
from olmo.files.tensors import shapes_of, write_safetensors, write_torch_file
from olmo.memory.by_layer import ByLayer, count, tensors_of
from olmo.memory.rescaling import (
    Multipliers,
    OtherLayers,
    check_finite,
    check_shapes,
    rescale_model,
    rescaled,
    up_projection_name,
)


@dataclass(frozen=True)
class Edit:
    """The settings of `resuscitate`, under the names of the flags of analysis.change_parameters."""

    resuscitation_ratio: float
    amplifying_factor: float
    select: str = "lowest"
    seed: int = 0
    threshold: str = "layer"
    layers: tuple[int, ...] | None = None
    cap: float | None = None

    def of(self, average: ByLayer) -> Resuscitation:
        """The edit for average coefficients. Raises ConfigurationError where a setting is out of range."""
        try:
            return resuscitate(
                average,
                self.resuscitation_ratio,
                self.amplifying_factor,
                select=self.select,
                seed=self.seed,
                threshold=self.threshold,
                layers=self.layers,
                cap=self.cap,
            )
        except ValueError as error:
            raise ConfigurationError(str(error)) from error

    def number_selected(self, average: ByLayer) -> int:
        """How many memories `resuscitate` selects if no two coefficients are equal."""
        sizes = [len(values) for number, values in average.items() if self.layers is None or number in self.layers]
        sizes = sizes if self.threshold == "layer" else [sum(sizes)]
        return sum(math.floor(self.resuscitation_ratio * (size - 1)) + 1 for size in sizes)

    def file_name(self, form: str) -> str:
        """The published name, followed by what differs from the published settings."""
        name = f"resuscitation_ratio{self.resuscitation_ratio}_amplifying{self.amplifying_factor}"
        if self.select != "lowest":
            name += f"_{self.select}" + (f"_seed{self.seed}" if self.select == "random" and self.seed else "")
        if self.threshold != "layer":
            name += f"_{self.threshold}"
        if self.layers is not None:
            name += "_layers" + "-".join(map(str, self.layers))
        if self.cap is not None:
            name += f"_cap{self.cap}"
        return ("temperature_MLP_" if form == "temperature" else "") + name + SUFFIXES[form]


@dataclass
class EditedWeights:
    """The edited weights of a checkpoint, their type, and the identity of the weights before the edit: of the folder,
    and of the model in memory."""

    state: dict[str, Tensor]
    dtype: torch.dtype
    identity: str
    of_model: str


def edit_weights(folder: Path, multipliers: ByLayer, keep: bool) -> EditedWeights:
    """Rescale the weights of a checkpoint folder by multipliers.

    Those of an OLMo model are read one by one, and none is kept unless `keep`; then only edited ones are copied, the
    others mapped. Raises ValueError where the multipliers do not fit: when an edit is written, not in training; and for
    weights that are not finite, or that another program replaces meanwhile.
    """
    before = state_of_files(folder)
    edited = _edit_weights(folder, multipliers, keep)
    if state_of_files(folder) != before:
        raise ValueError(f"{folder}: its weights were replaced while they were read; nothing is written")
    return edited


def _edit_weights(folder: Path, multipliers: ByLayer, keep: bool) -> EditedWeights:
    if not checkpoint.is_olmo(folder):
        model = open_model(folder, torch.device("cpu"), "auto")
        for name, parameter in model.named_parameters():
            check_finite(f"{folder}: {name}", parameter)
        of_model = checkpoint.identity_of_model(model)
        rescale_model(model, multipliers)
        return EditedWeights(model.state_dict(), next(model.parameters()).dtype, identity_of(folder), of_model)
    own_layout = checkpoint.transformers_config(folder) is None
    weights = checkpoint.StateOnDisk(folder) if own_layout else checkpoint.read_state(folder)
    like = shapes_of(weights)
    check_shapes({name: tensor.shape for name, tensor in like.items()}, multipliers)
    dtype = like[up_projection_name(0)].dtype
    before, state = checkpoint.Fingerprint(), {}
    for name in weights:
        tensor = weights[name]
        before.add(name, tensor)
        check_finite(f"{folder}: {name}", tensor)
        result = rescaled(name, tensor, multipliers)  # even if it is not kept: it must be finite
        if keep:
            state[name] = result
    return EditedWeights(state, dtype, str(before), str(before))


def write_edit(
    folder: Path,
    edit: Edit,
    chosen: Resuscitation,
    coefficients: Coefficients,
    output: Path,
    form: str = "multipliers",
    check: Callable[[Path, torch.dtype], None] | None = None,
    overwrite: bool = False,
) -> None:
    """Write `chosen`, the edit of a checkpoint folder by its coefficients, to `output`, atomically.

    form: a key of SUFFIXES. check: is called with the written file before it gets its name, and with the type of the
    weights; if it raises an error, nothing is kept. overwrite: replace a file of other content.
    Raises ValueError where the coefficients do not fit the checkpoint, or nothing would change; ConfigurationError if
    the file exists with other content; OSError where a file cannot be read or written.
    """
    if count(chosen.selected) == count(chosen.dead):
        raise ValueError(
            f"{coefficients.path}: all {count(chosen.selected)} selected memories are dead (coefficient 0), so "
            "nothing would change; use a larger --resuscitation_ratio"
        )
    if form == "temperature" and not checkpoint.is_olmo(folder):
        raise ConfigurationError(
            f"--format temperature: works in the trainer, for OLMo models; {folder} is another one"
        )
    try:
        weights = edit_weights(folder, chosen.multipliers, keep=form == "full")
    except OtherLayers as error:
        raise ValueError(f"{coefficients.path}: measured on another model than {folder}: {error}") from error
    if coefficients.checkpoint not in (None, weights.identity, weights.of_model):
        raise ValueError(f"{coefficients.path}: measured on another checkpoint than {folder}")
    output.parent.mkdir(parents=True, exist_ok=True)
    with writing(output), atomic_path(output) as partial:
        if form == "full":
            write_torch_file(partial, weights.state)
        elif form == "temperature":
            metadata = {"checkpoint_fingerprint": weights.identity}
            divisors = {number: 1 / values for number, values in chosen.multipliers.items()}
            write_safetensors(partial, tensors_of("temperature_MLP", divisors), metadata)
        else:
            averages = b"".join(values.numpy().tobytes() for values in coefficients.average.values())
            about = {
                **asdict(edit),
                "checkpoint_fingerprint": weights.identity,
                "coefficients": str(coefficients.path),
                "coefficients_sha256": hashlib.sha256(averages).hexdigest(),
            }
            Multipliers(chosen.multipliers, chosen.selected, about).save(partial)
        dtype = weights.dtype
        del weights  # of another family it holds a model
        if output.exists() and not overwrite and not filecmp.cmp(partial, output, shallow=False):
            raise ConfigurationError(
                f"{output}: already exists with other content; name another --output, or replace it: --overwrite"
            )
        if check is not None:
            check(partial, dtype)


def check_output(output: Path, folder: Path, coefficients_file: Path) -> None:
    """Raise an error if the output cannot be written, or would replace what the edit is made from."""
    sources = {coefficients_file, *checkpoint.model_files(folder), folder / "model.safetensors", folder / "model.pt"}
    if output.resolve() in {path.resolve() for path in sources}:
        raise ConfigurationError(f"--output {output}: names what the edit is made from; choose another name")
    if output.is_dir():
        raise ConfigurationError(f"--output {output}: is a folder; name a file")
    check_writable(output.parent)
