"""A model in memory to measure: the instances for it, and everything that measuring changes restored afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from analysis.context import check_length
from analysis.given import GivenTokenizer
from analysis.instances import Instances
from analysis.job import Settings, measured
from analysis.models import PRECISIONS
from analysis.result import Result
from analysis.texts import eos_of
from olmo.checkpoint import identity_of_model
from olmo.distributed import Ranks
from olmo.exceptions import ConfigurationError
from olmo.memory.locate import find_layers
from olmo.memory.unwrap import is_sharded, unwrapped
from olmo.model.placement import input_device
from olmo.tokenizer import tokenizer_of_folder


def measure_module(model: Any, settings: Settings, ranks: Ranks = Ranks(), step: int = -1) -> Result:  # noqa: B008
    """The result of a model in memory, unwrapped, in evaluation mode; a collective of `ranks`, complete on each.

    The instances, coefficient, measures, tolerance and batch size of `settings` apply; its precision is that of the
    model. step: of training, for the result, which does not identify weights that FSDP has sharded. Restores what
    `restored` does, also after an exception.
    Raises ValueError as `measure` does, for a model without weights, and where the instances cannot be read.
    """
    model = unwrapped(model)
    _check_weights(model)
    find_layers(model)  # refuses what has no memories before anything else asks for a part of it
    instances = settings.instances
    exceeded = check_length(model, instances.asked_length, settings.allow_longer)
    rows = instances_for(model, instances)
    identity = f"{step} sharded" if is_sharded(model) else identity_of_model(model)
    settings = replace(settings, precision=precision_of(model))
    name = f"{type(model).__name__} {identity.split()[-1][:8]}"
    about = settings.identity({"path": name, "step": step, "fingerprint": identity, "tokens": None}, rows)
    about["longer_than_context"] = exceeded
    device = input_device(model)
    # FSDP's passes are those of the wrapped model, with all that is around it.
    own = nullcontext() if is_sharded(model) else own_forward(model)
    with restored(model), own_precision(device), own:
        model.eval()
        length = instances.length_for(model)
        return measured(model, rows, length, settings, about, device, ranks, f"entropy of {name}")


def instances_for(model: nn.Module, instances: Instances) -> list[NDArray[np.int64]]:
    """The instances for a model in memory. Its tokenizer, where `instances` has none, and the token that ends a
    document are those of the folder that it was loaded from (`name_or_path`); the token else of its configuration.

    Raises ConfigurationError where one of them is unknown.
    """
    length = instances.length_for(model)
    if not instances.is_text:
        return instances.rows(length, None, None)
    instances.check_is_text()
    named = str(getattr(model, "name_or_path", "") or "")
    folder = Path(named) if named and Path(named).is_dir() else None
    tokenizer = instances.tokenizer or (None if folder is None else tokenizer_of_folder(folder))
    if tokenizer is None:
        raise ConfigurationError(f"{type(model).__name__}: text needs a tokenizer; give --tokenizer")
    if not instances.pack:
        return instances.rows(length, tokenizer, None)
    eos = tokenizer.eos if isinstance(tokenizer, GivenTokenizer) else None
    if eos is None:
        opened = instances.open_tokenizer(tokenizer)
        eos = eos_of(folder, opened) if folder is not None else _eos_of(model)
        if eos is None or opened.id_to_token(eos) is None:
            raise ConfigurationError(
                f"{type(model).__name__}: no token that ends a document ({eos}); --pack none measures each text by "
                "itself, or give --tokenizer, one of transformers with an eos_token"
            )
    return instances.rows(length, tokenizer, eos)


def _eos_of(model: Any) -> int | None:
    ids: Any = getattr(getattr(model, "config", None), "eos_token_id", None)
    first = ids[0] if isinstance(ids, (list, tuple)) and ids else ids
    return first if isinstance(first, int) else None


def precision_of(model: nn.Module) -> str:
    """The type of a model's weights as results name it: fp32, bf16, or torch's names of several."""
    names = {dtype: name for name, dtype in PRECISIONS.items()}
    types = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    return ", ".join(sorted(names.get(dtype, str(dtype).removeprefix("torch.")) for dtype in types))


def _check_weights(model: nn.Module) -> None:
    """Raise ValueError for a model that takes no tokens, or has no weights yet."""
    if not any(isinstance(module, nn.Embedding) for module in model.modules()):
        raise ValueError(f"{type(model).__name__}: no embeddings found; pass a language model, such as transformers'")
    if any(p.is_meta for p in model.parameters()) and not hasattr(model, "hf_device_map"):
        raise ValueError(f"{type(model).__name__}: on the meta device, without weights; load them first")


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Restore at the end the training mode of every module and torch's random states, on whatever it ends with."""
    modes = {module: module.training for module in model.modules()}
    devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
    try:
        with torch.random.fork_rng([device.index for device in devices]):
            yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def own_precision(device: torch.device) -> Iterator[None]:
    """Compute in the type of the weights: without autocast, and on CUDA float32 as float32."""
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def own_forward(model: Any) -> Iterator[None]:
    """A model's forward pass without the autocast that accelerate, and so a Trainer, adds for mixed precision."""
    own, with_autocast = vars(model).get("_original_forward"), vars(model).get("forward")
    if own is None or with_autocast is None:
        yield
        return
    model.forward = own
    try:
        yield
    finally:
        model.forward = with_autocast
