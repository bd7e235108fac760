"""Weights of a checkpoint folder of any layout: OLMo's, which is also our own, and transformers'.

A folder holds `config.yaml` and `model.safetensors` (or `model.pt`), for a restart `optim.pt` and `train.pt`, and
`manifest.json`, by which damage is recognised (`manifest.py`). In those that a run writes for its restarts weights
and optimizer are sharded (`sharded.py`); the readers here handle both.
Weights are mapped from the file onto a model that was built without memory.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config.model import ModelConfig
from ..console import log
from ..exceptions import ConfigurationError
from ..files import adapters
from ..files.digests import file_digest
from ..files.tensors import LazyTensors, open_tensors, read_tensors, shapes_of, tensor_names
from ..memory.by_layer import ByLayer
from ..memory.rescaling import load_multipliers, rescale
from ..memory.temperature import Temperatures
from ..model.olmo import OLMo
from ..model.placement import weights_of
from . import saves
from .config_json import BEHAVIOUR, has_original_keys, is_known
from .folder import is_olmo, model_files, read_config, resuscitation_file, transformers_config
from .transformers_layout import from_transformers_state, plain_names

MODEL = "state_dict "  # begins the identity of a model in memory that is no OLMo model


def check_layers(folder: Path) -> None:
    """Raise ValueError if config.json states more layers than the weights of a transformers folder have tensors, or if
    its weights cannot be read. Models are built from config.json, and a billion layers take a while."""
    raw = transformers_config(folder) or {}
    if saves.is_sharded(folder):
        from . import sharded

        count = len(sharded.Reader(folder).tensors)
    else:
        count = sum(len(tensor_names(path)) for path in model_files(folder))
    for key in ("num_hidden_layers", "n_layer", "n_layers", "num_layers"):
        if isinstance(raw.get(key), int) and raw[key] > count:
            raise ValueError(f"{folder / 'config.json'}: {key} is {raw[key]:,}, the weights have {count:,} tensors")


def read_state(folder: Path, mapped: bool = True) -> Mapping[str, Tensor]:
    """The weights of a checkpoint folder of any layout under OLMo's names.

    They are mapped from the file unless `mapped` is false; what is sharded is always copied. Those of transformers'
    OLMo, which are stacked, are mapped or stacked at every access.
    """
    raw = transformers_config(folder)
    if saves.is_sharded(folder):
        from . import sharded  # what it imports takes longer than most of what reads a checkpoint

        return sharded.Reader(folder).read(sharded.WEIGHTS)
    stacked = raw is not None and not has_original_keys(raw)
    files: dict[str, Mapping[str, Tensor]] = {}  # the name of a tensor -> the tensors of its file
    for path in model_files(folder):
        tensors = open_tensors(path) if stacked else read_tensors(path, mapped)
        if twice := tensors.keys() & files.keys():
            raise ValueError(f"{path}: {min(twice)} is in another file of the folder too")
        files.update(dict.fromkeys(tensors, tensors))
    if stacked:
        shapes = {name: shapes_of(tensors)[name] for name, tensors in files.items()}
        return from_transformers_state(LazyTensors(shapes, lambda name: files[name][name]), raw or {}, str(folder))
    state = {name: tensors[name] for name, tensors in files.items()}
    return plain_names(state) if raw is None else from_transformers_state(state, raw, str(folder))


class StateOnDisk(LazyTensors):
    """The weights of a folder in OLMo's layout under OLMo's names, each mapped anew at every access and not
    kept: its pages are released with its mapping."""

    def __init__(self, folder: Path):
        if not saves.is_sharded(folder):
            super().__init__(read_state(folder), lambda name: read_state(folder)[name])
            return
        from . import sharded

        reader = sharded.Reader(folder)  # whose index, of a large run, takes seconds to read
        super().__init__(reader.shapes(sharded.WEIGHTS), lambda name: reader.read(f"{sharded.WEIGHTS}{name}")[""])


class Fingerprint:
    """Identity of a checkpoint, the same for every file layout that holds the same OLMo state dict, from its tensors in
    any order.

    SHA-256 over names, shapes, the first and last 64 values of every tensor and a checksum of all its values (the sum
    of their float32 bit patterns as integers, at the speed of reading): it distinguishes checkpoints, edited ones
    included, but does not protect against forgery.
    """

    def __init__(self) -> None:
        self._parts: dict[str, bytes] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        flat = tensor.detach().reshape(-1)
        # In pieces that stay in a CPU's cache, several times faster than one sum over all; a GPU adds up its own.
        size = 2**26 if flat.is_cuda else 2**18
        pieces = ((part if part.is_cuda else part.cpu()).float().contiguous() for part in flat.split(size))
        checksum = sum(int(piece.view(torch.int32).sum(dtype=torch.int64)) for piece in pieces)
        ends = torch.cat((flat[:64], flat[-64:])).float().cpu().numpy().tobytes()
        self._parts[name] = f"{name} {tuple(tensor.shape)} {checksum}".encode() + ends

    def __str__(self) -> str:
        return hashlib.sha256(b"".join(self._parts[name] for name in sorted(self._parts))).hexdigest()


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """`Fingerprint` of a complete OLMo state dict."""
    found = Fingerprint()
    for name in state:
        found.add(name, state[name])
    return str(found)


def file_dtype(folder: Path) -> torch.dtype:
    """The floating-point type of the weights in a folder's files. Raises ConfigurationError where they have several."""
    if saves.is_sharded(folder):
        from . import sharded  # what it imports takes longer than most of what reads a checkpoint

        held = list(sharded.Reader(folder).shapes(sharded.WEIGHTS).values())
    else:
        held = [tensor for path in model_files(folder) for tensor in read_tensors(path).values()]
    counts = Counter(tensor.dtype for tensor in held if tensor.is_floating_point())
    if len(counts) != 1:
        found = " and ".join(f"{str(dtype).removeprefix('torch.')} ({n} tensors)" for dtype, n in counts.most_common())
        raise ConfigurationError(f"--precision auto: the weights of {folder} are {found or 'no floats'}; name one type")
    return next(iter(counts))


def check_fit(model: OLMo, state: Mapping[str, Tensor], where: str) -> None:
    """Raise ValueError that names what does not fit between a model and a state dict."""
    wanted, state = model.state_dict(), shapes_of(state)
    missing, foreign = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    if missing or foreign:
        raise ValueError(
            f"{where}: weights and config disagree: missing {', '.join(missing[:3]) or 'none'}, "
            f"not expected {', '.join(foreign[:3]) or 'none'}"
        )
    for name, tensor in wanted.items():
        if tensor.shape != state[name].shape:
            raise ValueError(
                f"{where}: {name} has shape {tuple(state[name].shape)}, the config asks for {tuple(tensor.shape)}"
            )
        if not state[name].is_floating_point():
            raise ValueError(f"{where}: {name} holds {state[name].dtype} numbers; weights are floating-point")


def load_model(
    folder: Path,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    config: ModelConfig | None = None,
    mapped: bool = True,
) -> OLMo:
    """An OLMo model with the weights of a checkpoint folder of any layout, on `device` in `dtype`.

    `config` replaces the checkpoint's own (a run may use another context length or dropout).
    `config.resuscitation` names a multiplier file or a full state dict that is applied on the way. Weights that need
    no change stay mapped from the file, unless `mapped` is false: then all get memory of their own, as training wants
    (what a kernel makes of a tensor may depend, in its last bit, on where the tensor begins).
    """
    if config is None:
        # The resuscitation in a checkpoint's config was applied before that checkpoint was trained and saved.
        config = replace(read_config(folder), resuscitation=None)
    else:
        check_behaviour(config, folder)
    mapped = mapped or device.type != "cpu"
    model, state = unfilled(folder, config, mapped)
    for name in list(state):  # one by one: what has been converted need not be kept
        tensor = state.pop(name) if isinstance(state, dict) else state[name]
        own = tensor.to(device=device, dtype=dtype)
        if own is tensor and not mapped and isinstance(state, LazyTensors):
            own = tensor.clone()
        model.load_state_dict({name: own}, strict=False, assign=True)
    Temperatures.from_config(config, folder).apply(model)
    return model


def unfilled(folder: Path, config: ModelConfig, mapped: bool = True) -> tuple[OLMo, Mapping[str, Tensor]]:
    """The model of `load_model` on the meta device, and its weights, edited as `config` wants."""
    state = read_state(folder, mapped or config.resuscitation is not None)
    if config.n_layers > len(state):
        raise ValueError(
            f"{folder}: the config has {config.n_layers:,} layers, the weights have {len(state):,} tensors"
        )
    try:
        model = OLMo.empty(config)
    except RuntimeError as error:  # torch's, of numbers beyond 64 bits
        raise ValueError(f"{folder}: no model has the sizes of its config: {error}") from error
    if config.resuscitation:
        state = resuscitated(state, config.resuscitation, folder, mapped, force=config.resuscitation_force)
    check_fit(model, state, str(folder))
    return model, state


def check_behaviour(config: ModelConfig, folder: Path) -> None:
    """Raise ConfigurationError where a run's model would compute something else with a checkpoint's weights; log a
    warning where it takes longer inputs."""
    if not (folder / "config.yaml").is_file() and transformers_config(folder) is None:
        return  # weights alone; the shapes must do
    saved = read_config(folder)
    for key in BEHAVIOUR:
        if getattr(config, key) != getattr(saved, key):
            raise ConfigurationError(
                f"model.{key}: {getattr(config, key)}, but the checkpoint {folder} was made with {getattr(saved, key)}"
            )
    if config.rope and config.max_sequence_length > saved.max_sequence_length:
        log.warning(
            "model.max_sequence_length: %d, the checkpoint %s was made for %d tokens and extrapolates the positions of "
            "others until it is trained on them",
            config.max_sequence_length,
            folder,
            saved.max_sequence_length,
        )
    for key in ("temperature_attention", "temperature_MLP"):
        if getattr(config, key) is None and getattr(saved, key) is not None:
            raise ConfigurationError(
                f"model.{key}: missing, but the checkpoint {folder} was made with {getattr(saved, key)}"
            )


def resuscitated(
    state: Mapping[str, Tensor],
    name: str,
    folder: Path,
    mapped: bool = True,
    key: str = "model.resuscitation",
    force: bool = False,
) -> Mapping[str, Tensor]:
    """The weights that a resuscitation file makes of `state`: multipliers applied to it, or a full state dict.

    `name` is a path, or a file inside the checkpoint folder; `key` is where the user named it. The file must have been
    made for these weights, unless `force`: a full state dict differs from them in up projections only. `mapped` as in
    `load_model`.
    """
    path = resuscitation_file(name, folder, key)
    if path.suffix == ".pt":
        edited = plain_names(read_tensors(path, mapped))
        if not force:
            _check_unedited(state, edited, path, folder)
        return edited
    return rescale(state, multipliers_for(path, fingerprint(state), folder, force))


def _check_unedited(state: Mapping[str, Tensor], edited: Mapping[str, Tensor], path: Path, folder: Path) -> None:
    """Raise ValueError where a full state dict differs from a checkpoint in more than the up projections.

    Of tensors of two types, the wider one is rounded. What is missing or has another shape is `check_fit`'s.
    """
    for name in filter(edited.__contains__, state):
        one, other = state[name], edited[name]
        if one.shape == other.shape and ".ff_proj." in name:  # the second half is the gate
            one, other = one[len(one) // 2 :], other[len(other) // 2 :]
        narrow = min(one.dtype, other.dtype, key=lambda dtype: dtype.itemsize)
        if one.shape == other.shape and not torch.equal(one.to(narrow), other.to(narrow)):
            raise made_for_another(path, folder, f" ({name} differs)")


def made_for_another(path: Path, folder: Path, detail: str = "") -> ValueError:
    """The error for an edit that does not belong to a checkpoint."""
    return ValueError(
        f"{path}: made for a different checkpoint than {folder}{detail}; set resuscitation_force "
        "(--resuscitation_force) to apply it anyway"
    )


def multipliers_for(path: Path, identity: str, folder: Path, force: bool) -> ByLayer:
    """The multipliers of a file; ValueError where it was made for another checkpoint, unless forced."""
    multipliers = load_multipliers(path)
    if multipliers.about.get("checkpoint_fingerprint") != identity and not force:
        raise made_for_another(path, folder)
    return multipliers.values


def identity_of(folder: Path) -> str:
    """SHA-256 that identifies the weights of a folder: `fingerprint` of an OLMo model, else of the weight files.

    Reads all of them; the system keeps what fits in its page cache.
    """
    if is_olmo(folder):
        return fingerprint(read_state(folder))
    files = model_files(folder)
    if adapters.is_adapter(folder):  # how the adapter is applied belongs to it
        files = [folder / adapters.CONFIGURATION, *files]
    return hashlib.sha256(" ".join(map(file_digest, files)).encode()).hexdigest()


def identity_of_model(model: nn.Module) -> str:
    """SHA-256 that identifies the weights of a model in memory: `fingerprint` of an OLMo model, also of transformers'
    class, as `identity_of` its folder; else, after MODEL, that of the state dict of its class."""
    state = weights_of(model)
    raw: Any = getattr(model, "config", None)
    if isinstance(model, OLMo):
        return fingerprint(state)
    if hasattr(raw, "to_dict") and is_known(raw.to_dict()):
        with suppress(ValueError):  # for instance adapted, or without its head: no complete OLMo model
            return fingerprint(from_transformers_state(state, raw.to_dict(), ""))
    return f"{MODEL}{fingerprint(state)}"
