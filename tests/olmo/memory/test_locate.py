"""Coefficients of every architecture against the formula, and what is refused.

The reference uses nothing of ours: the model in float64, each instance alone and without padding, a hook of its own
at a module whose name is written down here, and the formula of method section 1. Ours is the model in float32, in
batches with padding.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from olmo.memory import CoefficientAverages, instance_means, layer_entropy, observe
from olmo.memory.locate import describe, find_memories
from olmo.model import OLMo
from tests.reference import scatter_, tiny_config

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


def observed(model: nn.Module, variant: str, batch_size: int) -> Tensor:
    rows, means = ragged(), []
    with observe(model, variant) as observation:
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            lengths = torch.tensor([len(row) for row in batch])
            ids = nn.utils.rnn.pad_sequence(batch, batch_first=True, padding_value=1)
            mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
            means.append(instance_means(model, observation, ids, None if mask.all() else mask))
    return torch.cat(means)


@pytest.mark.parametrize("variant", ["abs", "relu"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_coefficients_and_entropy_are_the_formulas(name: str, variant: str) -> None:
    model = built(name)
    if (name, variant) == ("GPT-OSS", "relu"):
        with pytest.raises(ValueError, match=r"^model\.layers\.0\.mlp\.experts\.down_proj: cannot tell gate and up"):
            observed(model, variant, 3)
        return
    wanted = reference(name, model, variant)
    for batch_size in (1, 3):
        found = observed(model, variant, batch_size)
        assert found.dtype == torch.float32 and found.shape == wanted.shape
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-6 * float(wanted.max()))
        averages = CoefficientAverages(*found.shape[1:])
        averages.add(found, np.arange(len(found)))
        average = wanted.mean(0)
        p = average / average.sum(1, keepdim=True)
        entropy = -torch.xlogy(p, p).sum(1)
        np.testing.assert_allclose(averages.average, average, rtol=1e-4, atol=1e-6 * float(average.max()))
        np.testing.assert_allclose(layer_entropy(averages.average), entropy, rtol=0, atol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("name", ["OLMoE", "Qwen2-MoE"])
def test_every_implementation_of_experts_has_the_same_coefficients(name: str, implementation: str) -> None:
    model = built(name)
    model.set_experts_implementation(implementation)
    wanted = reference(name, model, "abs")
    torch.testing.assert_close(observed(model, "abs", 3).double(), wanted, rtol=1e-4, atol=1e-6 * float(wanted.max()))


def test_coefficients_of_a_mixture_in_bfloat16_are_reduced_in_float32() -> None:
    model = built("Qwen2-MoE", moe_intermediate_size=16, shared_expert_intermediate_size=24)
    wanted = reference("Qwen2-MoE", model, "abs")
    found = observed(model.bfloat16(), "abs", 3)
    assert found.dtype == torch.float32
    # A token near the border between two experts may go to the other one.
    assert (found - wanted).abs().mean() < 0.1 * wanted.mean()


# --- what is found -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Llama", "LlamaForCausalLM, 2 layers; each has in model.layers.*.mlp.down_proj: 48 memories (gated)"),
        ("GPT-2", "GPT2LMHeadModel, 2 layers; each has in transformer.h.*.mlp.c_proj: 80 memories (plain)"),
        (
            "Qwen2-MoE",
            "Qwen2MoeForCausalLM, 2 layers; each has in model.layers.*.mlp.experts.down_proj: 60 memories (5 experts "
            "of 12, gated), and shared in model.layers.*.mlp.shared_expert.down_proj: 20 memories (gated)",
        ),
    ],
)
def test_it_says_what_it_found(name: str, said: str) -> None:
    assert describe(built(name)) == said


def test_it_says_what_it_found_in_ours() -> None:
    assert (
        describe(OLMo(tiny_config())) == "OLMo, 2 layers; each has in transformer.blocks.*.ff_out: 48 memories (gated)"
    )


def test_layers_of_what_sees_images_are_not_those_of_the_language_model() -> None:
    vision = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 5,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    config = transformers.Gemma3Config(text_config={**SMALL, **HEADS}, vision_config=vision, mm_tokens_per_image=4)
    torch.manual_seed(0)
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    names = [part.name for [part] in find_memories(model)]
    assert names == [f"model.language_model.layers.{layer}.mlp.down_proj" for layer in range(LAYERS)]
    assert observed(model, "abs", 3).shape == (len(LENGTHS), LAYERS, 48)


def test_looking_for_shared_experts_leaves_no_trace() -> None:
    model = built("Qwen2-MoE")
    torch.manual_seed(1)
    wanted = torch.rand(1)
    torch.manual_seed(1)
    find_memories(model)
    assert torch.equal(torch.rand(1), wanted)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


# --- what is refused ---------------------------------------------------------------------------------------------


class Handmade(nn.Module):
    """A causal model of one's own, of some layers."""

    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.embedding = nn.Embedding(128, 8)
        self.layers = nn.ModuleList(layers)

    @property
    def base_model(self) -> Handmade:
        return self

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding

    def forward(self, input_ids: Tensor, **_: Any) -> Tensor:
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = x + layer(x)
        return x


class Layer(nn.ModuleDict):
    """Linear maps by name; w1 and w3 are gate and up, w2 comes last."""

    def __init__(self, **shapes: tuple[int, int]):
        super().__init__({name: nn.Linear(*shape) for name, shape in shapes.items()})

    def forward(self, x: Tensor) -> Tensor:
        return self["w2"](F.silu(self["w1"](x)) * self["w3"](x))


class Interleaved(Layer):
    def forward(self, x: Tensor) -> Tensor:
        both = self["w1"](x)
        return self["w2"](F.silu(both[..., ::2]) * both[..., 1::2])


def test_names_do_not_matter() -> None:
    torch.manual_seed(0)
    model = Handmade(Layer(w1=(8, 12), w3=(8, 12), w2=(12, 8)))
    row = torch.arange(2, 9)
    x = model.embedding(row).detach()
    layer: Any = model.layers[0]
    gate, up = layer["w1"](x), layer["w3"](x)
    for variant, wanted in (("abs", (F.silu(gate) * up).abs()), ("relu", rectified(gate, up))):
        with observe(model, variant) as observation:
            found = instance_means(model, observation, row[None])
        torch.testing.assert_close(found[0, 0], wanted.mean(0), rtol=1e-5, atol=1e-7)


def test_halves_that_alternate_have_no_relu() -> None:
    torch.manual_seed(0)
    model = Handmade(Interleaved(w1=(8, 24), w2=(12, 8)))
    ids = torch.arange(2, 9)[None]
    with observe(model, "abs") as observation:
        assert instance_means(model, observation, ids).shape == (1, 1, 12)
    with (
        pytest.raises(ValueError, match=r"^layers\.0\.w2: cannot tell gate and up projection"),
        observe(model, "relu") as observation,
    ):
        instance_means(model, observation, ids)


def refusal(model: nn.Module) -> str:
    with pytest.raises(ValueError) as caught:
        find_memories(model)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_layer_with_two_candidates_is_refused_with_both() -> None:
    said = refusal(Handmade(Layer(w1=(8, 12), w2=(12, 8), v1=(8, 20), v2=(20, 8))))
    assert said == (
        "Handmade: layers.0: cannot tell the memory projection, the one linear map to the width 8 from another, among: "
        "w1 8->12, w2 12->8, v1 8->20, v2 20->8"
    )


def test_as_many_memories_as_the_width_are_refused() -> None:
    said = refusal(built("Llama", intermediate_size=32))
    assert said.startswith(
        "LlamaForCausalLM: model.layers.0: cannot tell the memory projection, the one linear map to "
    )
    assert said.endswith("among: mlp.gate_proj 32->32, mlp.up_proj 32->32, mlp.down_proj 32->32")


def test_a_map_that_belongs_to_no_feed_forward_layer_is_refused() -> None:
    said = refusal(Handmade(Layer(w1=(8, 12), w2=(12, 8), adapter=(8, 3))))
    assert said == (
        "Handmade: layers.0: the linear maps make up no feed-forward layer with 12 memories in w2: "
        "w1 8->12, w2 12->8, adapter 8->3"
    )


def test_layers_that_differ_are_refused() -> None:
    said = refusal(Handmade(Layer(w1=(8, 12), w2=(12, 8)), Layer(w1=(8, 20), w2=(20, 8))))
    assert said == (
        "Handmade: layers.0 has 12 memories (plain), layers.1 has 20 memories (plain); only models whose layers are "
        "all alike can be measured"
    )
    said = refusal(built("DeepSeek-V3", first_k_dense_replace=1))
    assert "layers.0 has 48 memories (gated), model.layers.1 has 60 memories (5 experts of 12, gated) and 24" in said


def test_a_model_without_layers_or_with_two_lists_is_refused() -> None:
    assert refusal(nn.Linear(2, 2)) == "Linear: no list of layers, cannot tell its feed-forward memories"
    model = Handmade(Layer(w1=(8, 12), w2=(12, 8)))
    model.others = nn.ModuleList([nn.Linear(2, 2)])
    assert refusal(model) == "Handmade: cannot tell which list is that of its layers: layers, others"


def test_a_state_space_mixer_is_no_memory() -> None:
    config = transformers.MambaConfig(vocab_size=128, hidden_size=32, num_hidden_layers=LAYERS)
    assert refusal(transformers.MambaForCausalLM(config)).startswith(
        "MambaForCausalLM: backbone.layers.0: cannot tell what mixer.conv1d computes"
    )


def test_experts_outside_the_interface_of_transformers_are_refused() -> None:
    layer = Layer()
    layer["experts"] = nn.Module()
    layer["experts"].down_proj = nn.Parameter(torch.zeros(3, 8, 12))
    assert refusal(Handmade(layer)) == (
        "Handmade: layers.0: cannot tell what experts computes; experts are known as transformers 5 holds them, in one "
        "module with its experts interface (use_experts_implementation)"
    )
    experts = nn.ModuleList([Layer(w1=(8, 12), w3=(8, 12), w2=(12, 8)) for _ in range(3)])  # as transformers 4 has them
    layer = Layer()
    layer["experts"] = experts
    said = refusal(Handmade(layer, layer))
    assert said.startswith("Handmade: layers.0: cannot tell the memory projection") and said.endswith("... (9 in all)")


def test_a_matrix_that_is_no_linear_map_is_refused() -> None:
    layer = Layer(w1=(8, 12), w2=(12, 8))
    layer["mixer"] = nn.Module()
    layer["mixer"].A = nn.Parameter(torch.zeros(3, 5))
    assert refusal(Handmade(layer)) == (
        "Handmade: layers.0: cannot tell what mixer.A (3, 5) does, which is no linear map"
    )


def test_a_shared_expert_that_is_not_just_added_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = built("Qwen2-MoE")
    block = type(model.model.layers[0].mlp)
    real = block.forward
    monkeypatch.setattr(block, "forward", lambda self, x: 0.5 * real(self, x))
    assert refusal(model) == (
        "Qwen2MoeForCausalLM: model.layers.0: cannot place the shared expert mlp.shared_expert: what it writes is not "
        "just added to what the routed experts write, nor that times a sigmoid"
    )


def test_experts_whose_outputs_are_normalized_are_refused() -> None:
    model = built("OLMoE")
    model.model.layers[0].mlp.experts.has_post_expert_norm = True
    assert refusal(model) == (
        "OlmoeForCausalLM: model.layers.0.mlp.experts: each expert's output is normalized, so its memories "
        "add to no sum"
    )


def test_our_own_model_is_found_by_name() -> None:
    model = scatter_(OLMo(tiny_config()))
    for number, [part] in enumerate(find_memories(model)):
        block = model.blocks[number]
        assert part.name == f"transformer.blocks.{number}.ff_out" and part.down is block.ff_out
        assert part.into == (block.ff_proj,) and part.count == 48 and part.gated
