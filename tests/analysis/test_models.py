"""Models of any family, opened and measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer

from analysis.context import context_length
from tests.analysis.measuring import LENGTH, TEXTS, check, direct, failing, made_model, result_in, rows_of, run, write
from tests.reference import tiny_tokenizer, to_transformers
from tests.running import modes_hold


def test_another_family_of_transformers(tmp_path: Path, tokens: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    shape = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = transformers.GPTNeoXConfig(**shape, intermediate_size=80, max_position_embeddings=LENGTH)
    model = transformers.GPTNeoXForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "pythia")
    run("--checkpoint", tmp_path / "pythia", "--data", tokens, "--data_size", 10, "--batch_size", 4)
    places = [f"gpt_neox.layers.{layer}.mlp.dense_4h_to_h" for layer in range(3)]
    check(tmp_path / "pythia", direct(model, places, rows_of(tokens)[:10]))
    result = result_in(tmp_path / "pythia")
    assert result["sequence_length"] == LENGTH
    found = "GPTNeoXForCausalLM, 3 layers; each has in gpt_neox.layers.*.mlp.dense_4h_to_h: 80 memories (plain)"
    assert result["memories"] == found
    assert f"{tmp_path / 'pythia'}: {found}\n" in capsys.readouterr().err


def test_gpt2_calls_its_context_by_another_name(tmp_path: Path, tokens: Path) -> None:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=128, n_embd=32, n_layer=3, n_head=4, n_positions=LENGTH)
    model = transformers.GPT2LMHeadModel(config).eval()
    model.save_pretrained(tmp_path / "gpt2")
    run("--checkpoint", tmp_path / "gpt2", "--data", tokens, "--data_size", 10, "--batch_size", 4)
    places = [f"transformer.h.{layer}.mlp.c_proj" for layer in range(3)]
    check(tmp_path / "gpt2", direct(model, places, rows_of(tokens)[:10]))
    assert result_in(tmp_path / "gpt2")["sequence_length"] == LENGTH


@pytest.mark.parametrize(
    ("named", "length"),
    [
        ({"n_ctx": 512}, 512),
        ({"max_seq_len": 1024}, 1024),
        ({"seq_length": 64}, 64),
        ({"max_position_embeddings": None, "n_positions": 256}, 256),
        ({"max_position_embeddings": 131072}, 2048),
        ({}, 2048),
    ],
)
def test_the_context_of_another_family(tmp_path: Path, named: dict[str, Any], length: int) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "another", **named}))
    assert context_length(tmp_path) == length


def test_text_for_another_family_is_padded_without_harm(tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.GPTNeoXConfig(**shape, intermediate_size=80, max_position_embeddings=64)
    model = transformers.GPTNeoXForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "pythia")
    tokenizer = Tokenizer.from_file(str(tiny_tokenizer(tmp_path / "pythia/tokenizer.json")))
    (tmp_path / "data.txt").write_text("\n\n".join(TEXTS))
    argv = ["--checkpoint", tmp_path / "pythia", "--data", tmp_path / "data.txt", "--batch_size", 5]
    run(*argv, "--data_size", 5, "--pack", "none")
    rows = [tokenizer.encode(text, add_special_tokens=False).ids for text in TEXTS]
    places = [f"gpt_neox.layers.{layer}.mlp.dense_4h_to_h" for layer in range(2)]
    check(tmp_path / "pythia", direct(model, places, rows))


def test_a_transformers_olmo_measures_like_ours(tmp_path: Path, shared: Path, tokens: Path) -> None:
    to_transformers(made_model(0)).save_pretrained(tmp_path / "hf")
    run("--checkpoint", tmp_path / "hf", "--data", tokens, "--data_size", 10)
    run("--checkpoint", shared, "--data", tokens, "--data_size", 10, "--output", tmp_path / "ours")
    assert result_in(tmp_path / "hf")["layers"] == result_in(tmp_path / "ours")["layers"]
    prints = {result_in(tmp_path / name)["checkpoint"]["fingerprint"] for name in ("hf", "ours")}
    assert len(prints) == 1 and None not in prints


def test_weights_that_may_not_be_read_are_named_with_the_reason(
    tmp_path: Path, tokens: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = write(tmp_path / "ours", made_model(0))
    shape = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**shape)).save_pretrained(tmp_path / "theirs")
    for folder in (ours, tmp_path / "theirs"):
        capsys.readouterr()  # transformers prints while it saves
        (folder / "model.safetensors").chmod(0)
        argv = ["--checkpoint", folder, "--data", tokens, "--data_size", 3, "--sequence_length", LENGTH]
        with modes_hold():
            assert f"{folder}/model.safetensors: permission denied" in failing(capsys, *argv)


def test_truncated_weights_of_another_family_are_one_line(
    tmp_path: Path, tokens: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.GPTNeoXConfig(**shape, max_position_embeddings=LENGTH)
    transformers.GPTNeoXForCausalLM(config).save_pretrained(tmp_path / "pythia")
    weights = tmp_path / "pythia/model.safetensors"
    content = weights.read_bytes()
    capsys.readouterr()  # transformers prints while it saves
    for kept in (0, 100, len(content) - 4):
        weights.write_bytes(content[:kept])
        said = failing(capsys, "--checkpoint", tmp_path / "pythia", "--data", tokens, "--data_size", 3)
        assert said.startswith(f"error: {weights}: damaged or not a file of tensors: ")
