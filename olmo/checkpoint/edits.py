"""Edits of models of other families: which tensors of their files they change, and the edited weights.

A parameter in memory may be stored in several tensors, such as one for each expert, and is edited as these would be.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..files.tensors import read_tensors
from ..memory.locate import find_layers
from ..memory.rescaling import multiply, row_factors
from . import saves, weights
from .folder import model_files


@torch.no_grad()
def resuscitate(network: nn.Module, folder: Path, path: Path, force: bool) -> None:
    """Apply a file of analysis.change_parameters to the network of `folder`, for which it must have been made unless
    `force`.

    Edited numbers are rounded to the type that they have in the files, so that the network equals that of the folder
    that scripts.convert writes. Raises ValueError where the file does not fit.
    """
    if any(parameter.is_meta for parameter in network.parameters()):
        raise ValueError(
            f"{path}: weights of {folder} that are offloaded (--device_map) cannot be edited; write the edited folder "
            f"and use that: python -m scripts.convert {folder} NEW --to hf --resuscitation {path}"
        )
    if path.suffix == ".pt":
        network.load_state_dict(full_state(network, folder, path, force))
        return
    multipliers = weights.multipliers_for(path, weights.identity_of(folder), folder, force)
    held = _held(folder)
    for name, factors in row_factors(network, multipliers).items():
        stored = stored_as(network, name, factors, held, folder)
        edited = [held[key].dtype for key, own in stored.items() if (own != 1).any()]
        if edited:
            multiply(network.get_parameter(name), factors, name, edited[0])


@torch.no_grad()
def full_state(network: nn.Module, folder: Path, path: Path, force: bool) -> dict[str, Tensor]:
    """The full state dict in a file of analysis.change_parameters for the network of `folder`.

    Raises ValueError where it has other tensors, or, unless `force`, differs in more than the rows of up projections;
    of tensors of two types, the wider one is rounded.
    """
    edited, own = read_tensors(path), network.state_dict()
    if {name: tensor.shape for name, tensor in edited.items()} != {name: tensor.shape for name, tensor in own.items()}:
        raise ValueError(f"{path}: no state dict of the model in {folder}")
    if force:
        return edited
    layers = [layer for layer in find_layers(network) if layer.parts]
    zeros = {layer.number: torch.zeros(sum(part.count for part in layer.parts)) for layer in layers}
    unedited = row_factors(network, zeros)  # 0 in the rows that may differ
    for name, one in own.items():
        other, factors = edited[name], unedited.get(name, torch.ones(()))
        narrow = min(one.dtype, other.dtype, key=lambda dtype: dtype.itemsize)
        if not torch.equal((one * factors).to(narrow), (other * factors).to(narrow)):
            raise weights.made_for_another(path, folder, f" ({name} differs)")
    return edited


def _held(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder on the meta device."""
    if saves.is_sharded(folder):
        from . import sharded  # what it imports takes longer than most of what reads a checkpoint

        return sharded.Reader(folder).shapes(f"{sharded.WEIGHTS}network.")
    files = model_files(folder)
    return {name: tensor.to("meta") for path in files for name, tensor in read_tensors(path).items()}


def stored_as(
    model: nn.Module, name: str, factors: Tensor, held: Mapping[str, Tensor], folder: Path
) -> dict[str, Tensor]:
    """The tensors of a folder's files, which has those of `held`, in which transformers finds a parameter of a model,
    and the factors of each: under the names that it writes or under the model's own, with the prefix of the part below
    the head or without it. Raises ValueError where there are none."""
    written = as_saved(model, {name: factors})
    single = [axis - factors.ndim for axis, size in enumerate(factors.shape) if size == 1]
    if len(single) == 1:  # transformers 5.20 drops this dimension of each expert's factors
        for key, own in written.items():
            if key in held and own.ndim == held[key].ndim - 1:
                written[key] = own.unsqueeze(single[0])
    prefix = f"{model.base_model_prefix}."
    for names in (written, {name: factors}):
        for candidate in (names, {key.removeprefix(prefix): own for key, own in names.items()}):
            if all(key in held and _broadcasts(own.shape, held[key].shape) for key, own in candidate.items()):
                return candidate
    raise ValueError(f"{folder}: the weights lack {min(written)} of shape {tuple(model.get_parameter(name).shape)}")


def _broadcasts(factors: torch.Size, tensor: torch.Size) -> bool:
    return len(factors) == len(tensor) and all(own in (1, size) for own, size in zip(factors, tensor))


def as_saved(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a model in memory under the names and in the shapes in which transformers saves them."""
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # before transformers 5, whose models have the names and shapes of their files
        return state
    return revert_weight_conversion(model, state)
