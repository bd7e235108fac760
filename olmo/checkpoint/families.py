"""Models of other families than OLMo's: described for a run, opened from their folders, and identified.

A family is known by the config.json of a transformers folder. What it computes is transformers' own class; code that a
folder brings along is never run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf, open_dict
from torch import Tensor, nn

from ..config.model import ModelConfig
from ..config.schema import TrainConfig
from ..config.setting import setting_of
from ..console import log
from ..exceptions import ConfigurationError
from ..files.tensors import write_safetensors
from ..memory.locate import find_layers
from ..memory.parts import Experts
from ..model.causal_lm import CausalLM, Model
from ..model.trainable import refusal
from ..tokenizer import document_end
from . import edits, hub, saves, weights
from .formats import explain

_MOST_LAYERS = 10_000  # an empty model of more takes minutes to build
_NO_CODE = {"trust_remote_code": False}  # without it, transformers asks on a terminal whether to run it
# Files of a folder that belong to its tokenizer, or say how to generate text; its checkpoints have copies.
_KEPT = (
    "*token*.json",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "*.model",
    "*.jinja",
    "generation_config.json",
)
_LARGEST = 2**26  # bytes of such a file


# --- the settings of a run ---


def complete(raw: DictConfig) -> None:
    """Fill in the section `model`, and the tokenizer, of a run from the folder of its `load_path` or
    `model.transformers`, if the section has no key that describes a model of ours; all else is left as it is.

    Raises ConfigurationError for keys of the section that do not apply to another family, or contradict its folder;
    ValueError or OSError where the folder cannot be read, or holds no model that can be trained.
    """
    model = raw.get("model")
    given = dict(model) if OmegaConf.is_dict(model) else {}
    ours = [f.name for f in fields(ModelConfig) if f.name in given and not setting_of(f).any_family]
    given = {name: value for name, value in given.items() if value is not None or name in ours}
    named, start = given.get("transformers"), raw.get("load_path")
    if not (named or start) or OmegaConf.is_config(named) or OmegaConf.is_config(start):
        return
    name, key = str(named or start), "model.transformers" if named else "load_path"
    if named and start and named != start:
        raise ConfigurationError(
            f"model.transformers: {named}, but load_path is {start}, which decides the family; leave one of the two "
            "out (--model.transformers=null)"
        )
    folder = _folder(raw, name, key, required=not ours)
    if folder is None:
        return
    found = weights.transformers_config(folder)
    if found is None and named:
        raise FileNotFoundError(f"{folder}: no config.json of a model of transformers' (model.transformers)")
    if found is None or weights.is_olmo(folder):
        if named:
            raise ConfigurationError(
                f"model.transformers: {named} is an OLMo model, which this program has itself; for its weights give "
                "load_path, for new ones the keys of the section model"
            )
        if ours:
            return
        about = {**vars(weights.read_config(folder)), "resuscitation": None}
        if about["transformers"]:  # the configuration of a run, without a model
            raise FileNotFoundError(f"{folder}: {explain(folder)} ({key})")
    else:
        if ours:
            raise ConfigurationError(
                f"model.{ours[0]}: does not apply to a {found.get('model_type')} model, which its config.json "
                f"describes; leave out {', '.join(ours)} ({key}: {name})"
            )
        about = {**described(folder, found, given), "transformers": name}
    with open_dict(raw):
        raw.model = {**about, **given}
        tokenizer = raw.get("tokenizer")
        if not (OmegaConf.is_dict(tokenizer) and tokenizer.get("identifier")):
            raw.tokenizer = {**(tokenizer or {}), "identifier": name}


def described(folder: Path, found: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of ModelConfig that a transformers folder, with `found` in its config.json, decides: vocabulary, EOS and
    padding.

    Raises ConfigurationError where a key that is `given` contradicts it, and for a folder that names no EOS;
    ValueError for a folder that holds no causal language model.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    kind = found.get("model_type")
    if not isinstance(kind, str):
        raise ValueError(f"{folder / 'config.json'}: has no model_type, the family of the model")
    if (folder / "adapter_config.json").is_file():
        raise ValueError(f"{folder}: {explain(folder)}")
    with named_errors(folder):
        own = AutoConfig.from_pretrained(folder, local_files_only=True, **_NO_CODE)
    config, length = own.get_text_config(), given.get("max_sequence_length")
    rows, longest = getattr(config, "vocab_size", None), getattr(config, "max_position_embeddings", None)
    longest = longest or getattr(config, "max_seq_len", None)  # of MPT
    if type(own) not in MODEL_FOR_CAUSAL_LM_MAPPING or not isinstance(rows, int):
        raise ValueError(f"{folder}: transformers has no causal language model of the type {kind}")
    if isinstance(quantized := found.get("quantization_config"), Mapping):
        raise ConfigurationError(
            f"{folder}: its weights are quantized ({quantized.get('quant_method')}) and cannot be trained; use a "
            "folder of float weights, whose config.json has no quantization_config"
        )
    for key in ("vocab_size", "embedding_size"):
        if given.get(key) not in (None, rows):
            raise ConfigurationError(f"model.{key}: {given[key]}, but {folder} has {rows} rows; leave it out")
    if length is None:
        raise ConfigurationError("model.max_sequence_length: missing; it is the number of tokens of an instance")
    if isinstance(length, int) and isinstance(longest, int) and 0 < longest < length:
        raise ConfigurationError(
            f"model.max_sequence_length: {length}, but {folder} was made for {longest} tokens; use at most that"
        )
    eos = given.get("eos_token_id")
    if eos is None:
        eos = document_end(folder)
    if eos is None:
        raise ConfigurationError(
            f"model.eos_token_id: missing; neither the tokenizer nor the config.json of {folder} names a token that "
            "ends a document"
        )
    padding = getattr(config, "pad_token_id", None)
    padding = padding if isinstance(padding, int) and 0 <= padding < rows else eos
    return {"vocab_size": rows, "embedding_size": rows, "eos_token_id": eos, "pad_token_id": padding}


def _folder(raw: DictConfig, name: str, key: str, required: bool) -> Path | None:
    """The folder of a path or hub id, of which only JSON files are fetched; if it does not exist and the run is to be
    resumed, the newest checkpoint of the run. None if nothing is found nor `required`."""
    if Path(name).is_dir():
        folder = Path(name)
        if required and not any((folder / file).is_file() for file in ("config.json", "config.yaml")):
            raise FileNotFoundError(f"{folder}: {explain(folder) or 'no config.json or config.yaml here'} ({key})")
        return folder
    try:
        return hub.download(name, weights=False) if hub.is_hub_id(name) else hub.resolve(name, key)
    except (OSError, ValueError):
        saved = Path(str(raw.get("save_folder") or TrainConfig.save_folder))
        own = saves.newest(saved) if raw.get("try_load_latest_save") else None
        if required and own is None:
            raise
        return own


# --- models ---


def load_model(folder: Path, device: torch.device, config: ModelConfig, mapped: bool = True) -> Model:
    """The model that a run trains or evaluates, float32, with the weights of a checkpoint folder; ours for OLMo's
    layouts. Arguments and errors as of `weights.load_model`."""
    if config.transformers is None:
        return weights.load_model(folder, device, config=config, mapped=mapped)
    if weights.is_olmo(folder):
        raise ConfigurationError(
            f"model.transformers: {config.transformers}, but {folder} is an OLMo checkpoint; choose another save_folder"
        )
    network = open_network(folder, torch.float32, complete_head=True)
    if config.resuscitation:
        path = weights.resuscitation_file(config.resuscitation, folder, "model.resuscitation")
        edits.resuscitate(network, folder, path, config.resuscitation_force)
    if not mapped and device.type == "cpu":  # transformers maps float32 weights from the file
        for tensor in (*network.parameters(), *network.buffers()):
            tensor.data = tensor.data.clone()
    return _trained(network, folder, config, device)


def new_model(config: ModelConfig, seed: int, device: torch.device) -> CausalLM:
    """A model of the family `config.transformers` with new weights, float32."""
    assert config.transformers is not None
    name = config.transformers
    folder = hub.download(name, weights=False) if hub.is_hub_id(name) else hub.resolve(name, "model.transformers")
    torch.manual_seed(seed)
    return _trained(_built(folder, torch.float32, initialize=True), folder, config, device)


def _trained(network: Any, folder: Path, config: ModelConfig, device: torch.device) -> CausalLM:
    """The network of a folder as a run's model, with the files of its checkpoints. Raises ValueError for one that
    cannot be trained."""
    _with_usable_experts(network, torch.bfloat16)  # in which FSDP may gather the weights
    network.config.architectures = [type(network).__name__]
    network._weight_conversions = None  # save under the names that the class has by itself, not those of this folder
    files = kept_files(folder) | {"config.json": network.config.to_json_string(use_diff=True).encode()}
    try:
        layers = find_layers(network)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    with named_errors(folder, "run"):
        model = CausalLM(network.to(device), config, [layer.module for layer in layers], files)
        # Here, because memories cannot be found in weights that FSDP has sharded.
        model.is_mixture = any(isinstance(part, Experts) for layer in layers for part in layer.parts)
        reason = refusal(model)
    if reason is not None:
        raise ValueError(f"{folder}: {type(network).__name__} cannot be trained: {reason}")
    return model


def remarks(model: CausalLM, tokens: int) -> Iterator[str]:
    """What a run warns of that trains a model on `tokens` at a time."""
    kind = type(model.network).__name__
    if model.head is None:
        size = 4 * tokens * (model.config.embedding_size or model.config.vocab_size)
        yield (
            f"{kind} computes logits in a way of its own, so those of a whole micro-batch are in memory at once: "
            f"{size / 1e9:.3g} GB in float32, and as much again for their gradient and each temporary copy"
        )
    if model.is_mixture and not model.has_auxiliary:
        yield f"{kind} has no loss that balances its experts; they train without one"


def _built(folder: Path, dtype: torch.dtype, initialize: bool) -> Any:
    """transformers' model of config.json in a folder, on the CPU, with new or uninitialized weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with named_errors(folder), nullcontext() if initialize else _uninitialized():
        own = AutoConfig.from_pretrained(folder, local_files_only=True, **_NO_CODE)
        network = AutoModelForCausalLM.from_config(own, dtype=dtype, **_NO_CODE)
    network.tie_weights()  # which initialization does
    return _with_usable_experts(network, dtype)


def _with_usable_experts(network: Any, dtype: torch.dtype) -> Any:
    """The network; with experts whose rows, in `dtype`, are no multiples of 16 bytes, which torch's grouped product
    requires, it computes them one after another."""
    matrices = (p for m in network.modules() if hasattr(m, "_apply_gate") for p in m.parameters(recurse=False))
    if any(p.ndim == 3 and any(n * dtype.itemsize % 16 for n in p.shape[1:]) for p in matrices):
        network.set_experts_implementation("eager")
    return network


def _uninitialized() -> AbstractContextManager[None]:
    """No model that is built within initializes its weights; buffers are computed."""
    try:
        from transformers.initialization import no_init_weights
    except ImportError:  # before transformers 5
        from transformers.modeling_utils import no_init_weights
    context: AbstractContextManager[None] = no_init_weights()
    return context


def open_network(folder: Path, dtype: torch.dtype | str, complete_head: bool = False) -> nn.Module:
    """transformers' model of a folder, on the CPU; `dtype` "auto" is that of its files.

    Raises ValueError where weights are missing; those of the head may be, unless `complete_head`.
    """
    from transformers import AutoModelForCausalLM

    weights.check_layers(folder)
    if saves.is_sharded(folder):
        from . import sharded  # what it imports takes longer than most of what reads a checkpoint

        network = _built(folder, torch.float32 if isinstance(dtype, str) else dtype, initialize=False)
        sharded.read_weights(folder, network, "network.", alone=True)
        return network.eval()
    with named_errors(folder):
        model, found = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # raised below, with a name
            **_NO_CODE,
        )
    if other := sorted(found["mismatched_keys"]):
        name, weight, shape = other[0]
        raise ValueError(f"{folder}: {name} has shape {tuple(weight)}, its config.json asks for {tuple(shape)}")
    # Transformers fills them with random numbers. The memories do not depend on the head, which some checkpoints lack.
    head = None if complete_head else model.get_output_embeddings()
    names = {
        f"{name}.{part}" for name, module in model.named_modules() if module is head for part in ("weight", "bias")
    }
    if missing := sorted(set(found["missing_keys"]) - names):
        raise ValueError(f"{folder}: the weights lack {len(missing)} tensors of the model: {', '.join(missing[:3])}")
    if unused := sorted(found["unexpected_keys"]):
        log.warning("%s: %s tensors are no part of the model: %s", folder, len(unused), ", ".join(unused[:3]))
    return _with_usable_experts(model, model.dtype)


def empty_network(folder: Path, has_weights: bool = True) -> nn.Module:
    """The model of a transformers folder on the meta device, without weights. Raises ValueError if it has no class.

    has_weights: whether the folder has them, so that the layers of its config.json can be compared with theirs.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if has_weights:
        weights.check_layers(folder)
    with named_errors(folder), torch.device("meta"):
        config = AutoConfig.from_pretrained(folder, local_files_only=True, **_NO_CODE)
        if (layers := getattr(config.get_text_config(), "num_hidden_layers", 0)) > _MOST_LAYERS:
            raise ValueError(f"config.json has {layers:,} layers")
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32, **_NO_CODE).eval()


@contextmanager
def named_errors(folder: Path, task: str = "load") -> Iterator[None]:
    """Turn what transformers raises into a ValueError of one line that names the folder and the task. Its own progress
    bars and log lines are left out; what matters of them is raised or logged where it is called."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    try:
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        yield
    except Exception as error:  # each library below has its own errors for damaged files
        first, *rest = str(error).splitlines() or [type(error).__name__]
        reason = f"{first} {rest[0].strip()}" if first.endswith(":") and rest else first
        if "trust_remote_code" in str(error):
            reason = "config.json requires code of its own (auto_map), and downloaded code is never run"
        raise ValueError(f"{folder}: transformers cannot {task} this model: {reason}") from error
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def kept_files(folder: Path) -> dict[str, bytes]:
    """The files of a folder, by name, that checkpoints of its model have too: its tokenizer's, and how to generate."""
    paths = {path for pattern in _KEPT for path in folder.glob(pattern) if path.is_file()}
    return {path.name: path.read_bytes() for path in sorted(paths) if path.stat().st_size <= _LARGEST}


# --- writing ---


def write_weights(folder: Path, model: CausalLM, state: Mapping[str, Tensor]) -> None:
    """Write `state`, the `distinct_state` of a model with whole tensors, as transformers' model.safetensors."""
    network = model.network
    ignored = getattr(network, "_keys_to_ignore_on_save", None) or ()
    plain = {name.removeprefix("network."): tensor for name, tensor in state.items()}
    kept = {name: tensor for name, tensor in plain.items() if name not in ignored}
    write_safetensors(folder / "model.safetensors", edits.as_saved(network, kept), {"format": "pt"})
