"""Checkpoints: OLMo's unsharded folder is our own format; transformers' OLMo layouts come in through one table.

A folder holds `config.yaml` and `model.safetensors` (or `model.pt`), and for a restart `optim.pt` and `train.pt`.
OLMo's safetensors spell each key as base64 of a pickled (path, flag); they are read by an unpickler that can make
nothing but strings, booleans and tuples. Fused projections: `att_proj` holds q, k, v rows; `ff_proj` holds the
**up** rows first, then the **gate** rows.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import pickle
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .config import InitFnType, LayerNormType, ModelConfig, TrainConfig, load_model_config, make_model_config
from .exceptions import ConfigurationError
from .memory import fingerprint, load_multipliers, rescale
from .model import OLMo

_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+(@[\w.-]+)?$")


# Keys of a model's config that change what it computes while the shapes of its weights stay the same.
BEHAVIOUR = (
    "n_heads",
    "effective_n_kv_heads",
    "activation_type",
    "rope",
    "rope_theta",
    "clip_qkv",
    "layer_norm_eps",
    "norm_after",
    "scale_logits",
)

# --- files -------------------------------------------------------------------------------------------------------


class _KeyUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"a key may not name {module}.{name}")


def encode_key(name: str) -> str:
    """A name as OLMo's safetensors spell it."""
    return base64.urlsafe_b64encode(pickle.dumps(((name,), False), protocol=4)).decode("ascii")


def decode_key(key: str) -> str:
    """The name behind a key of a safetensors file, OLMo's or plain. Makes nothing but strings and tuples."""
    if "." in key:
        return key  # base64 has no '.', but its decoder would skip it and the unpickler read on in what is left
    try:
        path, pickled_value = _KeyUnpickler(io.BytesIO(base64.urlsafe_b64decode(key))).load()
    except (binascii.Error, pickle.UnpicklingError, ValueError, EOFError, TypeError, IndexError, KeyError) as error:
        if "may not name" in str(error):
            raise ValueError(f"hostile key in a safetensors file: {error}") from error
        return key
    if pickled_value or not isinstance(path, tuple) or not all(isinstance(p, str) for p in path):
        raise ValueError("a key of this safetensors file does not name a tensor")
    return ".".join(path)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors or torch file, memory-mapped, by name; ValueError where it holds anything else."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                return {decode_key(key): file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except Exception as error:  # each library has its own errors for damaged and hostile files
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path}: damaged or no file of tensors: {reason}") from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path}: expected a flat dictionary of tensors")
    return state


def resolve(checkpoint: str) -> Path:
    """The folder of a checkpoint: a path, or `owner/name[@revision]` downloaded from the Hugging Face hub."""
    if Path(checkpoint).is_dir():
        return Path(checkpoint)
    if not _HUB_ID.match(checkpoint) or Path(checkpoint).parent.is_dir():
        raise FileNotFoundError(f"{checkpoint}: no such checkpoint folder")
    from huggingface_hub import HfApi, snapshot_download

    name, _, revision = checkpoint.partition("@")
    try:
        files = HfApi().list_repo_files(name, revision=revision or None)
        weights = "*.safetensors" if any(f.endswith(".safetensors") for f in files) else "*.bin"
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=["*.json", weights]))
    except Exception as error:  # the hub's client lets the errors of its HTTP library through
        try:  # offline, an earlier download will do
            return Path(snapshot_download(name, revision=revision or None, local_files_only=True))
        except Exception:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise FileNotFoundError(
                f"{checkpoint}: no such folder, and not to be had from the hub: {reason}"
            ) from error


def model_files(folder: Path) -> list[Path]:
    """The weight files of a checkpoint folder of any layout."""
    for pattern in ("model.safetensors", "model.pt", "model-*.safetensors", "pytorch_model*.bin"):
        files = sorted(folder.glob(pattern))
        if files:
            return files
    raise FileNotFoundError(
        f"{folder}: no weights here (expected model.safetensors, model.pt, or the files of a transformers folder)"
    )


# --- layouts -----------------------------------------------------------------------------------------------------


def transformers_config(folder: Path) -> dict[str, Any] | None:
    """config.json of a transformers folder, None for another layout."""
    path = folder / "config.json"
    if not path.is_file() or (folder / "config.yaml").is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error


def is_olmo(folder: Path) -> bool:
    """Whether the folder's weights fit our own model: OLMo's layout, or transformers' first OLMo."""
    config = transformers_config(folder)
    return config is None or _original_keys(config) or config.get("model_type") == "olmo"


def _original_keys(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of allenai/OLMo-1B and its like: OLMo's own keys and names. Early revisions call
    this model type `olmo`, later ones `hf_olmo`, so only the keys can tell it from transformers' own OLMo."""
    return "d_model" in config and "mlp_ratio" in config


def read_config(folder: Path) -> ModelConfig:
    """The model's shape from any of the three layouts."""
    raw = transformers_config(folder)
    if raw is None:
        return load_model_config(folder / "config.yaml")
    if _original_keys(raw):
        known = {k: v for k, v in raw.items() if k in ModelConfig.__dataclass_fields__}
        return make_model_config(known, str(folder / "config.json"))
    if raw.get("model_type") != "olmo":
        raise ValueError(f"{folder}: a {raw.get('model_type')} model; only OLMo can be trained")
    unsupported = "; ".join(_unsupported_keys(raw))
    if unsupported:
        raise ConfigurationError(f"{folder / 'config.json'}: {unsupported}")
    return ModelConfig(
        d_model=raw["hidden_size"],
        n_heads=raw["num_attention_heads"],
        n_kv_heads=raw.get("num_key_value_heads"),
        n_layers=raw["num_hidden_layers"],
        mlp_hidden_size=2 * raw["intermediate_size"],
        clip_qkv=raw.get("clip_qkv"),
        rope=True,
        rope_theta=int((raw.get("rope_parameters") or {}).get("rope_theta", raw.get("rope_theta", 10000))),
        max_sequence_length=raw["max_position_embeddings"],
        vocab_size=raw["vocab_size"],
        embedding_size=raw["vocab_size"],
        weight_tying=raw.get("tie_word_embeddings", False),
        eos_token_id=raw.get("eos_token_id") or 0,
        pad_token_id=raw.get("pad_token_id") or 0,
        attention_dropout=0.0,
        residual_dropout=0.0,
        embedding_dropout=0.0,
        include_bias=False,
        layer_norm_type=LayerNormType.default,
        layer_norm_with_affine=False,
        attention_layer_norm_with_affine=False,
        init_fn=InitFnType.mitchell,
    )


def _unsupported_keys(raw: Mapping[str, Any]) -> Iterator[str]:
    """What transformers' OLMo can be told and ours cannot do."""
    for key, accepted in (("attention_bias", (None, False)), ("hidden_act", (None, "silu"))):
        if raw.get(key) not in accepted:
            yield f"{key}: {raw[key]} is not supported"
    for key in ("rope_parameters", "rope_scaling"):
        rope = raw.get(key) or {}
        if rope.get("rope_type", rope.get("type", "default")) != "default":
            yield f"{key}: {rope} is not supported"


# One row of the table: parameter of an OLMo block <- the transformers parameters whose rows it stacks.
BLOCK_TABLE = {
    "att_proj.weight": ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    "attn_out.weight": ("self_attn.o_proj.weight",),
    "ff_proj.weight": ("mlp.up_proj.weight", "mlp.gate_proj.weight"),
    "ff_out.weight": ("mlp.down_proj.weight",),
}


def _transformers_names(layers: int) -> set[str]:
    """Every tensor a transformers folder may hold; early versions of transformers saved the rotary frequencies."""
    rows = [name for names in BLOCK_TABLE.values() for name in names]
    rows.append("self_attn.rotary_emb.inv_freq")
    return {"model.embed_tokens.weight", "lm_head.weight"} | {
        f"model.layers.{layer}.{name}" for layer in range(layers) for name in rows
    }


def read_state(folder: Path) -> dict[str, Tensor]:
    """The weights of a checkpoint folder of any layout under OLMo's names."""
    raw = transformers_config(folder)
    state: dict[str, Tensor] = {}
    for path in model_files(folder):
        state.update(read_tensors(path))
    if raw is None:
        return state
    if _original_keys(raw):
        return {name.removeprefix("model."): tensor for name, tensor in state.items()}
    foreign = state.keys() - _transformers_names(raw["num_hidden_layers"])
    if foreign:
        raise ValueError(f"{folder}: the weights hold {min(foreign)}, which OLMo has not")
    try:
        named = {"transformer.wte.weight": state["model.embed_tokens.weight"]}
        for layer in range(raw["num_hidden_layers"]):
            for ours, theirs in BLOCK_TABLE.items():
                parts = [state[f"model.layers.{layer}.{name}"] for name in theirs]
                named[f"transformer.blocks.{layer}.{ours}"] = parts[0] if len(parts) == 1 else torch.cat(parts)
        if not raw.get("tie_word_embeddings", False):
            named["transformer.ff_out.weight"] = state["lm_head.weight"]
    except KeyError as error:
        raise ValueError(f"{folder}: the weights lack {error.args[0]}") from error
    return named


def fill(model: OLMo, state: Mapping[str, Tensor], where: str) -> None:
    """Copy a state dict into a model whose parameters have memory; ValueError names what does not fit."""
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
    model.load_state_dict(dict(state))


def load_model(
    folder: Path, device: torch.device, dtype: torch.dtype = torch.float32, config: ModelConfig | None = None
) -> OLMo:
    """An OLMo model with the weights of a checkpoint folder of any layout, on `device` in `dtype`.

    `config` replaces the checkpoint's own (a run may use another context length or dropout).
    `config.resuscitation` names a multiplier file or a full state dict that is applied on the way.
    """
    if config is None:
        # What a checkpoint's config says of resuscitation was done before the checkpoint was trained and saved.
        config = replace(read_config(folder), resuscitation=None)
    else:
        _check_behaviour(config, folder)
    model = OLMo.empty(config).to(dtype).to_empty(device=device)
    state = read_state(folder)
    if config.resuscitation:
        state = resuscitated(state, config.resuscitation, folder)
    fill(model, state, str(folder))
    return model


def _check_behaviour(config: ModelConfig, folder: Path) -> None:
    """Raise ConfigurationError where a run's model would compute something else with a checkpoint's weights."""
    if not (folder / "config.yaml").is_file() and transformers_config(folder) is None:
        return  # weights alone; the shapes must do
    saved = read_config(folder)
    for key in BEHAVIOUR:
        if getattr(config, key) != getattr(saved, key):
            raise ConfigurationError(
                f"model.{key}: {getattr(config, key)}, but the checkpoint {folder} was made with {getattr(saved, key)}"
            )


def resuscitated(state: dict[str, Tensor], name: str, folder: Path) -> dict[str, Tensor]:
    """The weights that `model.resuscitation` names: multipliers applied to `state`, or a full state dict.

    `name` is a path, or a file inside the checkpoint folder. A multiplier file must have been made for these weights.
    """
    path = Path(name) if Path(name).is_file() else folder / name
    if not path.is_file():
        raise FileNotFoundError(f"model.resuscitation: {name} is no file, here or in {folder}")
    if path.suffix == ".pt":
        return read_tensors(path)
    multipliers = load_multipliers(path)
    if multipliers.about.get("checkpoint_fingerprint") != fingerprint(state):
        raise ValueError(f"{path}: made for another checkpoint than {folder}")
    return rescale(state, multipliers.values)


# --- saving and restarting ---------------------------------------------------------------------------------------


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's state keyed by parameter name, as OLMo's unsharded optim.pt holds it."""
    state = optimizer.state_dict()
    names = [name for group in state["param_groups"] for name in group["param_names"]]
    groups = [{**group, "params": group["param_names"]} for group in state["param_groups"]]
    return {"state": {names[i]: value for i, value in state["state"].items()}, "param_groups": groups}


def load_optimizer_state(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any], where: str) -> None:
    """Fill the moments of every parameter; learning rate and decay stay those of the run's config."""
    state = optimizer.state_dict()
    names = [name for group in state["param_groups"] for name in group["param_names"]]
    missing = sorted(set(names) - set(saved.get("state", {})))
    if missing:
        raise ValueError(f"{where}: no optimizer state for {missing[0]}; set reset_optimizer_state")
    state["state"] = {i: saved["state"][name] for i, name in enumerate(names)}
    optimizer.load_state_dict(state)


def read_training_state(path: Path) -> dict[str, Any]:
    """optim.pt or train.pt, without unpickling anything but numbers, strings, containers and tensors."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: missing; set reset_optimizer_state and reset_trainer_state to start from the weights alone"
        )
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises several types for damaged and refused files
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path}: cannot be read safely ({reason}); reset that state to go on") from error


def save(
    folder: Path, model: OLMo, config: TrainConfig, optimizer: torch.optim.Optimizer, trainer: dict[str, Any]
) -> None:
    """Write an unsharded checkpoint, whole or not at all; an older one of that name is replaced."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    config.save(partial / "config.yaml")
    tensors = {encode_key(name): t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
    torch.save(optimizer_state(optimizer), partial / "optim.pt")
    torch.save(trainer, partial / "train.pt")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def latest(save_folder: Path) -> Path | None:
    """The checkpoint of the highest step that a run saved and that can restart it."""
    steps = {}
    for path in save_folder.glob("step*"):
        match = re.fullmatch(r"step(\d+)(-unsharded)?", path.name)
        if match and (path / "train.pt").is_file():
            steps[int(match[1])] = path
    return steps[max(steps)] if steps else None


def remove(folder: Path) -> None:
    """Remove a checkpoint that a run no longer keeps; never leaves half of it under its name."""
    doomed = folder.with_name(f".{folder.name}.removed")
    folder.rename(doomed)
    shutil.rmtree(doomed)
