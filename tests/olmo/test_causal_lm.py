"""Models of other families behind the trainer's interface, against transformers' own classes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from olmo.config import ModelConfig
from olmo.model.causal_lm import CausalLM, dropouts
from olmo.model.trainable import refusal
from tests import families

IDS = torch.randint(4, 100, (3, 12), generator=torch.Generator().manual_seed(1))
MASK = torch.ones(IDS.shape, dtype=torch.bool)
MASK[0, :5] = False


def network_of(family: str, **settings: Any) -> Any:
    """A tiny model of a family with random weights, in evaluation mode."""
    torch.manual_seed(0)
    config = families.shrunk(CONFIG_MAPPING[family], {**families.OWN.get(family, {}), **settings})
    network = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network


def model_of(family: str, **settings: Any) -> CausalLM:
    return CausalLM(network_of(family, **settings), ModelConfig(), [])


# --- logits ---

# Family, settings -> divisor and cap, from the family's own code.
HEADS: list[tuple[str, dict[str, Any], float, float | None]] = [
    ("gpt_neox", {}, 1, None),
    ("gptj", {}, 1, None),  # its vocabulary has a bias
    ("opt", {"word_embed_proj_dim": 16}, 1, None),  # a projection behind the last norm, in a decoder of its own
    ("bart", {}, 1, None),
    ("modernbert-decoder", {}, 1, None),  # a layer before the vocabulary
    ("cohere", {"logit_scale": 0.25}, 4, None),
    ("granite", {"logits_scaling": 3.0}, 3, None),
    ("falcon_h1", {"lm_head_multiplier": 0.5}, 2, None),
    ("minicpm3", {"dim_model_base": 16}, 1, None),  # scaled before the vocabulary
    ("gemma2", {"final_logit_softcapping": 2.0}, 1, 2.0),
    ("nanochat", {"final_logit_softcapping": 3.0}, 1, 3.0),
    ("recurrent_gemma", {"logits_soft_cap": 1.5}, 1, 1.5),
]


@pytest.mark.parametrize(("family", "settings", "divisor", "cap"), HEADS, ids=[case[0] for case in HEADS])
def test_logits_are_those_of_the_family(
    family: str, settings: dict[str, Any], divisor: float, cap: float | None
) -> None:
    model = model_of(family, **settings)
    assert model.head is not None and (model.logit_divisor, model.logit_cap) == (divisor, cap)
    with torch.no_grad():
        plain, masked = (
            model.network(input_ids=IDS, attention_mask=None if mask is None else mask.long(), use_cache=False).logits
            for mask in (None, MASK)
        )
        torch.testing.assert_close(model(IDS), plain, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(model(IDS, MASK)[MASK], masked[MASK], rtol=1e-6, atol=1e-6)
        assert model.vocabulary is not None
        hidden, (weight, bias) = model.hidden_states(IDS), model.vocabulary
        scores = torch.nn.functional.linear(hidden, weight, bias) / divisor
        torch.testing.assert_close(scores if cap is None else torch.tanh(scores / cap) * cap, plain)


class OwnLogits(transformers.LlamaForCausalLM):
    """Its logits are no scores that are scaled or capped."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits.sign() * output.logits.abs().sqrt()
        return output


def test_logits_in_a_way_of_its_own_are_taken_as_they_are() -> None:
    network = OwnLogits(network_of("llama").config).eval()
    model = CausalLM(network, ModelConfig(), [])
    assert model.head is None and model.vocabulary is None
    with torch.no_grad():
        assert torch.equal(model(IDS), network(input_ids=IDS).logits)
        assert torch.equal(model.hidden_states(IDS), network(input_ids=IDS).logits)


class WrongWithWeights(transformers.LlamaForCausalLM):
    """Its logits are scores for the numbers of `find_head`, which calls it with one row, and others for real ones."""

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        output = super().forward(input_ids, **kwargs)
        output.logits = output.logits if len(input_ids) == 1 else output.logits + 0.01
        return output


def test_a_head_that_does_not_give_the_logits_of_real_weights_is_not_used() -> None:
    model = CausalLM(WrongWithWeights(network_of("llama").config).eval(), ModelConfig(), [])
    assert model.head is not None and refusal(model) is None and model.head is None


# --- mixtures ---

MIXTURES = [
    "olmoe",
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "gpt_oss",
    "phimoe",
    "jamba",
    "granitemoe",
    "jetmoe",
]


@pytest.mark.parametrize("family", MIXTURES)
def test_the_loss_that_balances_experts_is_what_the_family_adds_for_labels(family: str) -> None:
    key = "aux_loss_coef" if family == "jetmoe" else "router_aux_loss_coef"
    model = model_of(family, **{key: 0.25})
    theirs = network_of(family, **{key: 0.25})
    assert refusal(model) is None and model.has_auxiliary
    model.eval()  # PhiMoE adds noise to what its routers see
    for mask in (None, MASK):
        chosen = {"input_ids": IDS, "attention_mask": None if mask is None else mask.long(), "use_cache": False}
        with torch.no_grad():
            output = theirs(**chosen, labels=IDS, output_router_logits=True)
            without = theirs(**chosen, labels=IDS, output_router_logits=False)
        hidden, auxiliary = model.balanced_states(IDS, mask)
        wanted = 0.25 * float(output.aux_loss)
        assert auxiliary.item() == pytest.approx(wanted, rel=1e-6) and wanted > 0.1
        assert auxiliary.item() == pytest.approx(float(output.loss - without.loss), rel=1e-5)
        assert torch.equal(hidden, model.hidden_states(IDS, mask))
        gradients = torch.autograd.grad(auxiliary, list(model.parameters()), allow_unused=True)
        assert any(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)


@pytest.mark.parametrize("family", ["llama", "deepseek_v3", "doge", "deepseek_v4"])
def test_a_family_that_balances_nothing_has_no_such_loss(family: str) -> None:
    """Doge is a mixture only with `is_moe`; of DeepSeek V4's routers transformers records none."""
    model = model_of(family)
    assert refusal(model) is None and not model.has_auxiliary


# --- what is refused ---


@pytest.mark.parametrize("family", ["bert", "roformer", "xlnet", "prophetnet"])
@pytest.mark.parametrize("new", [False, True])
def test_an_encoder_is_no_causal_language_model(family: str, new: bool) -> None:
    """Also with new weights, whose tokens hardly matter to one another."""
    torch.manual_seed(0)
    network = network_of(family)
    if new:
        network = type(network)(network.config)
    reason = refusal(CausalLM(network.train(), ModelConfig(), []))
    assert reason == "its logits depend on later tokens, so it is no causal language model"
    assert network.training


def test_a_network_that_cannot_be_called_in_training_raises() -> None:
    with pytest.raises(ValueError, match=r"If training, make sure that config\.axial_pos_shape"):
        refusal(model_of("reformer"))


@pytest.mark.parametrize("family", ["llama", "gpt2", "olmoe", "falcon_h1", "recurrent_gemma", "bloom"])
def test_attention_masks_are_obeyed_or_refused(family: str) -> None:
    model = model_of(family)
    assert refusal(model) is None
    assert model.obeys_mask == (family != "recurrent_gemma")
    if not model.obeys_mask:
        with pytest.raises(ValueError, match=r"data: rows with padding .* by RecurrentGemmaForCausalLM, which ignores"):
            model.hidden_states(IDS, MASK)
        assert model.hidden_states(IDS).shape[:2] == IDS.shape


# --- dropout ---

DROPPING: list[tuple[str, dict[str, Any], bool]] = [
    ("llama", {}, False),
    ("llama", {"attention_dropout": 0.1}, True),
    ("gpt2", {}, True),
    ("gpt2", {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}, False),  # summaries have another
    ("opt", {"dropout": 0.0, "layerdrop": 0.9}, True),
    ("biogpt", {}, True),
    ("biogpt", dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0), False),
    ("phimoe", {"input_jitter_noise": 0.1}, True),
]


@pytest.mark.parametrize(("family", "settings", "drops"), DROPPING)
def test_dropout_is_found(family: str, settings: dict[str, Any], drops: bool) -> None:
    model = model_of(family, **settings)
    assert dropouts(model) == drops
    model.train()
    with torch.no_grad():
        assert torch.equal(model(IDS), model(IDS)) != drops
