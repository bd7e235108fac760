"""What several tests need: a tiny model, the same weights in transformers' own implementation, a tiny tokenizer.

`tiny_config()` and `tiny_tokenizer()` fit together: both know 128 tokens, and 0 is the end of a text.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from olmo.config import ModelConfig
from olmo.model import OLMo

END_OF_TEXT = "<|endoftext|>"  # id 0

# In the order in which they are merged; with END_OF_TEXT and 96 characters they make 128 tokens.
# fmt: off
MERGES = [
    "Ġ t", "h e", "Ġt he", "i n", "e r", "a n", "o n", "e n", "Ġ a", "Ġ s", "r e", "o r", "Ġ w", "Ġ o", "Ġo f", "e s",
    "a t", "e d", "i s", "i t", "a r", "Ġ an", "Ġan d", "in g", "Ġ in", "a l", "Ġ c", "Ġ f", "o u", "Ġt o", "i on",
]
# fmt: on


def tiny_config(**overrides: Any) -> ModelConfig:
    """A model of 2 layers, 4 heads, 48 memories a layer: OLMo 1 in everything but size. `overrides` are its keys."""
    settings: dict[str, Any] = {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 2,
        "mlp_hidden_size": 96,
        "rope": True,
        "attention_dropout": 0.0,
        "residual_dropout": 0.0,
        "embedding_dropout": 0.0,
        "layer_norm_with_affine": False,
        "attention_layer_norm_with_affine": False,
        "include_bias": False,
        "max_sequence_length": 64,
        "vocab_size": 128,
        "embedding_size": 128,
        "weight_tying": True,
        "eos_token_id": 0,
        "pad_token_id": 1,
        "init_fn": "mitchell",
    }
    return ModelConfig(**{**settings, **overrides})


def tiny_olmo2_config(**overrides: Any) -> ModelConfig:
    """The same in the style of OLMo 2: RMS norms after attention and feed-forward, norms of queries and keys."""
    settings: dict[str, Any] = {
        "norm_after": True,
        "layer_norm_type": "rms",
        "layer_norm_with_affine": True,
        "attention_layer_norm": True,
        "attention_layer_norm_with_affine": True,
        "weight_tying": False,
    }
    return tiny_config(**{**settings, **overrides})


def to_transformers(model: OLMo) -> transformers.PreTrainedModel:
    """transformers' OlmoForCausalLM (or Olmo2ForCausalLM where `norm_after`) with exactly these weights, float32.

    ValueError where transformers has no such model.
    """
    config = model.config
    second = config.norm_after
    if second:
        fits = config.layer_norm_type == "rms" and config.attention_layer_norm and not config.clip_qkv
        fits = fits and config.layer_norm_with_affine and config.attention_layer_norm_with_affine
    else:
        fits = config.layer_norm_type == "default" and not config.attention_layer_norm
        fits = fits and not config.layer_norm_with_affine and config.layer_norm_eps == 1e-5
    if (
        not fits
        or not config.rope
        or config.include_bias
        or config.scale_logits
        or config.embedding_layer_norm
        or config.activation_type != "swiglu"
    ):
        raise ValueError("transformers has no model of this shape")
    shape: dict[str, Any] = {
        "vocab_size": config.embedding_size or config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.inner_size,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.effective_n_kv_heads,
        "max_position_embeddings": config.max_sequence_length,
        "rope_parameters": {"rope_type": "default", "rope_theta": float(config.rope_theta)},
        "tie_word_embeddings": config.weight_tying,
        "attention_bias": False,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
    }
    theirs: transformers.PreTrainedModel
    if second:
        theirs = transformers.Olmo2ForCausalLM(transformers.Olmo2Config(**shape, rms_norm_eps=config.layer_norm_eps))
    else:
        theirs = transformers.OlmoForCausalLM(transformers.OlmoConfig(**shape, clip_qkv=config.clip_qkv))

    ours = {name.removeprefix("transformer."): t.detach().float() for name, t in model.state_dict().items()}
    kv_rows = config.effective_n_kv_heads * (config.d_model // config.n_heads)
    state = {"model.embed_tokens.weight": ours["wte.weight"]}
    state["lm_head.weight"] = ours["wte.weight" if config.weight_tying else "ff_out.weight"]
    if second:
        state["model.norm.weight"] = ours["ln_f.weight"]
    for layer in range(config.n_layers):
        a, b = f"model.layers.{layer}.", f"blocks.{layer}."
        q, k, v = ours[b + "att_proj.weight"].split([config.d_model, kv_rows, kv_rows])
        up, gate = ours[b + "ff_proj.weight"].split(config.inner_size)
        state |= {a + "self_attn.q_proj.weight": q, a + "self_attn.k_proj.weight": k, a + "self_attn.v_proj.weight": v}
        state |= {a + "mlp.up_proj.weight": up, a + "mlp.gate_proj.weight": gate}
        state[a + "self_attn.o_proj.weight"] = ours[b + "attn_out.weight"]
        state[a + "mlp.down_proj.weight"] = ours[b + "ff_out.weight"]
        if second:
            state[a + "self_attn.q_norm.weight"] = ours[b + "q_norm.weight"]
            state[a + "self_attn.k_norm.weight"] = ours[b + "k_norm.weight"]
            state[a + "post_attention_layernorm.weight"] = ours[b + "attn_norm.weight"]
            state[a + "post_feedforward_layernorm.weight"] = ours[b + "ff_norm.weight"]
    theirs.load_state_dict(state)  # strict: every parameter of theirs is filled, and none of ours is left over
    return theirs.float().eval()


def scatter_(model: OLMo, seed: int = 0) -> OLMo:
    """Move every norm weight and every bias off its initial one or zero, so that a test sees whether it is used."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def tiny_tokenizer(path: str | Path) -> Path:
    """Write a byte-level BPE tokenizer of 128 tokens as tokenizer.json; id 0 is END_OF_TEXT. Returns the path.

    It knows printable ASCII and the newline; other characters vanish.
    """
    characters = ["Ċ", "Ġ", *(chr(code) for code in range(33, 127))]
    tokens = [END_OF_TEXT, *characters, *(merge.replace(" ", "") for merge in MERGES)]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [tuple(merge.split(" ")) for merge in MERGES]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_TEXT])
    path = Path(path)
    tokenizer.save(str(path))
    return path


def entropy_by_definition(average: Tensor) -> list[float]:
    """Method section 1, term by term."""
    result = []
    for layer in average.double().tolist():
        total = sum(layer)
        result.append(-sum(c / total * math.log(c / total) for c in layer if c > 0))
    return result


def by_layer(table: Tensor) -> dict[int, Tensor]:
    """A table (L, M) as the program has it: one tensor for each layer."""
    return dict(enumerate(table))


def table_of(layers: dict[int, Tensor]) -> Tensor:
    """Of layers that are alike, (L, M)."""
    return torch.stack(list(layers.values()))
