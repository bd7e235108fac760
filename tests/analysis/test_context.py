"""Instances longer than the context of a model: refused, or extrapolated on request and recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers

from analysis import entropy, job
from analysis.context import Context, check_length, context_of
from olmo.exceptions import ConfigurationError, exit_status
from tests.analysis.measuring import LENGTH, check, direct, made_model, olmo_places, result_in, rows_of, run
from tests.reference import to_transformers

ROTARY: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 80}
GPT2: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("family", "shape", "context"),
    [
        ("gpt2", GPT2, Context(64, fixed=True)),
        ("opt", {**ROTARY, "ffn_dim": 80, "word_embed_proj_dim": 32}, Context(64, fixed=True)),
        ("gptj", {**GPT2, "rotary_dim": 4}, Context(64, fixed=True)),
        ("ctrl", {**GPT2, "dff": 80}, Context(64, fixed=True)),
        ("mpt", {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}, Context(64, fixed=True)),
        ("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}, Context(None)),
        ("falcon", {**ROTARY, "alibi": True}, Context(None)),
        ("falcon", ROTARY, Context(64)),
        ("xglm", {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 80}, Context(64)),
        ("llama", ROTARY, Context(64)),
        ("llama", {**ROTARY, "rope_parameters": YARN}, Context(256)),
        ("gpt_neox", ROTARY, Context(64)),
        ("olmo2", ROTARY, Context(64)),
        ("mistral", {**ROTARY, "sliding_window": 16, "num_key_value_heads": 2}, Context(None)),
        ("mistral", {**ROTARY, "sliding_window": None, "num_key_value_heads": 2}, Context(64)),
        ("gemma2", {**ROTARY, "sliding_window": 16, "num_key_value_heads": 2, "head_dim": 8}, Context(64)),
    ],
)
def test_the_context_follows_from_an_empty_model(
    family: str, shape: dict[str, Any], context: Context, tmp_path: Path
) -> None:
    """A folder without weights is enough."""
    length = {} if family in ("mpt", "bloom", "gpt2", "gptj", "ctrl") else {"max_position_embeddings": 64}
    config = transformers.AutoConfig.for_model(family, vocab_size=128, **length, **shape)
    config.save_pretrained(tmp_path)
    assert context_of(tmp_path) == context
    assert check_length(tmp_path, 64, allow_longer=False) is None
    for allow_longer in (False, True):
        if context.positions is None:
            assert check_length(tmp_path, 5000, allow_longer) is None
        elif allow_longer and not context.fixed:
            assert check_length(tmp_path, 5000, allow_longer) == context.positions
        else:
            with pytest.raises(ConfigurationError, match=f"^--sequence_length 5000: {tmp_path} .* {context.positions}"):
                check_length(tmp_path, 5000, allow_longer)


def test_longer_instances_are_refused_before_weights_are_read_and_measured_on_request(
    tmp_path: Path, tokens: Path, shared: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["--data", tokens, "--data_size", 3, "--sequence_length", 2 * LENGTH, "--output", tmp_path / "out"]
    gpt2 = tmp_path / "gpt2"
    transformers.GPT2Config(vocab_size=128, **{**GPT2, "n_positions": LENGTH}).save_pretrained(gpt2)
    with monkeypatch.context() as patch:
        patch.setattr(job, "identity_of", lambda _: pytest.fail("weights are read"))
        for folder, more, end in (
            (shared, [], f"use --sequence_length {LENGTH} or less, or --allow_longer to measure it all the same"),
            (gpt2, [], f"{gpt2} has positions for {LENGTH} tokens; use --sequence_length {LENGTH} or less"),
            (gpt2, ["--allow_longer"], f"use --sequence_length {LENGTH} or less"),
        ):
            assert exit_status(entropy.main, [str(a) for a in (*argv, *more, "--checkpoint", folder)]) == 2
            shown = capsys.readouterr()
            assert shown.err.startswith(f"error: --sequence_length {2 * LENGTH}: {folder} ")
            assert shown.err.endswith(f"{end}\n") and shown.err.count("\n") == 1 and not shown.out
    run(*argv, "--allow_longer", "--checkpoint", shared)
    rows = rows_of(tokens)[:6].reshape(3, 2 * LENGTH)
    check(tmp_path / "out", direct(to_transformers(made_model(0)), olmo_places(), rows))
    assert result_in(tmp_path / "out")["longer_than_context"] == LENGTH
    run(*argv[:4], "--output", tmp_path / "usual", "--allow_longer", "--sequence_length", 8, "--checkpoint", shared)
    assert result_in(tmp_path / "usual")["longer_than_context"] is None
