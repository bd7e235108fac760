"""What measuring leaves as it was, and what it refuses in one line."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import transformers
from torch import nn

import knowledge_entropy as ke
from tests.analysis.measuring import made_model, rows_of
from tests.architectures import built


@pytest.fixture(scope="module")
def rows(tokens: Path) -> np.ndarray:
    return rows_of(tokens)[:8]


def trained() -> Any:
    """A model in training with dropout, one part of which is in evaluation mode, with gradients."""
    model: Any = built("Pythia", hidden_dropout=0.5, attention_dropout=0.5).train()
    model.gpt_neox.layers[1].eval()
    model(input_ids=torch.tensor([[3, 4, 5]]), labels=torch.tensor([[3, 4, 5]])).loss.backward()
    model.gpt_neox.layers[0].mlp.dense_h_to_4h.weight.requires_grad_(False)
    return model


def state(model: nn.Module) -> dict[str, Any]:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "modes": [module.training for module in model.modules()],
        "hooks": [[len(vars(module)[kind]) for kind in hooks] for module in model.modules()],
        "own attributes": [sorted(vars(module)) for module in model.modules()],
        "gradients": [None if p.grad is None else p.grad.tolist() for p in model.parameters()],
        "wanted": [(p.requires_grad, p._version) for p in model.parameters()],
        "weights": [p.tolist() for p in model.parameters()],
        "configuration": str(model.config),
        "random": (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()),
        "torch": (torch.is_grad_enabled(), torch.get_float32_matmul_precision(), torch.is_autocast_enabled("cpu")),
    }


@pytest.mark.parametrize("failing", [None, RuntimeError, KeyboardInterrupt])
def test_a_model_in_training_is_measured_without_dropout_and_left_as_it_was(
    failing: type[BaseException] | None, rows: np.ndarray
) -> None:
    model = trained()
    wanted = ke.measure(built("Pythia"), rows)
    calls = itertools.count()

    def draw(module: nn.Module, args: Any) -> None:
        torch.rand(1)
        if failing is not None and next(calls) % 2 == 1:  # in the middle of the measurement
            raise failing

    model.gpt_neox.layers[1].register_forward_pre_hook(draw)
    before = state(model)
    for measures in (("knowledge",), ("attention", "next_token")):
        try:
            found = ke.measure(model, rows, measures=measures)
            assert found.entropy == wanted.entropy
        except (RuntimeError, KeyboardInterrupt):
            assert failing is not None
        assert state(model) == before


def test_autocast_and_a_coarse_precision_around_it_change_nothing(rows: np.ndarray) -> None:
    model = built("Pythia")
    wanted = ke.measure(model, rows)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
            assert ke.measure(model, rows).entropy == wanted.entropy
            assert torch.is_autocast_enabled("cpu")
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_the_precision_is_that_of_the_weights(rows: np.ndarray) -> None:
    names = [ke.measure(built("Pythia").to(dtype), rows).to_dict()["precision"] for dtype in (torch.bfloat16, None)]
    assert names == ["bf16", "fp32"]


# --- what is wrong, in one line ----------------------------------------------------------------------------------


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return transformers.GPTNeoXForCausalLM(built("Pythia").config)


def ours() -> nn.Module:
    return made_model(0)


SOME = [[3, 4, 5], [6, 7]]
WRONG: dict[str, tuple[Callable[[], Any], Any, dict[str, Any], str]] = {
    "no model": (lambda: 7, SOME, {}, "int: no model"),
    "no folder": (lambda: "no/such/folder", SOME, {}, "no/such/folder"),
    "no memories": (lambda: nn.Linear(4, 4), SOME, {}, "Linear"),
    "no embeddings": (lambda: nn.Sequential(nn.ModuleList([nn.Linear(4, 8)])), SOME, {}, "Sequential"),
    "no weights": (nn.Identity, SOME, {}, "Identity"),
    "meta": (on_meta, SOME, {}, "GPTNeoXForCausalLM: on the meta device"),
    "nothing": (ours, None, {}, "data: NoneType; expected a path, strings"),
    "a number": (ours, 3, {}, "data: int; expected"),
    "numbers": (ours, [3, 4], {}, "data: a list of numbers; token ids are lists"),
    "empty": (ours, [], {}, "data: empty"),
    "an empty array": (ours, np.zeros((0, 4), int), {}, "data: empty"),
    "an empty row": (ours, [[3], []], {}, "data: row 1: no token"),
    "fractions": (ours, np.ones((2, 4)), {}, "data: shape .2, 4. of float64; token ids are whole numbers"),
    "one dimension": (ours, torch.ones(4, dtype=torch.long), {}, "data: shape .4,. of int64; token ids"),
    "a padded row": (ours, [[3, -100]], {}, "data: row 0: -100; expected a list of token ids"),
    "mixed": (ours, ["a", 4], {"tokenizer": "x"}, "data: text 1 is of type int, not str"),
    "several datasets": (
        ours,
        datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": ["a"]})}),
        {},
        "data: DatasetDict of several datasets; pass one of train",
    ),
    "another column": (
        ours,
        datasets.Dataset.from_dict({"body": ["a"]}),
        {},
        "data: Dataset has body; expected 'input_ids' or 'text'",
    ),
    "no tokenizer": (ours, ["a text"], {}, "OLMo: text needs a tokenizer; give tokenizer"),
    "no file": (ours, "no-such.npy", {}, "no-such.npy"),
    "no text": (ours, "no-such.txt", {"tokenizer": "x"}, "no-such.txt: no such data"),
    "another tokenizer": (ours, ["a"], {"tokenizer": 3}, "tokenizer: int; expected a name"),
    "too many": (ours, SOME, {"data_size": 3}, "token ids: 2 instances, data_size asks for 3"),
    "vocabulary": (ours, [[3, 500]], {}, "token 500 in the data, the model's vocabulary has 128"),
    "too long": (ours, [[3] * 20], {}, "sequence_length 20: OLMo .* use sequence_length 16 or less"),
    "rotary": (
        lambda: built("Pythia"),
        SOME,
        {"sequence_length": 65},
        "for 64 tokens and would extrapolate their positions; use sequence_length 64 or less$",
    ),
    "no head": (
        lambda: built("Pythia").gpt_neox,
        SOME,
        {"measures": ("next_token",)},
        "GPTNeoXModel: has no logits, which next_token needs",
    ),
    "precision": (ours, SOME, {"precision": "bf16"}, "precision: only for a path or hub id"),
    "device": (ours, SOME, {"device": "cpu"}, "device: only for a path or hub id"),
    "tokenizer of tokens": (ours, SOME, {"tokenizer": "x"}, "tokenizer: only for text as data"),
    "pack of tokens": (ours, SOME, {"pack": "none"}, "pack: only for text as data"),
    "pack": (ours, SOME, {"pack": "all"}, "pack: 'all' is none of eos, none"),
    "coefficient": (ours, SOME, {"coefficient": "gelu"}, "coefficient: 'gelu' is none of abs, relu"),
    "measures": (ours, SOME, {"measures": ("heads",)}, "measures: 'heads' is none of knowledge"),
    "a measure": (ours, SOME, {"measures": "attention"}, "measures: 'attention'; expected a sequence"),
    "batch": (ours, SOME, {"batch_size": 0}, "batch_size: 0; expected a whole number of at least 1"),
    "size": (ours, SOME, {"data_size": 1.5}, "data_size: 1.5; expected a whole number"),
    "tolerance": (ours, SOME, {"tolerance": 0.0}, "tolerance: 0.0 must be above 0"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_named_in_one_line(case: str) -> None:
    model, data, settings, reason = WRONG[case]
    with pytest.raises((ValueError, FileNotFoundError), match=reason) as raised:
        ke.measure(model(), data, **settings)
    assert "\n" not in str(raised.value) and "--" not in str(raised.value)


def test_a_precision_that_is_unknown(shared: Path) -> None:
    with pytest.raises(ValueError, match="precision 'int8' is none of"):
        ke.measure(shared, SOME, precision="int8")
    assert ke.measure(shared, SOME, precision="bf16", device="cpu").to_dict()["precision"] == "bf16"
