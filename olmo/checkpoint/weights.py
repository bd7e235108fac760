"""Checkpoints: OLMo's unsharded folder is our own format; transformers' layouts come in by `transformers_layout.py`.

A folder holds `config.yaml` and `model.safetensors` (or `model.pt`), for a restart `optim.pt` and `train.pt`, and
`manifest.json`, by which damage is recognised (`manifest.py`). In those that a run writes for its restarts weights
and optimizer lie in parts (`sharded.py`); whoever reads weights need not care.
Weights are mapped from the file onto a model that was built without memory.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config.schema import ModelConfig, TrainConfig, load_model_config
from ..distributed import Ranks, full_tensor, is_of_collective, shard_like
from ..exceptions import ConfigurationError, FailedEverywhere, short_message
from ..files.tensors import read_tensors, read_training_state, write_tensors
from ..memory.rescaling import load_multipliers, rescale
from ..memory.temperature import Temperatures
from ..model import OLMo
from . import folder as saves
from . import manifest
from .transformers_layout import BEHAVIOUR, from_transformers_config, from_transformers_state, is_known, plain_names

_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+(@[\w.-]+)?$")


def is_hub_id(checkpoint: str) -> bool:
    """Whether a name that is no folder here can be `owner/name[@revision]` on the Hugging Face hub."""
    return bool(_HUB_ID.match(checkpoint)) and not Path(checkpoint).exists() and not Path(checkpoint).parent.is_dir()


def resolve(checkpoint: str) -> Path:
    """The folder of a checkpoint: a path, or `owner/name[@revision]` downloaded from the Hugging Face hub."""
    if Path(checkpoint).is_dir():
        return Path(checkpoint)
    if "://" in checkpoint:
        raise FileNotFoundError(f"{checkpoint}: a checkpoint is a folder here or on the hub; fetch it first")
    if not is_hub_id(checkpoint):
        raise FileNotFoundError(f"{checkpoint}: no such checkpoint folder")
    return download(checkpoint)


def download(hub_id: str, cache: Path | None = None, weights: bool = True) -> Path:
    """The folder of `owner/name[@revision]`, named by its commit, in `cache` or else in the hub's own.

    Without `weights` it holds the JSON files: configuration and tokenizer. Where the hub cannot be asked, an earlier
    download of all that was wanted will do. Raises FileNotFoundError where there is none.
    """
    from huggingface_hub import HfApi, snapshot_download

    name, _, revision = hub_id.partition("@")
    place: dict[str, Any] = {"revision": revision or None, "cache_dir": cache}
    patterns = ["*.json"]
    try:
        if weights:
            files = HfApi().list_repo_files(name, revision=revision or None)
            patterns.append("*.safetensors" if any(f.endswith(".safetensors") for f in files) else "*.bin")
        return Path(snapshot_download(name, **place, allow_patterns=patterns))
    except Exception as error:  # the hub's client lets the errors of its HTTP library through
        folder = downloaded(hub_id, cache, weights)
        if folder is not None:
            return folder
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FileNotFoundError(f"{hub_id}: no such folder, and not to be had from the hub: {reason}") from error


def downloaded(hub_id: str, cache: Path | None = None, weights: bool = True) -> Path | None:
    """What `download` has brought into `cache` or the hub's own, whole; None where that is not there."""
    from huggingface_hub import snapshot_download

    name, _, revision = hub_id.partition("@")
    # Newer clients count a snapshot as whole by the patterns that are named, older ones do not look.
    for weight_files in ("*.safetensors", "*.bin"):
        place: dict[str, Any] = {
            "cache_dir": cache,
            "allow_patterns": ["*.json", weight_files if weights else "*.json"],
        }
        try:
            folder = Path(snapshot_download(name, revision=revision or None, local_files_only=True, **place))
            if not weights or all(path.is_file() for path in model_files(folder)):
                return folder
        except (OSError, ValueError):  # not there, a part of it missing, or an index that is none
            continue
    return None


def model_files(folder: Path) -> list[Path]:
    """The weight files of a checkpoint folder of any layout; where they are several, those that its index names."""
    for single in ("model.safetensors", "model.pt"):
        if (folder / single).is_file():
            return [folder / single]
    if saves.is_sharded(folder):
        return sorted((folder / saves.SHARDS).iterdir())
    for index, pattern in (
        ("model.safetensors.index.json", "model-*.safetensors"),
        ("pytorch_model.bin.index.json", "pytorch_model*.bin"),
    ):
        if (folder / index).is_file():
            try:
                named = json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"].values()
                return [folder / Path(name).name for name in sorted(set(named))]
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                raise ValueError(f"{folder / index}: no index of weights: {error!r}") from error
        files = sorted(folder.glob(pattern))
        if files:
            return files
    meant = f"; did you mean {folder / 'latest'}?" if (folder / "latest").is_dir() else ""
    raise FileNotFoundError(
        f"{folder}: no weights here (expected model.safetensors, model.pt, model_and_optim, or the files of a "
        f"transformers folder){meant}"
    )


# --- layouts -----------------------------------------------------------------------------------------------------


def transformers_config(folder: Path) -> dict[str, Any] | None:
    """config.json of a transformers folder, None for another layout."""
    path = folder / "config.json"
    if not path.is_file() or (folder / "config.yaml").is_file():
        return None
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: expected keys and values")
    return raw


def is_olmo(folder: Path) -> bool:
    """Whether the folder's weights fit our own model: OLMo's layout, or transformers' OLMo and OLMo 2."""
    raw = transformers_config(folder)
    return raw is None or is_known(raw)


def read_config(folder: Path) -> ModelConfig:
    """The model's shape from any of the layouts."""
    raw = transformers_config(folder)
    if raw is None:
        return load_model_config(folder / "config.yaml")
    return from_transformers_config(raw, str(folder / "config.json"))


def read_state(folder: Path, mapped: bool = True) -> dict[str, Tensor]:
    """The weights of a checkpoint folder of any layout under OLMo's names.

    They are mapped from the file unless `mapped` is false; what has to be stacked, or lies in parts, is copied in any
    case.
    """
    raw = transformers_config(folder)
    if saves.is_sharded(folder):
        from . import sharded  # what it imports takes longer than most of what reads a checkpoint

        return sharded.read_all(folder, sharded.WEIGHTS)
    state: dict[str, Tensor] = {}
    for path in model_files(folder):
        state.update(read_tensors(path, mapped))
    return plain_names(state) if raw is None else from_transformers_state(state, raw, str(folder))


class StateOnDisk(Mapping[str, Tensor]):
    """The weights of a folder in OLMo's layout under OLMo's names, each mapped anew whenever it is asked for, and kept
    by nobody: with its mapping go the pages of it that were read, so memory of one tensor is enough to go through all.
    `like` has their shapes and dtypes (meta tensors)."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.like = {name: tensor.to("meta") for name, tensor in read_state(folder).items()}

    def __getitem__(self, name: str) -> Tensor:
        if saves.is_sharded(self.folder):
            from . import sharded

            return sharded.read_all(self.folder, f"{sharded.WEIGHTS}{name}")[""]
        return read_state(self.folder)[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.like)

    def __len__(self) -> int:
        return len(self.like)


class Fingerprint:
    """Identity of a checkpoint, the same for every file layout that holds the same OLMo state dict, from its tensors in
    any order.

    SHA-256 over names, shapes, the first and last 64 values of every tensor and a checksum of all its values (the sum
    of their float32 bit patterns as integers, at the speed of reading): it tells checkpoints apart, edited ones
    included, but it is no protection against someone who forges one.
    """

    def __init__(self) -> None:
        self._parts: dict[str, bytes] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        flat = tensor.detach().reshape(-1)
        # In pieces that stay in a CPU's cache, several times faster than one sum over all.
        pieces = (piece.float().cpu().contiguous() for piece in flat.split(2**18))
        checksum = sum(int(piece.view(torch.int32).sum(dtype=torch.int64)) for piece in pieces)
        ends = torch.cat((flat[:64], flat[-64:])).float().cpu().numpy().tobytes()
        self._parts[name] = f"{name} {tuple(tensor.shape)} {checksum}".encode() + ends

    @property
    def names(self) -> Set[str]:
        """Of the tensors that were added."""
        return self._parts.keys()

    def __str__(self) -> str:
        return hashlib.sha256(b"".join(self._parts[name] for name in sorted(self._parts))).hexdigest()


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """`Fingerprint` of a whole OLMo state dict."""
    found = Fingerprint()
    for name in state:
        found.add(name, state[name])
    return str(found)


def check_fit(model: OLMo, state: Mapping[str, Tensor], where: str) -> None:
    """Raise ValueError that names what does not fit between a model and a state dict."""
    wanted = model.state_dict()
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
        if not state[name].is_floating_point() or state[name].layout != torch.strided or state[name].is_meta:
            raise ValueError(f"{where}: {name} holds {state[name].dtype} numbers; weights are dense and floating-point")


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
        # What a checkpoint's config says of resuscitation was done before the checkpoint was trained and saved.
        config = replace(read_config(folder), resuscitation=None)
    else:
        check_behaviour(config, folder)
    model = OLMo.empty(config)
    state = read_state(folder, mapped or device.type != "cpu")
    if config.resuscitation:
        state = resuscitated(state, config.resuscitation, folder, mapped, force=config.resuscitation_force)
    check_fit(model, state, str(folder))
    for name in list(state):  # one by one: what has been converted need not be kept
        tensor = state.pop(name).to(device=device, dtype=dtype)
        model.load_state_dict({name: tensor}, strict=False, assign=True)
    Temperatures.from_config(config, folder).apply(model)
    return model


def check_behaviour(config: ModelConfig, folder: Path) -> None:
    """Raise ConfigurationError where a run's model would compute something else with a checkpoint's weights."""
    if not (folder / "config.yaml").is_file() and transformers_config(folder) is None:
        return  # weights alone; the shapes must do
    saved = read_config(folder)
    for key in BEHAVIOUR:
        if getattr(config, key) != getattr(saved, key):
            raise ConfigurationError(
                f"model.{key}: {getattr(config, key)}, but the checkpoint {folder} was made with {getattr(saved, key)}"
            )
    for key in ("temperature_attention", "temperature_MLP"):
        if getattr(config, key) is None and getattr(saved, key) is not None:
            raise ConfigurationError(
                f"model.{key}: missing, but the checkpoint {folder} was made with {getattr(saved, key)}"
            )


def resuscitated(
    state: dict[str, Tensor],
    name: str,
    folder: Path,
    mapped: bool = True,
    key: str = "model.resuscitation",
    force: bool = False,
) -> dict[str, Tensor]:
    """The weights that a resuscitation file makes of `state`: multipliers applied to it, or a full state dict.

    `name` is a path, or a file inside the checkpoint folder; `key` is where the user named it. A multiplier file must
    have been made for these weights, unless `force`. `mapped` as in `load_model`.
    """
    path = resuscitation_file(name, folder, key)
    if path.suffix == ".pt":
        return plain_names(read_tensors(path, mapped))
    return rescale(state, multipliers_for(path, fingerprint(state), folder, force))


def resuscitation_file(name: str, folder: Path, key: str) -> Path:
    """Where a resuscitation file lies: a path, or a name inside the checkpoint folder."""
    path = Path(name) if Path(name).is_file() else folder / name
    if not path.is_file():
        raise FileNotFoundError(f"{key}: {name} is no file, here or in {folder}")
    return path


def multipliers_for(path: Path, identity: str, folder: Path, force: bool) -> Tensor:
    """The multipliers (L, M) of a file; ValueError where it was made for another checkpoint, unless forced."""
    multipliers = load_multipliers(path)
    if multipliers.about.get("checkpoint_fingerprint") != identity and not force:
        raise ValueError(
            f"{path}: made for another checkpoint than {folder}; resuscitation_force applies it all the same"
        )
    return multipliers.values


# --- saving and restarting ---------------------------------------------------------------------------------------


def read_optimizer_state(folder: Path, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What an optimizer like this one kept when a run wrote a checkpoint folder, for `load_optimizer_state`.

    Of weights that FSDP has cut, from a checkpoint in parts, only what belongs to this process; of other checkpoints
    what is mapped from the file. A collective.
    """
    if not saves.is_sharded(folder):
        cut = any(hasattr(weight, "full_tensor") for weight in named_weights(optimizer).values())
        return read_training_state(folder, "optim", mapped=cut)
    from . import sharded

    return {"state": sharded.read_moments(folder, named_weights(optimizer))}


def named_weights(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The weights that an optimizer moves."""
    return {n: w for group in optimizer.param_groups for n, w in zip(group["param_names"], group["params"])}


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's state keyed by parameter name, as OLMo's unsharded optim.pt holds it."""
    state = optimizer.state_dict()
    names = [name for group in state["param_groups"] for name in group["param_names"]]
    groups = [{**group, "params": group["param_names"]} for group in state["param_groups"]]
    return {"state": {names[i]: value for i, value in state["state"].items()}, "param_groups": groups}


def load_optimizer_state(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any], where: str) -> None:
    """Fill the moments of every parameter; learning rate and decay stay those of the run's config.

    OLMo's trainer saves them by name, and under DDP by number, with the names (prefixed) in the groups.
    """
    state = optimizer.state_dict()
    weights = named_weights(optimizer)
    try:
        numbered = {
            number: name
            for group in saved.get("param_groups", [])
            for number, name in zip(group["params"], group.get("param_names", group["params"]))
        }
        found = {
            str(numbered.get(key, key)).removeprefix("module."): dict(value) for key, value in saved["state"].items()
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{where}: holds no optimizer state ({error!r}); set reset_optimizer_state") from error
    found = plain_names(found)
    kept: tuple[str, ...] = getattr(
        optimizer, "state_entries", ("exp_avg", "exp_avg_sq", "step")
    )  # torch's AdamW has none to ask
    for name in sorted(weights):
        if name not in found:
            raise ValueError(f"{where}: no optimizer state for {name}; set reset_optimizer_state")
        entries = found[name].keys() - {"grad_norm_exp_avg"}
        if entries != set(kept) or not all(isinstance(value, Tensor) for value in found[name].values()):
            raise ValueError(
                f"{where}: holds {', '.join(sorted(map(str, entries))) or 'nothing'} of {name}, the optimizer keeps "
                f"{', '.join(kept)}; set reset_optimizer_state"
            )
        for entry, value in found[name].items():
            shape = weights[name].shape if entry.startswith("exp_avg") else torch.Size()
            if value.shape != shape or not value.is_floating_point():
                raise ValueError(
                    f"{where}: {entry} of {name} has shape {tuple(value.shape)} and {value.dtype}, "
                    f"not {tuple(shape)} and floating point; set reset_optimizer_state"
                )
        for entry, value in found[name].items():
            if entry.startswith("exp_avg"):
                found[name][entry] = shard_like(value, weights[name])
    state["state"] = dict(enumerate(found[name] for name in weights))
    optimizer.load_state_dict(state)


def save(
    folder: Path,
    model: OLMo,
    config: TrainConfig,
    optimizer: torch.optim.Optimizer,
    trainer: dict[str, Any],
    temperatures: Temperatures | None = None,
    ephemeral: bool = False,
    first: bool = True,
) -> None:
    """Write an unsharded checkpoint, whole or not at all; an older one of that name is replaced.

    `temperatures`, those of this moment, are written with it: what is loaded computes what was saved. An `ephemeral`
    one is marked as such. All of it is on the disk before it gets its name. Raises OSError.
    What FSDP has cut is gathered, a collective; then only the `first` process writes.
    """

    def gathered(value: Any) -> Any:
        """A tensor whole, in main memory where it will be written."""
        if not isinstance(value, Tensor):
            return value
        value = full_tensor(value.detach())
        return value.cpu().contiguous() if first else None

    weights = {name: gathered(tensor) for name, tensor in model.state_dict().items()}
    saved = optimizer_state(optimizer)
    saved["state"] = {name: {e: gathered(v) for e, v in entries.items()} for name, entries in saved["state"].items()}
    if not first:
        return
    with _failing(folder):
        _begin(folder, config, trainer, temperatures)
        write_tensors(_partial(folder) / "model.safetensors", weights)
        for group in saved["param_groups"]:  # what OLMo's optimizer clips by
            limits = {"max_grad_norm": config.max_grad_norm, "max_grad_norm_ratio": config.max_grad_norm_ratio}
            group.update(sharded=False, **limits)
        _torch_save(saved, _partial(folder) / "optim.pt")
        _complete(folder, ephemeral)


def save_sharded(
    folder: Path,
    tensors: Mapping[str, Tensor],
    config: TrainConfig,
    trainer: dict[str, Any],
    temperatures: Temperatures | None,
    ephemeral: bool,
    ranks: Ranks,
) -> None:
    """Write what `sharded.snapshot` has made on every process, whole or not at all, as `save` does.

    A collective of the thread that saves; OSError on all processes where one fails.
    """
    from . import sharded

    with _failing(folder, FailedEverywhere):
        sharded.first_does(ranks, partial(_begin, folder, config, trainer, temperatures))
        sharded.write(_partial(folder), tensors, ranks)
        sharded.first_does(ranks, partial(sharded.check_parts, _partial(folder)))
        sharded.first_does(ranks, partial(_complete, folder, ephemeral))


def _partial(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.partial")


@contextmanager
def _failing(folder: Path, kind: type[OSError] = OSError) -> Iterator[None]:
    """Leave nothing half-written behind where a save fails; raise OSError, of this kind, that says why."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # on a full disk torch speaks of its own streams
        if is_of_collective(error):
            raise
        shutil.rmtree(_partial(folder), ignore_errors=True)
        cause = error.__cause__ or error.__context__ or error  # torch wraps it, write_tensors names a file that is gone
        raise kind(
            f"{folder}: cannot be saved ({short_message(cause)}); the checkpoints before it are intact"
        ) from error


def _begin(folder: Path, config: TrainConfig, trainer: dict[str, Any], temperatures: Temperatures | None) -> None:
    """Make the folder to write to, with all that is no weight and no optimizer's."""
    written = _partial(folder)
    shutil.rmtree(written, ignore_errors=True)
    written.mkdir(parents=True)
    if temperatures:
        file = None
        if temperatures.memories is not None:
            file = "temperature_MLP.safetensors"
            write_tensors(written / file, {"temperature_MLP": temperatures.memories.cpu()})
        config = replace(
            config,
            model=replace(
                config.model,
                temperature_attention=temperatures.attention,
                temperature_MLP=file,
                temperature_decay=False,
            ),
        )
    elif config.model.temperature_attention or config.model.temperature_MLP:  # they have come down to 1
        config = replace(config, model=replace(config.model, temperature_attention=None, temperature_MLP=None))
    config.save(written / "config.yaml")
    _torch_save(trainer, written / "train.pt")


def _torch_save(state: Any, path: Path) -> None:
    with path.open("wb") as target:  # torch does not tell why its own streams fail
        torch.save(state, target)


def _complete(folder: Path, ephemeral: bool) -> None:
    manifest.write(_partial(folder), ephemeral)
    saves.remove(folder, successor=_partial(folder))
