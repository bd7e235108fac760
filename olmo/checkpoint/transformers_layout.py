"""Two ways to write down one model's weights: OLMo's own names and transformers' (`OlmoForCausalLM`,
`Olmo2ForCausalLM`).

One table says which parameters of transformers a parameter of ours stacks, in this order: `att_proj` holds q, k, v
rows; `ff_proj` holds the **up** rows first, then the **gate** rows. `allenai/OLMo-1B` and its like keep OLMo's own
names behind the prefix `model.`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..config.model import ModelConfig
from ..files.tensors import LazyTensors, shapes_of
from .config_json import has_original_keys

_Value = TypeVar("_Value")

# Parameter of an OLMo block <- the transformers parameters whose rows it stacks.
BLOCK_TABLE = {
    "att_proj.weight": ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    "attn_out.weight": ("self_attn.o_proj.weight",),
    "ff_proj.weight": ("mlp.up_proj.weight", "mlp.gate_proj.weight"),
    "ff_out.weight": ("mlp.down_proj.weight",),
}
NORM_TABLE = {  # OLMo 2 alone has norms with weights
    "q_norm.weight": ("self_attn.q_norm.weight",),
    "k_norm.weight": ("self_attn.k_norm.weight",),
    "attn_norm.weight": ("post_attention_layernorm.weight",),
    "ff_norm.weight": ("post_feedforward_layernorm.weight",),
}
EMBEDDING, FINAL_NORM, HEAD = "transformer.wte.weight", "transformer.ln_f.weight", "transformer.ff_out.weight"
TOP_TABLE = {EMBEDDING: "model.embed_tokens.weight", FINAL_NORM: "model.norm.weight", HEAD: "lm_head.weight"}


def _rows(kind: str) -> dict[str, tuple[str, ...]]:
    return BLOCK_TABLE if kind == "olmo" else {**BLOCK_TABLE, **NORM_TABLE}


def from_transformers_state(state: Mapping[str, Tensor], raw: Mapping[str, Any], where: str) -> Mapping[str, Tensor]:
    """Weights of a folder with this config.json under OLMo's names, stacked at every access; ValueError for a missing
    or foreign tensor, or parts that do not stack."""
    if has_original_keys(raw):
        return {name.removeprefix("model."): tensor for name, tensor in state.items()}
    shapes = shapes_of(state)
    kind = raw["model_type"]
    if raw["num_hidden_layers"] > len(state):
        raise ValueError(
            f"{where}: num_hidden_layers is {raw['num_hidden_layers']:,}, the weights have {len(state):,} tensors"
        )
    wanted: dict[str, tuple[str, ...]] = {EMBEDDING: (TOP_TABLE[EMBEDDING],)}
    if kind == "olmo2":
        wanted[FINAL_NORM] = (TOP_TABLE[FINAL_NORM],)
    tied = raw.get("tie_word_embeddings", False)
    if not tied:
        wanted[HEAD] = (TOP_TABLE[HEAD],)
    for layer in range(raw["num_hidden_layers"]):
        for ours, theirs in _rows(kind).items():
            wanted[f"transformer.blocks.{layer}.{ours}"] = tuple(f"model.layers.{layer}.{name}" for name in theirs)
    # A tied head may be repeated; early versions of transformers saved the rotary frequencies.
    known = {name for names in wanted.values() for name in names} | ({TOP_TABLE[HEAD]} if tied else set())
    foreign = [n for n in state if n not in known and not n.endswith("self_attn.rotary_emb.inv_freq")]
    if foreign:
        raise ValueError(
            f"{where}: the weights hold {min(foreign)}, which {'OLMo' if kind == 'olmo' else 'OLMo 2'} does not have"
        )
    try:
        parts = {ours: [shapes[name] for name in theirs] for ours, theirs in wanted.items()}
    except KeyError as error:
        raise ValueError(f"{where}: the weights lack {error.args[0]}") from error

    def made(ours: str) -> Tensor:
        stack = [state[name] for name in wanted[ours]]
        return stack[0] if len(stack) == 1 else torch.cat(stack)

    return LazyTensors({ours: _shape(stack, wanted[ours], where) for ours, stack in parts.items()}, made)


def _shape(stack: Sequence[Tensor], names: Sequence[str], where: str) -> Tensor:
    """What `torch.cat` makes of tensors, on the meta device, where torch.cat itself takes a second to import."""
    if len(stack) == 1:
        return stack[0]
    if min(part.ndim for part in stack) == 0 or len({part.shape[1:] for part in stack}) > 1:
        shapes = ", ".join(f"{name} {tuple(part.shape)}" for name, part in zip(names, stack))
        raise ValueError(f"{where}: the weights do not stack: {shapes}")
    dtype = reduce(torch.promote_types, (part.dtype for part in stack))
    return torch.empty(sum(map(len, stack)), *stack[0].shape[1:], dtype=dtype, device="meta")


def to_transformers_state(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """OLMo's weights under transformers' names; the stacked ones are cut, not copied."""
    kind = "olmo2" if config.norm_after else "olmo"
    key_rows = config.effective_n_kv_heads * (config.d_model // config.n_heads)
    cuts = {
        "att_proj.weight": (config.d_model, key_rows, key_rows),
        "ff_proj.weight": (config.inner_size, config.inner_size),
    }
    result = {theirs: state[ours] for ours, theirs in TOP_TABLE.items() if ours in state}
    for layer in range(config.n_layers):
        for ours, theirs in _rows(kind).items():
            tensor = state[f"transformer.blocks.{layer}.{ours}"]
            pieces = tensor.split(cuts[ours]) if ours in cuts else (tensor,)
            result.update({f"model.layers.{layer}.{name}": piece for name, piece in zip(theirs, pieces)})
    return result


def plain_names(state: Mapping[str, _Value]) -> dict[str, _Value]:
    """What OLMo saved by name, without what wrapping left in the names: FSDP's prefix, and groups of blocks."""
    renamed = {name.replace("_fsdp_wrapped_module.", ""): tensor for name, tensor in state.items()}
    grouped = re.compile(r"transformer\.block_groups\.(\d+)\.(\d+)\.")
    places = [match for match in map(grouped.match, renamed) if match]
    if not places:
        return renamed
    size = 1 + max(int(match[2]) for match in places)

    def flat(match: re.Match[str]) -> str:
        return f"transformer.blocks.{int(match[1]) * size + int(match[2])}."

    return {grouped.sub(flat, name): tensor for name, tensor in renamed.items()}
