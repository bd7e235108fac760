"""Attention and next-token entropy against their formulas in float64, over full tensors."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from analysis import other_entropies
from analysis.entropy import main
from analysis.other_entropies import attention_entropy, distribution_entropy, instance_entropies
from olmo.exceptions import ConfigurationError
from olmo.memory import GroupedMeans, observe
from olmo.model import OLMo
from tests.reference import tiny_config, tiny_olmo2_config, to_transformers

LENGTHS = (11, 1, 7)


def ragged(below: int = 100) -> tuple[Tensor, Tensor]:
    """Ids (3, 11) of instances of 11, 1 and 7 tokens, and their mask."""
    ids = torch.randint(1, below, (3, 11), generator=torch.Generator().manual_seed(4))
    mask = (torch.arange(11) < torch.tensor(LENGTHS)[:, None]).long()
    return ids * mask, mask


def entropy_of(probabilities: Tensor) -> Tensor:
    return torch.special.entr(probabilities).sum(-1)


def direct(model: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Attention (3, L) and next-token entropy (3,) by transformers' eager attention in float64, one by one."""
    model = model.double()
    model.set_attn_implementation("eager")  # type: ignore[operator]
    attention, next_token = [], []
    for row, length in zip(ids, LENGTHS):
        with torch.no_grad():
            output = model(row[None, :length], output_attentions=True)
        attention.append(torch.stack([entropy_of(layer[0]).mean() for layer in output.attentions]))
        next_token.append(entropy_of(output.logits[0].softmax(-1)).mean())
    return torch.stack(attention), torch.stack(next_token)


def small(kind: str, **more: Any) -> nn.Module:
    """A random model of transformers, with weights large enough that attention is not even."""
    torch.manual_seed(1)
    sizes = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 48, "max_position_embeddings": 16}
    makers = {
        "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_key_value_heads=2)),
        "mistral": lambda: transformers.MistralForCausalLM(
            transformers.MistralConfig(**sizes, num_key_value_heads=2, sliding_window=4)
        ),
        "gpt2": lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=100, n_embd=32, n_layer=2, n_head=4, n_positions=16)
        ),
        "pythia": lambda: transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**sizes)),
        "opt": lambda: transformers.OPTForCausalLM(
            transformers.OPTConfig(
                **{k: v for k, v in sizes.items() if k != "intermediate_size"}, ffn_dim=48, word_embed_proj_dim=32
            )
        ),
        "cohere": lambda: transformers.CohereForCausalLM(
            transformers.CohereConfig(**sizes, num_key_value_heads=2, logit_scale=4.0)
        ),
    }
    model = makers[kind]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
    return model


# --- the formulas ------------------------------------------------------------------------------------------------


def test_entropy_of_known_distributions() -> None:
    scores = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, -math.inf, -math.inf, 0.0], [500.0, 0.0, 0.0, 0.0]])
    assert distribution_entropy(scores).tolist() == pytest.approx([math.log(4), math.log(2), 0.0])
    assert distribution_entropy(scores[:2] + 1e4).tolist() == pytest.approx([math.log(4), math.log(2)])
    assert distribution_entropy(torch.tensor([[0.0, torch.finfo(torch.float32).min]])).tolist() == [0.0]


@pytest.mark.parametrize("at_once", [1, 64, 2**23])
@pytest.mark.parametrize("given", ["causal", "bool", "float", "none"])
def test_attention_entropy_in_blocks(monkeypatch: pytest.MonkeyPatch, at_once: int, given: str) -> None:
    monkeypatch.setattr(other_entropies, "SCORES_AT_ONCE", at_once)
    generator = torch.Generator().manual_seed(0)
    query = 2 * torch.randn(2, 6, 9, 4, generator=generator)
    key = 2 * torch.randn(2, 3, 9, 4, generator=generator)
    seen = {"causal": torch.ones(9, 9).bool().tril(), "none": torch.ones(9, 9).bool()}.get(given)
    if seen is None:
        seen = (torch.rand(2, 1, 9, 9, generator=generator) < 0.6) | torch.eye(9).bool()
    added = torch.zeros(seen.shape).masked_fill(~seen, -math.inf)
    scores = query.double() @ key.repeat_interleave(2, 1).double().transpose(-1, -2) * 0.3
    expected = entropy_of((scores + added.double()).softmax(-1))
    mask = {"bool": seen, "float": added}.get(given)
    found = attention_entropy(query, key, key, mask, is_causal=given == "causal", scale=0.3)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    plain, scaled = (attention_entropy(query, key, key, is_causal=True, **how) for how in ({}, {"scale": 0.5}))
    torch.testing.assert_close(plain, scaled)


# --- in models ---------------------------------------------------------------------------------------------------


def check(model: nn.Module, ids: Tensor, mask: Tensor, attention: Tensor, next_token: Tensor) -> None:
    with observe(model) as observation:
        alone = instance_entropies(model, observation, ids, mask)
        both = instance_entropies(model, observation, ids, mask, ("attention", "next_token"))
        only = instance_entropies(model, observation, ids, mask, ("knowledge", "attention"))
        other = instance_entropies(model, observation, ids, mask, ("next_token",))
    assert alone.keys() == {"knowledge"} and both.keys() == {"knowledge", "attention", "next_token"}
    assert only.keys() == {"knowledge", "attention"} and other.keys() == {"knowledge", "next_token"}
    assert attention[0].max() < 0.95 * math.log(11), "an even attention would prove nothing"
    for found in (both, only):
        torch.testing.assert_close(found["attention"].double(), attention, rtol=1e-4, atol=1e-5)
    for found in (both, other):
        torch.testing.assert_close(found["next_token"].double(), next_token, rtol=1e-4, atol=1e-5)
    for found in (both, only, other):
        torch.testing.assert_close(found["knowledge"], alone["knowledge"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("config", [tiny_config(n_kv_heads=2), tiny_olmo2_config()])
def test_our_models(monkeypatch: pytest.MonkeyPatch, config: Any) -> None:
    monkeypatch.setattr(other_entropies, "SCORES_AT_ONCE", 200)  # several blocks of everything
    torch.manual_seed(3)
    model = OLMo(config).eval()
    with torch.no_grad():
        for block in model.blocks:
            block.att_proj.weight.mul_(6)
    check(model, *ragged(), *direct(to_transformers(model), ragged()[0]))


@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2", "pythia", "opt", "cohere"])
def test_other_families(kind: str) -> None:
    """Grouped queries, a sliding window, learned positions, logits that the model scales."""
    expected = direct(small(kind), ragged()[0])
    check(small(kind), *ragged(), *expected)


def test_attention_that_cannot_be_watched() -> None:
    model = small("llama")
    model.set_attn_implementation("eager")  # type: ignore[operator]
    reason = (
        "LlamaForCausalLM: 0 calls of scaled_dot_product_attention for 2 layers; attention entropy needs one per layer"
    )
    with observe(model) as observation, pytest.raises(ValueError, match=reason):
        instance_entropies(model, observation, ragged()[0], None, ("attention",))


# --- standard errors, and the command ----------------------------------------------------------------------------


def test_the_error_of_a_mean_is_that_of_the_textbook() -> None:
    values = torch.randn(64, 3, generator=torch.Generator().manual_seed(2)).double()
    means = GroupedMeans(3)
    means.add(values, np.arange(64))
    assert means.average == pytest.approx(values.mean(0).tolist())
    spread = np.sqrt(63 / 64 * ((means.leave_one_out() - means.average) ** 2).sum(0))
    assert spread == pytest.approx((values.std(0) / 8).tolist(), rel=1e-9)
    assert GroupedMeans(3).leave_one_out().shape == (0, 3) and GroupedMeans().leave_one_out().shape == (0,)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model = small("llama")
    model.save_pretrained(tmp_path / "model")  # type: ignore[operator]
    rows = torch.randint(100, (80, 11), generator=torch.Generator().manual_seed(6))
    rows.numpy().astype("<u2").tofile(tmp_path / "tokens.npy")
    asked = ["--checkpoint", str(tmp_path / "model"), "--data", str(tmp_path / "tokens.npy"), "--data_size", "80"]
    asked += ["--sequence_length", "11", "--output", str(tmp_path / "out")]
    main(asked)
    plain = json.loads((tmp_path / "out/knowledge_entropy.json").read_text())
    assert plain["measures"] == ["knowledge"] and "attention_entropy" not in plain
    main([*asked, "--measures", "next_token,attention"])
    result = json.loads((tmp_path / "out/knowledge_entropy.json").read_text())
    assert result["measures"] == ["knowledge", "attention", "next_token"]
    assert result["knowledge_entropy"] == pytest.approx(plain["knowledge_entropy"], abs=1e-6)

    eager = small("llama").double()
    eager.set_attn_implementation("eager")  # type: ignore[operator]
    with torch.no_grad():
        output = eager(rows, output_attentions=True)
    attention = torch.stack([entropy_of(layer).mean((1, 2)) for layer in output.attentions], 1)
    next_token = entropy_of(output.logits.softmax(-1)).mean(1)
    assert result["attention_layers"] == pytest.approx(attention.mean(0).tolist(), rel=1e-4)
    assert result["attention_entropy"] == pytest.approx(attention.mean(0).sum().item(), rel=1e-4)
    assert result["next_token_entropy"] == pytest.approx(next_token.mean().item(), rel=1e-4)
    for name, values in (("attention", attention.sum(1)), ("next_token", next_token)):
        groups = torch.arange(80) % 64
        left_out = torch.stack([values[groups != group].mean() for group in range(64)])
        error = ((left_out - left_out.mean()).square().sum() * 63 / 64).sqrt().item()
        assert result[f"{name}_standard_error"] == pytest.approx(error, rel=1e-3)
    shown = capsys.readouterr().out.splitlines()[-1]
    assert f"attention {result['attention_entropy']:.4f} +- {result['attention_standard_error']:.4f}" in shown
    # What is there already is not measured again, whichever part of it is asked for.
    monkeypatch.setattr("analysis.job.open_model", lambda *_: pytest.fail("measured again"))
    main([*asked, "--measures", "attention"])
    weights = load_file(tmp_path / "model/model.safetensors")
    save_file({name: 2 * tensor for name, tensor in weights.items()}, tmp_path / "model/model.safetensors")
    with pytest.raises(pytest.fail.Exception, match="measured again"):  # another model in the same place
        main([*asked, "--measures", "attention", "--overwrite"])
    with pytest.raises(ConfigurationError, match="--measures: 'tokens' is none of knowledge, attention, next_token"):
        main([*asked, "--measures", "attention,tokens"])
