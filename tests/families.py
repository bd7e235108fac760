"""Tiny models of every family that transformers knows as a causal language model, with random weights."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 128
# What a setting of any configuration becomes if it has it as a number.
SIZES = {
    32: "hidden_size d_model n_embd emb_dim embedding_dim word_embed_proj_dim embedding_size input_embedding_size "
    "output_embedding_size lru_width backbone_hidden_size "
    "adapter_in_dim adapter_out_dim adapter_input_size",
    48: "intermediate_size ffn_dim d_ff decoder_ffn_dim encoder_ffn_dim dim_ff dff d_inner feed_forward_size "
    "dense_intermediate_size intermediate_size_mlp ffn_hidden_size",
    12: "moe_intermediate_size expert_ffn_hidden_size",
    20: "shared_expert_intermediate_size shared_intermediate_size moe_shared_expert_intermediate_size "
    "shared_experts_intermediate_size",
    3: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers "
    "num_encoder_layers num_blocks",
    5: "num_experts num_local_experts n_routed_experts moe_num_experts",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads attention_heads "
    "num_decoder_attention_heads num_encoder_attention_heads linear_num_value_heads mamba_num_heads mamba_n_heads "
    "swa_num_attention_heads index_n_heads q_lora_rank kv_lora_rank laurel_rank num_key_value_heads num_kv_heads "
    "swa_num_key_value_heads kv_n_heads rotary_dim patch_size",
    2: "num_experts_per_tok num_experts_per_token moe_topk moe_k moe_top_k linear_num_key_heads",
    1: "n_group topk_group num_expert_group first_k_dense_replace mamba_n_groups n_groups",
    8: "head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim linear_key_head_dim linear_value_head_dim "
    "index_head_dim swa_head_dim attention_head_size d_head dim_head",
    16: "mamba_d_head mamba_head_dim qk_head_dim mamba_d_state ssm_state_size state_size chunk_size mamba_chunk_size",
    64: "max_position_embeddings n_positions max_seq_len context_length max_target_positions",
    VOCABULARY: "vocab_size vocab_size_per_layer_input unpadded_vocab_size decoder_vocab_size",
}
SMALL = {name: size for size, names in SIZES.items() for name in names.split()}
# Settings of a family that are no such number, or another one.
LINEAR = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
CONV = {"layer_types": ["conv", "full_attention", "conv"]}
ZAMBA = {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2}
NO_PER_LAYER_INPUT = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
SPARSE = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8}
OWN: dict[str, dict[str, Any]] = {
    "bailing_hybrid": LINEAR,
    "bamba": {"attn_layer_indices": [1]},
    "beam": {"first_k_dense_replace": 1},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "cohere2_moe": {"num_shared_experts": 1},
    "deepseek_v2": {"num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "dots1": {"n_routed_experts": 5, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note": {"vision_config": {"per_layer_config": {}}},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma4": {"text_config": NO_PER_LAYER_INPUT},
    "gemma4_assistant": {"text_config": NO_PER_LAYER_INPUT},
    "gemma4_text": NO_PER_LAYER_INPUT,
    "gpt_neo": {"attention_types": [[["global", "local", "global"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba"]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": LINEAR,
    "lfm2": {**CONV, "block_auto_adjust_ff_dim": False},
    "lfm2_moe": {**CONV, "num_dense_layers": 1},
    "lfm3": CONV,
    "llama4": {"text_config": {"interleave_moe_layer_step": 2}},
    "llama4_text": {"interleave_moe_layer_step": 2},
    "mamba2": {"head_dim": 16},
    "mimo_v2_flash": {"num_key_value_heads": 2},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 4, "head_dim": 8},
    "nemotron_h": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"]},
    "qwen3_5": {"text_config": LINEAR},
    "qwen3_5_moe": {"text_config": LINEAR},
    "qwen3_5_moe_text": LINEAR,
    "qwen3_5_text": LINEAR,
    "qwen3_next": LINEAR,
    "qwen4_exp": {"text_config": {**LINEAR, **SPARSE, "indexer_compress_ratio": 2}},
    "qwen4_exp_text": {**LINEAR, **SPARSE, "indexer_compress_ratio": 2},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 8]},
    "rwkv": {"attention_hidden_size": 32},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8}},
    "xmod": {"default_language": "en_XX"},
    "zamba": ZAMBA,
    "zamba2": {**ZAMBA, "n_mamba_heads": 4},
    "zaya": {"num_experts_per_tok": 1},
}


def shrunk(cls: type[transformers.PretrainedConfig], own: dict[str, Any]) -> transformers.PretrainedConfig:
    """A tiny configuration of a class: every size that its own default has is small, and `own` settings on top."""
    try:
        default = cls()
    except Exception:
        default = None
    known = vars(default) if default is not None else inspect.signature(cls).parameters
    settings: dict[str, Any] = {}
    for name, value in dict(known).items():
        if isinstance(value, transformers.PretrainedConfig):
            settings[name] = shrunk(type(value), own.get(name, {}))
        elif name in SMALL and (default is None or (isinstance(value, int) and not isinstance(value, bool))):
            settings[name] = SMALL[name]
        elif name.endswith(("_token_id", "_token_index")) and isinstance(value, int) and value >= VOCABULARY:
            settings[name] = 3
    settings |= {name: value for name, value in own.items() if not isinstance(value, dict) or name not in settings}
    return cls(**settings)


def names() -> list[str]:
    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def built(family: str) -> transformers.PreTrainedModel:
    """A tiny model of a family in evaluation mode, whose weights, biases and norms included, are all random."""
    torch.manual_seed(0)
    config = shrunk(CONFIG_MAPPING[family], OWN.get(family, {}))
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model
