"""`--help-config` and docs/config.md: every key with its type, default, meaning and limits."""

from pathlib import Path

import pytest

from olmo.config import TrainConfig
from olmo.config.help import describe, markdown
from olmo.config.setting import walk
from olmo.exceptions import ConfigurationError

DOCS = Path(__file__).resolve().parents[3] / "docs" / "config.md"


def test_the_page_of_all_keys_is_up_to_date() -> None:
    assert DOCS.read_text(encoding="utf-8") == markdown(), "run: python -m olmo.config > docs/config.md"


@pytest.mark.parametrize(
    "key, expected",
    [
        ("model.d_model", "model.d_model: int = 768\n    width of the residual stream; at least 1"),
        ("model.alibi", "model.alibi: bool = false\n    only false; use rope or learned positions"),
        ("gen1_gc_interval", "gen1_gc_interval: int or null = 1\n    no effect: Python collects its own garbage"),
        (
            "model.attention_dropout",
            "model.attention_dropout: float = 0.1\n    dropout of the attention weights; at least 0 and at most 1",
        ),
        ("precision", "precision: str or null = null\n    null is fp32; amp_bf16 is autocast to bfloat16; only "),
        ("model.activation_type", "model.activation_type: gelu, relu or swiglu = swiglu\n"),
        ("data.paths", "data.paths: list of str or null = null\n"),
        ("data.datasets", "data.datasets: dict of str to list of str or null = null\n"),
        ("optimizer.betas", "optimizer.betas: tuple of float, float = [0.9, 0.95]\n"),
        ("wandb.tags", "wandb.tags: list of str or null = [watching]\n"),
        ("evaluators.0.label", "evaluators.label: str\n"),
        ("evaluators[1].data.seed", "evaluators.data.seed: int or null = null\n"),
    ],
)
def test_a_key(key: str, expected: str) -> None:
    text = describe(key)
    assert text.startswith(expected) and text.count("\n") == 1


def test_a_section_is_itself_and_its_keys() -> None:
    lines = describe("data.instance_filter").splitlines()
    assert [line.partition(":")[0] for line in lines if not line.startswith(" ")] == [
        "data.instance_filter",
        "data.instance_filter.repetition_max_period",
        "data.instance_filter.repetition_min_period",
        "data.instance_filter.repetition_max_count",
    ]


def test_without_a_key_all_are_described() -> None:
    described = [line.partition(":")[0] for line in describe().splitlines() if not line.startswith(" ")]
    assert described == [key for key, _, _ in walk(TrainConfig)]


@pytest.mark.parametrize("key, nearest", [("model.dmodel", "model.d_model"), ("sed", "seed"), ("moddel", "model")])
def test_an_unknown_key_suggests_the_nearest(key: str, nearest: str) -> None:
    with pytest.raises(ConfigurationError, match=f"^unknown key '{key}', did you mean '{nearest}'"):
        describe(key)


@pytest.mark.parametrize("key", ["data.nope", "zzz"])
def test_nothing_is_suggested_for_a_key_like_no_other(key: str) -> None:
    with pytest.raises(ConfigurationError, match=f"^unknown key '{key}'; without a key, all are printed$"):
        describe(key)
