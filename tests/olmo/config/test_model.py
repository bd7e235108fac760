"""The settings of a model: the section of a checkpoint's config.yaml, and what follows from its keys."""

import typing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from olmo.config import ActivationType, ModelConfig, load_model_config
from olmo.exceptions import ConfigurationError
from tests.olmo.config.configurations import write


def test_model_config_is_read_from_any_trainers_file(tmp_path: Path) -> None:
    text = (
        "my_trainer: {anything: [1, {a: b}]}\nsave_folder: ${path.choose:/a,/b}\nprecision: fp64\n"
        "model: {d_model: 64, n_heads: 4, activation_type: gelu, init_fn: mitchell, layer_norm_type: rms}\n"
    )
    expected = ModelConfig(
        d_model=64,
        n_heads=4,
        activation_type="gelu",
        init_fn="mitchell",
        layer_norm_type="rms",
    )
    assert load_model_config(write(tmp_path, text)) == expected


@pytest.mark.parametrize(
    "text, expected",
    [
        ("seed: 3", "no section 'model'"),
        ("model: 3", "no section 'model'"),
        ("model: {n_head: 3}", "unknown key 'model.n_head', did you mean 'model.n_heads'?"),
        ("model: {d_model: x}", "model.d_model: Value 'x'"),
        ("model: {alibi: true, n_heads: 5}", "model.alibi: true is not supported (false is); use rope or learned "),
    ],
)
def test_wrong_model_section(tmp_path: Path, text: str, expected: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigurationError) as caught:
        load_model_config(path)
    assert str(caught.value).removeprefix(f"{path}: ").startswith(expected)


def test_a_folder_without_a_configuration_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=f"^{tmp_path}: neither config.yaml nor config.json$"):
        load_model_config(tmp_path / "config.yaml")


def test_model_problems_are_reported_together(tmp_path: Path) -> None:
    path = write(tmp_path, "model: {alibi: true, n_heads: 5, n_kv_heads: 2}")
    with pytest.raises(ConfigurationError, match=r"model\.alibi: .*; model\.d_model: .*; model\.n_kv_heads: "):
        load_model_config(path)


@given(
    d_model=st.integers(1, 64),
    ratio=st.integers(1, 8),
    size=st.none() | st.integers(2, 100),
    kind=st.sampled_from(typing.get_args(ActivationType)),
)
def test_inner_size(d_model: int, ratio: int, size: int | None, kind: ActivationType) -> None:
    config = ModelConfig(d_model=d_model, mlp_ratio=ratio, mlp_hidden_size=size, activation_type=kind)
    rows = size or ratio * d_model
    assert config.projection_size == rows
    assert config.inner_size == (rows // 2 if kind == "swiglu" else rows)


@pytest.mark.parametrize("given, multi, heads", [(None, None, 12), (None, True, 1), (None, False, 12), (3, None, 3)])
def test_key_value_heads(given: int | None, multi: bool | None, heads: int) -> None:
    assert ModelConfig(n_kv_heads=given, multi_query_attention=multi).effective_n_kv_heads == heads
