"""The context of a model: how many tokens it takes at once, and whether it can take more."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from olmo import checkpoint
from olmo.checkpoint import empty_network
from olmo.checkpoint.config_json import from_transformers_config, is_known
from olmo.exceptions import ConfigurationError
from olmo.model import OLMo

# The context length in the config.json of different families: GPT-2 has n_positions, MPT max_seq_len.
_NAMES = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")
_LONGEST = 2048  # tokens, of other families, whose contexts can be very long


@dataclass(frozen=True)
class Context:
    """positions: tokens that the model was made for; None: any number, as with ALiBi or sliding windows in all layers.
    fixed: whether it has a table of so many positions (learned ones), instead of computing them (rotary ones)."""

    positions: int | None
    fixed: bool = False


def context_length(model: Path | nn.Module) -> int:
    """Tokens that a model, or that of a folder, takes at once; at most 2048 for other families."""
    if isinstance(model, OLMo):
        return model.config.max_sequence_length
    raw = checkpoint.transformers_config(model) if isinstance(model, Path) else _configuration(model)
    if raw is None:
        assert isinstance(model, Path)
        return checkpoint.read_config(model).max_sequence_length
    if is_known(raw):
        return from_transformers_config(raw, str(model) if isinstance(model, Path) else "config").max_sequence_length
    lengths = ((raw.get("text_config") or raw).get(name, raw.get(name)) for name in _NAMES)
    return min(next((int(length) for length in lengths if length), _LONGEST), _LONGEST)


def _configuration(model: Any) -> dict[str, Any]:
    """The content that a module's config.json would have; {} where it has no configuration."""
    return model.config.to_dict() if hasattr(getattr(model, "config", None), "to_dict") else {}


def check_length(model: Path | nn.Module, length: int | None, allow_longer: bool) -> int | None:
    """Raise ConfigurationError where a model, or that of a folder, does not take `length` tokens at once, without
    reading its weights. Computed positions may be extrapolated with `allow_longer`; the context is returned where they
    are."""
    if length is None or (length <= _LONGEST and length <= context_length(model)):
        return None
    context = context_of(model)
    if context.positions is None or length <= context.positions:
        return None
    name = model if isinstance(model, Path) else type(model).__name__
    what, less = f"--sequence_length {length}: {name}", f"use --sequence_length {context.positions} or less"
    if context.fixed:
        raise ConfigurationError(f"{what} has positions for {context.positions} tokens; {less}")
    if not allow_longer:
        raise ConfigurationError(
            f"{what} is made for {context.positions} tokens and would extrapolate their positions; {less}, or "
            "--allow_longer to measure it all the same"
        )
    return context.positions


def context_of(source: Path | nn.Module) -> Context:
    """The context of a model, or that of a folder; of another family by the structure of an empty model."""
    if isinstance(source, OLMo) or (isinstance(source, Path) and checkpoint.is_olmo(source)):
        ours = source.config if isinstance(source, OLMo) else checkpoint.read_config(source)
        return Context(ours.max_sequence_length, fixed=not ours.rope)
    # Without weights: those of the hub are downloaded later.
    model: Any = empty_network(source, has_weights=False) if isinstance(source, Path) else source
    if not hasattr(getattr(model, "config", None), "get_text_config"):
        return Context(None)
    config = model.config.get_text_config()
    tables = [
        module.num_embeddings - getattr(module, "offset", 0)  # OPT's first two rows are no positions
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and _is_of_positions(name)
    ]
    tables += [len(table) for name, table in model.named_buffers() if table.ndim == 2 and _is_of_positions(name)]
    if getattr(config, "max_seq_len", None):  # MPT computes its biases for so many tokens
        tables.append(config.max_seq_len)
    if tables:
        return Context(min(tables), fixed=True)
    computed = any(re.search("Rotary|Sinusoid", type(module).__name__) for module in model.modules())
    if not computed or getattr(config, "alibi", False) or _slides(config):
        return Context(None)
    named = (getattr(config, name, None) for name in _NAMES)
    positions = [int(length) for length in named if length][:1]
    scaling = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    for one in [scaling, *(value for value in scaling.values() if isinstance(value, dict))]:
        if one.get("original_max_position_embeddings") and one.get("factor"):  # such as YaRN's
            positions.append(int(one["original_max_position_embeddings"] * one["factor"]))
    return Context(max(positions, default=None))


def _is_of_positions(name: str) -> bool:
    return re.search("wpe|pos", name.rpartition(".")[2]) is not None


def _slides(config: Any) -> bool:
    """Whether every layer attends to a window of tokens: no two of them are then farther apart than the window."""
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    return bool(window) and (kinds is None or set(kinds) == {"sliding_attention"})
