"""Checkpoints opened over several devices, by a device map (`olmo/model/placement.py`): no weight is in memory twice.

Ours are spread layer by layer. What is offloaded to the disk stays in the checkpoint's own files, and is read, edited
and converted whenever its layer computes. Those of other families are opened by transformers.
"""

from __future__ import annotations

import logging
import re
import shutil
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config.model import ModelConfig
from ..exceptions import ConfigurationError
from ..files.tensors import LazyTensors, shapes_of
from ..memory.locate import find_layers
from ..memory.temperature import Temperatures
from ..model.olmo import Block, OLMo
from ..model.placement import DeviceMap, device_map_for, follow, main_device, offload, place_of, resident
from . import families, saves, weights


def spread_model(folder: Path, config: ModelConfig, dtype: torch.dtype, wanted: str | Mapping[str, Any]) -> OLMo:
    """`weights.load_model` of one of our models, in `dtype` where `wanted` (see `device_map_for`) places it."""
    weights.check_behaviour(config, folder)
    model, state = weights.unfilled(folder, config)
    model.to(dtype)  # of weights that have no memory yet
    device_map = device_map_for(model, wanted, {Block}, dtype)
    for name in device_map:
        if re.match(r"transformer\.blocks\.\d+\.", name):
            raise ConfigurationError(f"--device_map: {name}: a layer of OLMo is on one device; name the layer")
    main, kept = main_device(device_map), {}
    for name in list(state):
        place, of_block = place_of(name, device_map), name.startswith("transformer.blocks.")
        device = resident(place, main)
        if not of_block or device is not None:  # embeddings and the head are never offloaded
            tensor = {name: state[name].to(device=device or main, dtype=dtype)}
            model.load_state_dict(tensor, strict=False, assign=True)
        elif place == "cpu":
            kept[name] = state[name].to(dtype)
    several = len({device for place in device_map.values() if (device := resident(place, main))}) > 1
    for number, block in enumerate(model.blocks):
        prefix = f"transformer.blocks.{number}."
        if resident(place_of(prefix[:-1], device_map), main) is None:
            offload(block, main, _within(prefix, {**shapes_of(state), **kept}, kept, state))
        elif several:
            follow(block)
    if several and any(True for _ in model.transformer["ln_f"].parameters()):
        follow(model.transformer["ln_f"])
    Temperatures.from_config(config, folder).apply(model)
    model.hf_device_map = device_map  # type: ignore[assignment]
    return model.eval()


def _within(
    prefix: str, shapes: Mapping[str, Tensor], kept: Mapping[str, Tensor], state: Mapping[str, Tensor]
) -> LazyTensors:
    """The tensors whose names have a prefix, without it: those that are `kept`, or those of `state`."""
    like = {name.removeprefix(prefix): tensor for name, tensor in shapes.items() if name.startswith(prefix)}
    return LazyTensors(like, lambda name: kept[prefix + name] if prefix + name in kept else state[prefix + name])


def spread_network(folder: Path, dtype: torch.dtype, wanted: str | Mapping[str, Any]) -> nn.Module:
    """`families.open_network` of another family, where `wanted` (see `device_map_for`) places it.

    Weights that are offloaded to the disk stay in the files of the folder; those that transformers holds in another
    form (experts, files of torch) are written to a temporary folder, which is deleted with the model.
    """
    if saves.is_sharded(folder):
        raise ConfigurationError(
            f"--device_map: {folder} is a restart checkpoint, which is read as a whole; convert it first: python -m "
            f"scripts.convert {folder} NEW --to hf"
        )
    empty = families.empty_network(folder)
    try:
        whole = {type(layer.module) for layer in find_layers(empty)}
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    device_map: DeviceMap = device_map_for(empty, wanted, whole, dtype)
    rewritten = tempfile.mkdtemp(prefix="knowledge-entropy-")
    accelerate = logging.getLogger("accelerate")  # warns that something is offloaded
    level = accelerate.level
    try:
        accelerate.setLevel(logging.ERROR)
        model = families.open_network(folder, dtype, device_map=device_map, offload_folder=rewritten)
    except BaseException as error:
        shutil.rmtree(rewritten, ignore_errors=True)
        if "os error 28" in str(error):  # safetensors' words for a full disk
            raise OSError(
                f"{rewritten}: no space left for weights that are offloaded to the disk; set TMPDIR to a folder with "
                "more of it"
            ) from error
        raise
    finally:
        accelerate.setLevel(level)
    weakref.finalize(model, shutil.rmtree, rewritten, ignore_errors=True)
    model.hf_device_map = device_map  # type: ignore[assignment]
    return model
