"""Models of other families than OLMo's: opened from their folders, and saved.

A family is known by the config.json of a transformers folder. What it computes is transformers' own class; code that a
folder brings along is never run.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config.model import ModelConfig
from ..console import log
from ..exceptions import ConfigurationError, needs
from ..files.adapters import MERGE, WEIGHTS, base_folder, is_adapter
from ..files.tensors import tensor_names, write_safetensors
from ..memory.locate import find_layers
from ..memory.parts import Experts
from ..memory.unwrap import unwrapped
from ..model.causal_lm import CausalLM, Model
from ..model.trainable import refusal
from . import edits, hub, saves, weights
from .folder import is_olmo, model_files, resuscitation_file

_MOST_LAYERS = 10_000  # an empty model of more takes minutes to build
NO_CODE = {"trust_remote_code": False}  # without it, transformers asks on a terminal whether to run it
# Files of a folder that belong to its tokenizer, or configure generation; its checkpoints have copies.
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


def load_model(folder: Path, device: torch.device, config: ModelConfig, mapped: bool = True) -> Model:
    """The model that a run trains or evaluates, float32, with the weights of a checkpoint folder; ours for OLMo's
    layouts. Arguments and errors as of `weights.load_model`."""
    if config.transformers is None and is_adapter(folder):
        raise ConfigurationError(f"{folder}: an adapter of an OLMo model; merge it first: {MERGE}")
    if config.transformers is None:
        return weights.load_model(folder, device, config=config, mapped=mapped)
    if is_olmo(folder):
        raise ConfigurationError(
            f"model.transformers: {config.transformers}, but {folder} is an OLMo checkpoint; choose another save_folder"
        )
    network = open_network(folder, torch.float32, complete_head=True)
    if config.resuscitation:
        path = resuscitation_file(config.resuscitation, folder, "model.resuscitation")
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
        own = AutoConfig.from_pretrained(folder, local_files_only=True, **NO_CODE)
        network = AutoModelForCausalLM.from_config(own, dtype=dtype, **NO_CODE)
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


def open_network(folder: Path, dtype: torch.dtype | str, complete_head: bool = False, **placed: Any) -> nn.Module:
    """transformers' model of a folder, on the CPU, or where `placed` puts it; `dtype` "auto" is that of its files.

    An adapter's is that of its base model with the adapter in its layers. placed: device_map and offload_folder of
    transformers' from_pretrained, which then needs accelerate. Raises ValueError where weights are missing; those of
    the head may be, unless `complete_head`.
    """
    from transformers import AutoModelForCausalLM

    if is_adapter(folder):
        return _adapted(folder, open_network(base_folder(folder), dtype, complete_head))
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
            **placed,
            **NO_CODE,
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


def _adapted(folder: Path, network: nn.Module) -> nn.Module:
    """The network of a base model with the adapter of a folder in its layers."""
    peft = needs("peft", "peft", f"{folder}, an adapter")
    model_files(folder)  # an error if there are none that can be read
    with named_errors(folder, "add the adapter to"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is missing, which is raised below
        adapted: Any = peft.PeftModel.from_pretrained(network, str(folder))
    wanted = {*peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)}
    found = tensor_names(folder / WEIGHTS)
    if missing := sorted(wanted - {*found}):
        raise ValueError(f"{folder / WEIGHTS}: lacks {len(missing)} tensors of the adapter: {', '.join(missing[:3])}")
    if unused := sorted({*found} - wanted):
        log.warning("%s: %s tensors are no part of the adapter: %s", folder, len(unused), ", ".join(unused[:3]))
    try:
        return unwrapped(adapted.eval())
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def empty_network(folder: Path, has_weights: bool = True) -> nn.Module:
    """The model of a transformers folder on the meta device, without weights. Raises ValueError if it has no class.

    has_weights: whether the folder has them, so that the layers of its config.json can be compared with theirs.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = base_folder(folder)
    if has_weights:
        weights.check_layers(folder)
    with named_errors(folder), torch.device("meta"):
        config = AutoConfig.from_pretrained(folder, local_files_only=True, **NO_CODE)
        if (layers := getattr(config.get_text_config(), "num_hidden_layers", 0)) > _MOST_LAYERS:
            raise ValueError(f"config.json has {layers:,} layers")
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32, **NO_CODE).eval()


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


def write_weights(folder: Path, model: CausalLM, state: Mapping[str, Tensor]) -> None:
    """Write `state`, the `distinct_state` of a model with whole tensors, as transformers' model.safetensors."""
    network = model.network
    ignored = getattr(network, "_keys_to_ignore_on_save", None) or ()
    plain = {name.removeprefix("network."): tensor for name, tensor in state.items()}
    kept = {name: tensor for name, tensor in plain.items() if name not in ignored}
    write_safetensors(folder / "model.safetensors", edits.as_saved(network, kept), {"format": "pt"})
