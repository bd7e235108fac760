"""Tiny models of every family that transformers knows as a causal language model, with random weights."""

from __future__ import annotations

import copy
import inspect
import re
from collections import Counter
from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from olmo.memory import instance_means, observe
from olmo.memory.locate import describe, find_layers

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
    "linear_num_heads swa_num_key_value_heads kv_n_heads rotary_dim patch_size adapter_rank",
    2: "zero_expert_num num_experts_per_tok num_experts_per_token moe_topk moe_k moe_top_k linear_num_key_heads",
    1: "n_group topk_group num_expert_group first_k_dense_replace mamba_n_groups n_groups",
    8: "head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim linear_key_head_dim linear_value_head_dim "
    "index_head_dim swa_head_dim attention_head_size d_head dim_head linear_head_dim "
    "o_lora_rank",
    16: "router_hidden_size shape_embed_dim pronunciation_embed_dim "
    "mamba_d_head mamba_head_dim qk_head_dim mamba_d_state ssm_state_size state_size chunk_size mamba_chunk_size",
    64: "max_position_embeddings n_positions max_seq_len context_length max_target_positions",
    VOCABULARY: "encoder_hash_byte_group_vocab shape_vocab_size pronunciation_vocab_size "
    "vocab_size vocab_size_per_layer_input unpadded_vocab_size decoder_vocab_size",
}
SMALL = {name: size for size, names in SIZES.items() for name in names.split()}
# Settings of a family that are no such number, or another one.
LINEAR = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
CONV = {"layer_types": ["conv", "full_attention", "conv"]}
ZAMBA = {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2}
NO_PER_LAYER_INPUT = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
SPARSE = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8}
DOTS3 = {"per_layer_config": {}, "head_dim": 16}
OWN: dict[str, dict[str, Any]] = {
    "bailing_hybrid": LINEAR,
    "bamba": {"attn_layer_indices": [1]},
    "beam": {"first_k_dense_replace": 1},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "cohere2_moe": {"num_shared_experts": 1},
    "deepseek_v2": {"num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "dots1": {"n_routed_experts": 5, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note": {"vision_config": {"per_layer_config": {}}, "text_config": DOTS3},
    "dots3_note_text": DOTS3,
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {"intermediate_size": 48, "num_kv_shared_layers": 0},
    "gemma4": {"text_config": NO_PER_LAYER_INPUT},
    # Its default is refused by its own checks, so the class of its text has to be named.
    "gemma4_assistant": {"text_config": {"model_type": "gemma4_text", **NO_PER_LAYER_INPUT}},
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
    for name, value in own.items():
        if isinstance(value, dict) and "model_type" in value:
            rest = {key: setting for key, setting in value.items() if key != "model_type"}
            settings[name] = shrunk(CONFIG_MAPPING[value["model_type"]], rest)
        elif not isinstance(value, dict) or name not in settings:
            settings[name] = value
    return cls(**settings)


def unshrunk(settings: dict[str, Any]) -> dict[str, int]:
    """Sizes of a configuration that are those of a real model, of which one alone can fill a machine's memory."""
    inner = [found for value in settings.values() if isinstance(value, dict) for found in unshrunk(value).items()]
    sizes = ("hidden_size", "vocab_size", "intermediate_size")
    own = {name: value for name, value in settings.items() if isinstance(value, int) and str(name).endswith(sizes)}
    return dict(inner) | {name: value for name, value in own.items() if value > 4096}


def names() -> list[str]:
    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def built(family: str) -> transformers.PreTrainedModel:
    """A tiny model of a family in evaluation mode, whose weights, biases and norms included, are all random."""
    torch.manual_seed(0)
    config = shrunk(CONFIG_MAPPING[family], OWN.get(family, {}))
    if sizes := unshrunk(config.to_dict()):
        raise ValueError(f"{family}: sizes of a real model: {sizes}")
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


# --- measured, and by direct hooks -------------------------------------------------------------------------------

LENGTHS = (7, 4)
# What modules and parameters are called whose input is the coefficients, unless they are in an attention or a router.
SECOND = re.compile(
    r"\.(down_proj|proj_down|fc2|fc_out|c_proj|dense_4h_to_h|w2|w_out|Wo|output_linear|layer_2|ffn\.2|output\.dense|"
    r"feed_forward\.output)$"
)
ELSEWHERE = re.compile(r"att|\.gate\.|router")
# The attribute of a block that all models of a family multiply the output of routed experts by, and nothing else.
SCALES = {"minimax_m3_vl_text": "routed_scaling_factor"}


def rows() -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(4, VOCABULARY - 4, (length,), generator=generator) for length in LENGTHS]


def measured(model: nn.Module) -> dict[str, Tensor]:
    """By name of a part, means over the tokens of each instance, float32 (B, M): one batch with padding."""
    ids = nn.utils.rnn.pad_sequence(rows(), batch_first=True, padding_value=1)
    mask = (torch.arange(ids.shape[1]) < torch.tensor(LENGTHS)[:, None]).long()
    with observe(model) as observation:
        for _ in range(2):  # the first pass is complete, later ones end at the last coefficient
            instance_means(model, observation, ids, mask)
        return {name: means for name, means in zip(observation.names, observation.of_parts) if means is not None}


@torch.no_grad()
def by_hooks(model: nn.Module, dtype: torch.dtype, places: Iterable[str], scale: str | None) -> dict[str, Tensor]:
    """The same from the inputs of the named second projections, in a model of another type: each instance alone,
    without padding.

    The coefficients of experts are what their module writes once its second projections only copy: those of memory m of
    expert e to the place e M + m, as many places at a time as the model is wide.
    """
    model = copy.deepcopy(model).to(dtype)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the others know no float64
    means: dict[str, list[Tensor]] = {name: [] for name in places}
    for name in places:
        parent = model.get_submodule(name.rpartition(".")[0])
        block = model.get_submodule(name.rpartition(".")[0].rpartition(".")[0])
        if isinstance(dict(parent.named_parameters(recurse=False)).get("down_proj"), Tensor):
            factor = getattr(block, scale) if scale else 1.0
            parent.register_forward_hook(partial(_copies, means[name], factor), with_kwargs=True)
            continue
        entered: list[Tensor] = []
        gate = getattr(block, "shared_expert_gate", None)  # of Qwen's shared experts, whose sigmoid weighs them
        if gate is not None:
            parent.register_forward_pre_hook(partial(_keep, entered))
        model.get_submodule(name).register_forward_pre_hook(partial(_input, means[name], entered, gate))
    for row in rows():
        model(input_ids=row[None], use_cache=False)
    return {name: torch.stack(of_instances).double() for name, of_instances in means.items()}


def _keep(entered: list[Tensor], module: nn.Module, args: tuple[Tensor, ...]) -> None:
    entered[:] = args[:1]


def _input(means: list[Tensor], entered: list[Tensor], gate: Any, module: nn.Module, args: tuple[Tensor, ...]) -> None:
    weight = gate(entered[0]).sigmoid() if gate is not None else 1.0
    means.append((weight * args[0]).abs().flatten(0, -2).mean(0))


def _copies(means: list[Tensor], factor: float, module: Any, args: Any, keywords: Any, output: Tensor) -> None:
    hidden = args[0] if args else keywords["hidden_states"]
    width, before = hidden.shape[-1], {name: own.clone() for name, own in module.named_parameters()}
    down = before["down_proj"]
    transposed = down.shape[-1] == width
    experts, count = len(down), down.shape[1 if transposed else 2]
    found = []
    for start in range(0, experts * count, width):
        copying = down.new_zeros(experts, width, count)
        for place in range(start, min(start + width, experts * count)):
            copying[place // count, place - start, place % count] = 1.0
        module.down_proj.copy_(copying.mT if transposed else copying)
        if "down_proj_bias" in before:
            module.down_proj_bias.zero_()
        found.append(type(module).forward(module, *args, **keywords).abs())
    for name, own in module.named_parameters():
        own.copy_(before[name])
    tokens = output.shape[0] // experts if len(args) + len(keywords) == 1 else output.shape[0]
    coefficients = torch.cat(found, -1)[:, : experts * count].view(-1, tokens, experts * count).sum(0)
    means.append(factor * coefficients.mean(0))


class Outcome(NamedTuple):
    """What became of a family: "measured", "refused", "not built" or "wrong", and why."""

    kind: str
    reason: str


def _not_built(error: Exception) -> Outcome:
    return Outcome("not built", f"{type(error).__name__}: {' '.join(str(error).split())[:160]}")


def outcome(family: str) -> Outcome:
    """Build a model of the family, measure it and compare. Errors that are no refusals are raised."""
    try:
        model = built(family)
    except Exception as error:  # transformers' own, of any kind
        return _not_built(error)
    try:
        layers, found = find_layers(model), measured(model)
    except Exception as refusal:
        try:
            with torch.no_grad():
                model(input_ids=rows()[0][None], use_cache=False)
        except Exception as error:
            return _not_built(error)
        if not isinstance(refusal, ValueError):
            raise
        return Outcome("refused", str(refusal))
    named = {
        name
        for name, module in (*model.named_modules(), *model.named_parameters())
        if any(name.startswith(f"{layer.name}.") for layer in layers)
        and SECOND.search(name)
        and not ELSEWHERE.search(name.lower())
        and (isinstance(module, nn.Linear | nn.Parameter) or type(module).__name__ == "Conv1D")
    }
    if named != found.keys():
        return Outcome("wrong", f"found {sorted(found.keys() - named)}, not {sorted(named - found.keys())}")
    try:
        wanted, note = by_hooks(model, torch.float64, found, SCALES.get(family)), ""
    except RuntimeError:  # some convert to float32 on the way
        wanted, note = by_hooks(model, torch.float32, found, SCALES.get(family)), " (by hooks in float32)"
    for name, means in found.items():
        close = torch.allclose(means.double(), wanted[name], rtol=1e-4, atol=1e-5 * float(wanted[name].max()))
        if means.shape != wanted[name].shape or not close:
            return Outcome("wrong", f"{name}: off by {(means - wanted[name]).abs().max() / wanted[name].max():.1e}")
    return Outcome("measured", describe(model) + note)


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    outcomes = {}
    for family in names():
        outcomes[family] = outcome(family)
        print(f"{family}: {': '.join(outcomes[family])}", flush=True)
    print(f"transformers {transformers.__version__}:", dict(Counter(kind for kind, _ in outcomes.values())))
