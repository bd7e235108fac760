"""A model's configuration in two ways: OLMo's own keys, and transformers' config.json of `OlmoForCausalLM` and
`Olmo2ForCausalLM`. `transformers_layout.py` does the same for the names of weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from ..config.load import make_model_config
from ..config.model import ModelConfig
from ..exceptions import ConfigurationError

if TYPE_CHECKING:
    import torch

# Keys of a model's config that change what it computes while the shapes of its weights stay the same.
BEHAVIOUR = (
    "n_heads",
    "effective_n_kv_heads",
    "activation_type",
    "rope",
    "rope_theta",
    "clip_qkv",
    "layer_norm_type",
    "layer_norm_eps",
    "attention_layer_norm",
    "norm_after",
    "scale_logits",
)

# What transformers' two classes fix; a model that differs cannot be written in their layout.
_COMMON = {
    "rope": True,
    "include_bias": False,
    "activation_type": "swiglu",
    "scale_logits": False,
    "embedding_layer_norm": False,
    "temperature_attention": None,
    "temperature_MLP": None,
}
_FIXED = {
    "olmo": {
        **_COMMON,
        "layer_norm_type": "default",
        "layer_norm_with_affine": False,
        "layer_norm_eps": 1e-5,
        "attention_layer_norm": False,
        "norm_after": False,
    },
    "olmo2": {
        **_COMMON,
        "layer_norm_type": "rms",
        "layer_norm_with_affine": True,
        "attention_layer_norm": True,
        "attention_layer_norm_with_affine": True,
        "norm_after": True,
        "clip_qkv": None,
    },
}
_CLASSES = {"olmo": "OlmoForCausalLM", "olmo2": "Olmo2ForCausalLM"}


def has_original_keys(raw: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of allenai/OLMo-1B and its like: OLMo's own keys and names. Early revisions call
    this model type `olmo`, later ones `hf_olmo`, so only the keys distinguish it from transformers' own OLMo."""
    return "d_model" in raw and "mlp_ratio" in raw


def is_known(raw: Mapping[str, Any]) -> bool:
    """Whether a config.json describes a model that ours can be."""
    return has_original_keys(raw) or str(raw.get("model_type")) in _FIXED


def from_transformers_config(raw: Mapping[str, Any], where: str) -> ModelConfig:
    """A config.json as a ModelConfig. Raises ConfigurationError, naming `where`, for what ours cannot be.

    Files that `scripts.convert` wrote carry OLMo's own keys beside, in `olmo_config`: some of them (the vocabulary
    without its padding, the initialisation) have no place in transformers' config.
    """
    if has_original_keys(raw):
        known = {key: value for key, value in raw.items() if key in ModelConfig.__dataclass_fields__}
        return make_model_config(known, where)
    kind = str(raw.get("model_type"))
    if kind not in _FIXED:
        raise ValueError(f"{where}: a {kind} model, not OLMo or OLMo 2; name it in load_path or model.transformers")
    problems = "; ".join(_unsupported_keys(raw))
    if problems:
        raise ConfigurationError(f"{where}: {problems}")
    eos = raw.get("eos_token_id")
    theta = (raw.get("rope_parameters") or {}).get("rope_theta", raw.get("rope_theta", 10000))
    inner = raw.get("intermediate_size")
    keys = {key: value for key, value in _FIXED[kind].items() if value is not None}
    try:
        keys |= {
            "d_model": raw["hidden_size"],
            "n_heads": raw["num_attention_heads"],
            "n_kv_heads": raw.get("num_key_value_heads"),
            "n_layers": raw["num_hidden_layers"],
            "mlp_hidden_size": 2 * inner if isinstance(inner, int) else inner,
            "rope_theta": int(theta) if isinstance(theta, float) and theta.is_integer() else theta,
            "max_sequence_length": raw["max_position_embeddings"],
            "vocab_size": raw["vocab_size"],
            "embedding_size": raw["vocab_size"],
            "weight_tying": raw.get("tie_word_embeddings", False),
            "eos_token_id": (eos[0] if isinstance(eos, list) and eos else eos) or 0,
            "pad_token_id": raw.get("pad_token_id") or 0,
            "attention_dropout": raw.get("attention_dropout", 0.0),
            "residual_dropout": 0.0,
            "embedding_dropout": 0.0,
            "bias_for_layer_norm": False,
            "init_fn": "mitchell" if kind == "olmo" else "normal",
        }
    except KeyError as error:
        raise ConfigurationError(f"{where}: no {error.args[0]}") from error
    keys |= {"clip_qkv": raw.get("clip_qkv")} if kind == "olmo" else {"layer_norm_eps": raw.get("rms_norm_eps", 1e-5)}
    if inner is None:
        raise ConfigurationError(f"{where}: no intermediate_size")
    config = make_model_config(keys, where)
    if "olmo_config" not in raw:
        return config
    if not isinstance(raw["olmo_config"], dict):
        raise ConfigurationError(f"{where}: olmo_config: expected keys and values")
    saved = make_model_config(raw["olmo_config"], f"{where}: olmo_config")
    same = (*BEHAVIOUR, "d_model", "n_layers", "projection_size", "weight_tying", "max_sequence_length")
    for key in same:
        if getattr(saved, key) != getattr(config, key):
            raise ConfigurationError(
                f"{where}: olmo_config.{key} is {getattr(saved, key)}, beside {getattr(config, key)}"
            )
    return saved


def _unsupported_keys(raw: Mapping[str, Any]) -> Iterator[str]:
    """Settings of transformers' OLMo that this program does not support."""
    for key, accepted in (("attention_bias", (None, False)), ("hidden_act", (None, "silu"))):
        if raw.get(key) not in accepted:
            yield f"{key}: {raw[key]} is not supported"
    for key in ("rope_parameters", "rope_scaling"):
        rope = raw.get(key) or {}
        if not isinstance(rope, dict):
            yield f"{key}: expected keys and values, got {rope!r}"
        elif rope.get("rope_type", rope.get("type", "default")) != "default":
            yield f"{key}: {rope} is not supported"


def to_transformers_config(config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """config.json of the transformers class that computes what `config` does; ConfigurationError where none does."""
    kind = "olmo2" if config.norm_after else "olmo"
    for key, value in _FIXED[kind].items():
        if getattr(config, key) != value:
            raise ConfigurationError(
                f"model.{key}: transformers' {_CLASSES[kind]} has no {getattr(config, key)!s} (only {value!s})"
            )
    if kind == "olmo2" and config.bias_for_layer_norm:
        raise ConfigurationError(f"model.bias_for_layer_norm: transformers' {_CLASSES[kind]} has no such bias")
    raw = {
        "architectures": [_CLASSES[kind]],
        "model_type": kind,
        "hidden_size": config.d_model,
        "intermediate_size": config.inner_size,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.effective_n_kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_sequence_length,
        "initializer_range": config.init_std,
        "vocab_size": config.rows,
        "tie_word_embeddings": config.weight_tying,
        "rope_theta": float(config.rope_theta),
        "attention_bias": False,
        "attention_dropout": config.attention_dropout,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
        "bos_token_id": None,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "olmo_config": asdict(replace(config, resuscitation=None)),
    }
    return raw | ({"clip_qkv": config.clip_qkv} if kind == "olmo" else {"rms_norm_eps": config.layer_norm_eps})
