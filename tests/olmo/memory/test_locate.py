"""What is found in models of other architectures, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from olmo.memory import instance_means, observe
from olmo.memory.locate import describe, find_layers, find_memories
from olmo.model import OLMo
from tests.architectures import HEADS, LAYERS, LENGTHS, SMALL, built, observed, rectified
from tests.reference import scatter_, tiny_config

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


def test_layers_may_differ() -> None:
    model = built("DeepSeek-V3", num_hidden_layers=4, first_k_dense_replace=1)
    assert [(layer.name, layer.number, len(layer.parts)) for layer in find_layers(model)] == [
        ("model.layers.0", 0, 1),
        ("model.layers.1", 1, 2),
        ("model.layers.2", 2, 2),
        ("model.layers.3", 3, 2),
    ]
    assert describe(model) == (
        "DeepseekV3ForCausalLM, 4 layers; layer 0 in model.layers.*.mlp.down_proj: 48 memories (gated); layers 1 to 3 "
        "in model.layers.*.mlp.experts.down_proj: 60 memories (5 experts of 12, gated), and shared in "
        "model.layers.*.mlp.shared_experts.down_proj: 24 memories (gated)"
    )
    model = Handmade(*(Layer(w1=(8, count), w2=(count, 8)) for count in (12, 20, 20, 12)))
    assert describe(model) == (
        "Handmade, 4 layers; layers 0, 3 in layers.*.w2: 12 memories (plain); layers 1, 2 in layers.*.w2: 20 memories "
        "(plain)"
    )
    assert [layer.module for layer in find_layers(model)] == list(model.layers)


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


def test_a_model_that_names_no_decoder_is_searched_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in transformers 4.56."""
    model = built("Qwen2-MoE")
    expected = describe(model)
    monkeypatch.setattr(type(model), "get_decoder", lambda _: None)
    assert describe(model) == expected


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
        torch.testing.assert_close(found[0][0], wanted.mean(0), rtol=1e-5, atol=1e-7)


def test_halves_that_alternate_have_no_relu() -> None:
    torch.manual_seed(0)
    model = Handmade(Interleaved(w1=(8, 24), w2=(12, 8)))
    ids = torch.arange(2, 9)[None]
    with observe(model, "abs") as observation:
        assert [means.shape for means in instance_means(model, observation, ids)] == [(1, 12)]
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


def test_a_model_without_layers_or_with_two_lists_is_refused() -> None:
    assert refusal(nn.Linear(2, 2)) == "Linear: no list of layers, cannot tell its feed-forward memories"
    model = Handmade(Layer(w1=(8, 12), w2=(12, 8)))
    model.others = nn.ModuleList([nn.Linear(2, 2)])
    assert refusal(model) == "Handmade: cannot tell which list is that of its layers: layers, others"


def test_a_state_space_mixer_is_no_memory() -> None:
    config = transformers.MambaConfig(vocab_size=128, hidden_size=32, num_hidden_layers=LAYERS)
    assert refusal(transformers.MambaForCausalLM(config)) == (
        "MambaForCausalLM: none of its 2 layers (backbone.layers) has a feed-forward part"
    )


class Mixer(nn.Module):
    """A convolution over the tokens, between maps to and from it."""

    def __init__(self, inner: int):
        super().__init__()
        self.first, self.last = nn.Linear(8, 2 * inner), nn.Linear(inner, 8)
        self.conv1d = nn.Conv1d(inner, inner, 2, padding=1, groups=inner)

    def forward(self, x: Tensor) -> Tensor:
        first, gate = self.first(x).chunk(2, -1)
        return self.last(self.conv1d(first.mT)[..., : x.shape[1]].mT * gate)


class Both(nn.Module):
    """A mixer beside a feed-forward layer, or without one."""

    def __init__(self, mixer: nn.Module, mlp: nn.Module | None = None):
        super().__init__()
        self.token_mixer, self.mlp = mixer, mlp

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.token_mixer(x)
        return mixed if self.mlp is None else self.mlp(x + mixed)


def feed_forward() -> Layer:
    return Layer(w1=(8, 12), w3=(8, 12), w2=(12, 8))


def test_a_convolution_beside_a_feed_forward_layer_is_no_memory() -> None:
    torch.manual_seed(0)
    model = Handmade(Both(Mixer(8)), Both(Mixer(8), feed_forward()))
    assert describe(model) == (
        "Handmade, 2 layers; layer 1 in layers.*.mlp.w2: 12 memories (gated); no feed-forward memories in layer 0"
    )
    heard: list[Tensor] = []
    model.layers[1].mlp["w2"].register_forward_pre_hook(lambda _, args: heard.append(args[0]))  # type: ignore
    with observe(model) as observation:
        [found] = instance_means(model, observation, torch.arange(2, 9)[None])
    torch.testing.assert_close(found[0], heard[0][0].abs().mean(0))


def test_a_mixer_that_could_be_a_feed_forward_layer_is_refused() -> None:
    assert refusal(Handmade(Both(Mixer(12), feed_forward()))) == (
        "Handmade: layers.0: cannot tell whether token_mixer is a feed-forward layer or a part of what mixes tokens in "
        "token_mixer"
    )
    hidden = Both(Mixer(8), feed_forward())
    hidden.token_mixer.mlp = feed_forward()  # type: ignore[assignment]
    assert "cannot tell whether token_mixer.mlp is a feed-forward layer" in refusal(Handmade(hidden))
    attention = Both(Mixer(8))
    attention.attention = feed_forward()  # type: ignore[assignment] # the projections of an attention are not looked at
    assert refusal(Handmade(attention)) == "Handmade: none of its 1 layers (layers) has a feed-forward part"
    inside = feed_forward()
    inside["mixer"] = nn.Module()
    inside["mixer"].conv = nn.Conv1d(12, 12, 2, groups=12)
    said = refusal(Handmade(Both(nn.Identity(), inside)))
    assert said == "Handmade: layers.0: cannot tell what mlp.mixer does inside of the feed-forward layer mlp"


def test_layers_without_any_feed_forward_part_are_refused() -> None:
    assert refusal(Handmade(Both(Mixer(8)), Both(Mixer(8)))) == (
        "Handmade: none of its 2 layers (layers) has a feed-forward part"
    )


def test_one_feed_forward_layer_in_two_layers_is_refused() -> None:
    shared = feed_forward()
    assert refusal(Handmade(Both(Mixer(8), shared), Both(Mixer(8), shared))) == (
        "Handmade: layers.0 and layers.1 are one feed-forward layer that is used twice"
    )


class Looped(Handmade):
    rounds = 2

    def forward(self, input_ids: Tensor, **_: Any) -> Tensor:
        x = self.embedding(input_ids)
        for layer in list(self.layers) * self.rounds:
            x = x + layer(x)
        return x


def test_a_stack_that_is_used_twice_or_not_at_all_is_refused() -> None:
    model = Looped(feed_forward(), feed_forward())
    for rounds, said in (
        (2, "layers.0.w2: used more than once in a forward pass, which cannot be measured"),
        (0, "Looped: a forward pass does not use layers.0.w2, layers.1.w2"),
    ):
        model.rounds = rounds
        with pytest.raises(ValueError) as caught, observe(model) as observation:
            instance_means(model, observation, torch.arange(2, 9)[None])
        assert str(caught.value) == said


class Transposed(Handmade):
    """Tokens first, then instances, as XLNet has them inside."""

    def forward(self, input_ids: Tensor, **_: Any) -> Tensor:
        return super().forward(input_ids.mT)


@pytest.mark.parametrize("shape", [(2, 3), (3, 3)])
def test_tokens_in_another_order_are_refused(shape: tuple[int, int]) -> None:
    model = Transposed(feed_forward())
    with (
        pytest.raises(
            ValueError, match=r"^layers\.0\.w2: computed for tokens of shape \(3, .\), the batch has \(., 3\)"
        ),
        observe(model) as observation,
    ):
        instance_means(model, observation, torch.zeros(shape, dtype=torch.long))


def test_layers_of_an_encoder_in_the_model_are_not_those_of_the_language_model() -> None:
    """However many it has: it has a configuration of its own."""
    model = built("Llama")
    vision = transformers.SiglipVisionConfig(hidden_size=32, num_hidden_layers=5, num_attention_heads=2)
    model.model.encoder = transformers.SiglipVisionModel(vision)
    assert [layer.name for layer in find_layers(model)] == ["model.layers.0", "model.layers.1"]
    model.model.layers_of_something = nn.ModuleList([nn.Linear(2, 2)] * 7)  # as many as the configuration has count
    assert [layer.name for layer in find_layers(model)] == ["model.layers.0", "model.layers.1"]


def test_experts_outside_the_interface_of_transformers_are_refused() -> None:
    layer = Layer()
    layer["experts"] = nn.Module()
    layer["experts"].down_proj = nn.Parameter(torch.zeros(3, 8, 12))
    assert refusal(Handmade(layer)) == (
        "Handmade: layers.0: cannot tell what experts computes; experts are known as transformers 5 holds them, in one "
        "module with its experts interface (use_experts_implementation)"
    )
    layer["experts"].down_proj = nn.Parameter(torch.zeros(1, 1, 12))  # factors of RWKV's tokens
    said = "Handmade: layers.0: cannot tell what experts computes, whose parameters are no linear maps"
    assert refusal(Handmade(layer)) == said
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
        "Handmade: layers.0: cannot tell what mixer.A (3, 5) does, which is not a linear map"
    )


def test_a_shared_expert_that_is_not_just_added_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = built("Qwen2-MoE")
    block = type(model.model.layers[0].mlp)
    real = block.forward
    monkeypatch.setattr(block, "forward", lambda self, x: real(self, x) + 0.1 * x)
    assert refusal(model) == (
        "Qwen2MoeForCausalLM: model.layers.0: cannot place the shared expert mlp.shared_expert: its output, or that "
        "times a sigmoid, is not added to the output of the routed experts"
    )


def test_experts_whose_outputs_are_normalized_are_refused() -> None:
    model = built("OLMoE")
    experts = model.model.layers[0].mlp.experts
    experts.has_post_expert_norm = True
    assert refusal(model) == (
        "OlmoeForCausalLM: model.layers.0.mlp.experts: each expert's output is normalized, so its memories "
        "add to no sum"
    )
    del experts.has_post_expert_norm  # transformers 5.17
    assert len(find_memories(model)) == len(model.model.layers)


def test_our_own_model_is_found_by_name() -> None:
    model = scatter_(OLMo(tiny_config()))
    for number, [part] in enumerate(find_memories(model)):
        block = model.blocks[number]
        assert part.name == f"transformer.blocks.{number}.ff_out" and part.down is block.ff_out
        assert part.into == (block.ff_proj,) and part.count == 48 and part.gated
