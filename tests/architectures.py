"""Tiny models of every architecture, and their memory coefficients by the formula.

The reference uses nothing of ours: the model in float64, each instance alone and without padding, a hook of its own
at a module whose name is written down here, and the formula of method section 1. Ours is the model in float32, in
batches with padding.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from olmo.memory import instance_means, observe

LENGTHS = (9, 4, 1, 13, 13)
LAYERS = 2
Place = tuple[nn.Module, Callable[[Tensor, str], Tensor]]  # a module, and the coefficients (T, M) from its input (T, D)

# --- the formulas, and where their input is heard ----------------------------------------------------------------


def rectified(gate: Tensor, up: Tensor) -> Tensor:
    return (gate.clamp(min=0) * up).clamp(min=0)


def plain(path: str) -> Callable[[nn.Module, int], Place]:
    """Heard at the second projection itself."""

    def at(model: nn.Module, layer: int) -> Place:
        down = model.get_submodule(path.format(layer))
        return down, lambda x, variant: x.abs() if variant == "abs" else x.clamp(min=0)

    return at


def gated(path: str, act: Callable[[Tensor], Tensor] = F.silu) -> Callable[[nn.Module, int], Place]:
    """Heard in front of the feed-forward layer."""

    def at(model: nn.Module, layer: int) -> Place:
        mlp: Any = model.get_submodule(path.format(layer))

        def formula(x: Tensor, variant: str) -> Tensor:
            gate, up = mlp.gate_proj(x), mlp.up_proj(x)
            return (act(gate) * up).abs() if variant == "abs" else rectified(gate, up)

        return mlp, formula

    return at


def fused(path: str) -> Callable[[nn.Module, int], Place]:
    """Phi-3: the gate in front."""

    def at(model: nn.Module, layer: int) -> Place:
        mlp: Any = model.get_submodule(path.format(layer))

        def formula(x: Tensor, variant: str) -> Tensor:
            gate, up = mlp.gate_up_proj(x)[..., :48], mlp.gate_up_proj(x)[..., 48:]
            return (F.silu(gate) * up).abs() if variant == "abs" else rectified(gate, up)

        return mlp, formula

    return at


def mixture(path: str, router: str = "gate", shared: str = "") -> Callable[[nn.Module, int], Place]:
    """All experts' memories in a row, token by token, then the shared expert's."""

    def at(model: nn.Module, layer: int) -> Place:
        mlp: Any = model.get_submodule(path.format(layer))

        def formula(x: Tensor, variant: str) -> Tensor:
            experts = mlp.experts
            number, _, each = experts.down_proj.shape
            _, weights, chosen = getattr(mlp, router)(x)
            signed, positive = x.new_zeros(len(x), number, each), x.new_zeros(len(x), number, each)
            for token, (row, own) in enumerate(zip(chosen.tolist(), weights)):
                for expert, weight in zip(row, own):
                    gate, up = (experts.gate_up_proj[expert] @ x[token]).split(each)
                    signed[token, expert] = weight * F.silu(gate) * up
                    positive[token, expert] = weight * rectified(gate, up)
            written = torch.einsum("tem,edm->td", signed, experts.down_proj)
            signed, positive = signed.flatten(1), positive.flatten(1)
            if shared:
                expert = getattr(mlp, shared)
                gate, up = expert.gate_proj(x), expert.up_proj(x)
                weight = mlp.shared_expert_gate(x).sigmoid() if hasattr(mlp, "shared_expert_gate") else 1.0
                beside = weight * F.silu(gate) * up
                written = written + beside @ expert.down_proj.weight.T
                signed = torch.cat((signed, beside), 1)
                positive = torch.cat((positive, weight * rectified(gate, up)), 1)
            # The memory reading: the layer writes the memory vectors, each times its coefficient.
            torch.testing.assert_close(mlp.forward(x[None])[0], written, rtol=1e-5, atol=1e-9)
            return signed.abs() if variant == "abs" else positive

        return mlp, formula

    return at


def gpt_oss(model: nn.Module, layer: int) -> Place:
    """Its gates and ups alternate, biases everywhere, and the up is one larger."""
    mlp: Any = model.get_submodule(f"model.layers.{layer}.mlp")

    def formula(x: Tensor, variant: str) -> Tensor:
        experts = mlp.experts
        _, weights, chosen = mlp.router(x)
        signed = x.new_zeros(len(x), *experts.down_proj.shape[:2])
        for token, (row, own) in enumerate(zip(chosen.tolist(), weights)):
            for expert, weight in zip(row, own):
                both = x[token] @ experts.gate_up_proj[expert] + experts.gate_up_proj_bias[expert]
                gate, up = both[::2].clamp(max=7.0), both[1::2].clamp(-7.0, 7.0)
                signed[token, expert] = weight * (up + 1) * gate * torch.sigmoid(1.702 * gate)
        return signed.flatten(1).abs()

    return mlp, formula


def tanh_gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


SMALL: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 1,
}
HEADS = {"head_dim": 8}
EXPERTS = {"num_experts": 5, "num_local_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
FALCON = {**{k: v for k, v in SMALL.items() if k != "num_key_value_heads"}, "ffn_hidden_size": 80}
MLP = "model.layers.{}.mlp"
DEEPSEEK = {
    "first_k_dense_replace": 0,
    "n_routed_experts": 5,
    "n_shared_experts": 2,
    "n_group": 1,
    "topk_group": 1,
    "num_key_value_heads": 4,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
# name -> class, configuration, where and how the coefficients are had
ARCHITECTURES: dict[str, tuple[str, dict[str, Any], Callable[[nn.Module, int], Place]]] = {
    "OLMo": ("Olmo", SMALL, gated(MLP)),
    "OLMo 2": ("Olmo2", SMALL, gated(MLP)),
    "OLMo 3": ("Olmo3", SMALL, gated(MLP)),
    "Llama": ("Llama", SMALL, gated(MLP)),
    "Llama, fewer memories than the width": ("Llama", {**SMALL, "intermediate_size": 16}, gated(MLP)),
    "Mistral": ("Mistral", SMALL, gated(MLP)),
    "Qwen2": ("Qwen2", SMALL, gated(MLP)),
    "Qwen3": ("Qwen3", {**SMALL, **HEADS}, gated(MLP)),
    "Gemma": ("Gemma", {**SMALL, **HEADS}, gated(MLP, tanh_gelu)),
    "Gemma 2": ("Gemma2", {**SMALL, **HEADS}, gated(MLP, tanh_gelu)),
    "Gemma 3": ("Gemma3", {**SMALL, **HEADS}, gated(MLP, tanh_gelu)),
    "Phi": ("Phi", SMALL, plain("model.layers.{}.mlp.fc2")),
    "Phi-3": ("Phi3", SMALL, fused(MLP)),
    "Pythia": ("GPTNeoX", SMALL, plain("gpt_neox.layers.{}.mlp.dense_4h_to_h")),
    "GPT-NeoX, not parallel": (
        "GPTNeoX",
        {**SMALL, "use_parallel_residual": False},
        plain("gpt_neox.layers.{}.mlp.dense_4h_to_h"),
    ),
    "GPT-2": ("GPT2", {**SMALL, "n_inner": 80}, plain("transformer.h.{}.mlp.c_proj")),
    "OPT": ("OPT", {**SMALL, "ffn_dim": 80, "word_embed_proj_dim": 32}, plain("model.decoder.layers.{}.fc2")),
    "OPT, narrow embeddings": (
        "OPT",
        {**SMALL, "ffn_dim": 80, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
        plain("model.decoder.layers.{}.fc2"),
    ),
    "Falcon": (
        "Falcon",
        {**FALCON, "parallel_attn": False, "multi_query": False, "alibi": True},
        plain("transformer.h.{}.mlp.dense_4h_to_h"),
    ),
    "Falcon, parallel": ("Falcon", {**FALCON, "parallel_attn": True}, plain("transformer.h.{}.mlp.dense_4h_to_h")),
    "Falcon, new decoder": (
        "Falcon",
        {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2},
        plain("transformer.h.{}.mlp.dense_4h_to_h"),
    ),
    "OLMoE": ("Olmoe", {**SMALL, **EXPERTS}, mixture(MLP)),
    "Mixtral": ("Mixtral", {**SMALL, **EXPERTS}, mixture(MLP)),
    "Phi-3.5-MoE": ("Phimoe", {**SMALL, **EXPERTS}, mixture(MLP, "router")),
    "Qwen2-MoE": (
        "Qwen2Moe",
        {**SMALL, **EXPERTS, "shared_expert_intermediate_size": 20},
        mixture(MLP, shared="shared_expert"),
    ),
    "Qwen3-MoE": ("Qwen3Moe", {**SMALL, **HEADS, **EXPERTS, "norm_topk_prob": True}, mixture(MLP)),
    "DeepSeek-V3": ("DeepseekV3", {**SMALL, **EXPERTS, **DEEPSEEK}, mixture(MLP, shared="shared_experts")),
    "GPT-OSS": ("GptOss", {**SMALL, **HEADS, **EXPERTS}, gpt_oss),
}


def built(name: str, **overrides: Any) -> transformers.PreTrainedModel:
    kind, shape, _ = ARCHITECTURES[name]
    cls = getattr(transformers, f"{kind}ForCausalLM", None) or getattr(transformers, f"{kind}LMHeadModel", None)
    if cls is None:
        pytest.skip(f"this transformers has no {kind}; a version that has it would run this test")
    torch.manual_seed(0)
    prefix = "Gemma3Text" if kind == "Gemma3" else kind
    model = cls(getattr(transformers, f"{prefix}Config")(**{**shape, **overrides})).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # so that all memories matter and differ, biases and norms too
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def ragged() -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(2, 128, (n,), generator=generator) for n in LENGTHS]


@torch.no_grad()
def reference(name: str, model: nn.Module, variant: str) -> Tensor:
    """1/T_n sum_j C[n, j, i], float64 (N, L, M)."""
    model = copy.deepcopy(model).double()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the others know no float64
    places = [ARCHITECTURES[name][2](model, layer) for layer in range(LAYERS)]
    heard: dict[int, Tensor] = {}
    for layer, (module, _) in enumerate(places):

        def hook(module: nn.Module, args: tuple[Tensor, ...], layer: int = layer) -> None:
            heard.setdefault(layer, args[0].reshape(-1, args[0].shape[-1]))

        module.register_forward_pre_hook(hook)
    means = []
    for row in ragged():
        heard.clear()
        model(row[None])
        means.append(torch.stack([formula(heard[layer], variant).mean(0) for layer, (_, formula) in enumerate(places)]))
    assert means[0].dtype == torch.float64
    return torch.stack(means)


def observed(model: Any, variant: str, batch_size: int) -> Tensor:
    rows, means = ragged(), []
    # Wrappers of one's own have no `device`, and weights that accelerate offloads are on none.
    device = next((weight.device for weight in model.parameters() if not weight.is_meta), torch.device("cpu"))
    with observe(model, variant) as observation:
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            lengths = torch.tensor([len(row) for row in batch])
            ids = nn.utils.rnn.pad_sequence(batch, batch_first=True, padding_value=1)
            mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
            ids, mask = ids.to(device), None if mask.all() else mask.to(device)
            means.append(torch.stack(instance_means(model, observation, ids, mask), 1).cpu())
    return torch.cat(means)
