"""nnsight and TransformerLens, in an environment of their own (`make interop`): their models have the entropy of the
transformers model that they hold."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from olmo.memory import observe
from olmo.memory.entropy import layer_entropy
from olmo.memory.locate import describe
from olmo.memory.rescaling import rescale_model
from tests.architectures import built, observed
from tests.reference import tiny_tokenizer

pytestmark = pytest.mark.interop
FAMILIES = ["Llama", "Pythia", "GPT-2"]
# TransformerLens takes the number of key-value heads from the configuration of families that do not have it.
HEADS: dict[str, Any] = {"num_key_value_heads": 4}


def entropy(means: Tensor) -> float:
    """H of means (N, L, M) of each instance."""
    return float(layer_entropy(np.asarray(layer) for layer in means.double().mean(0)).sum())


def variants(name: str) -> tuple[str, ...]:
    return ("abs", "relu") if name == "Llama" else ("abs",)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("kind", ["NNsight", "TransformersModel", "LanguageModel"])
def test_nnsight(name: str, kind: str, tmp_path: Path) -> None:
    nnsight = pytest.importorskip("nnsight")
    bare, held = built(name, **HEADS), built(name, **HEADS)
    if kind == "NNsight":
        wrapped = nnsight.NNsight(held)
    else:
        transformers = pytest.importorskip("transformers")
        file = tiny_tokenizer(tmp_path / "tokenizer.json")
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(file), pad_token="!")
        wrapped = getattr(nnsight, kind)(held, tokenizer=tokenizer)
    assert describe(wrapped) == describe(bare)
    for _ in range(2):
        for variant in variants(name):
            assert torch.equal(observed(wrapped, variant, 3), observed(bare, variant, 3))
        with wrapped.trace(torch.tensor([[2, 3, 4]])):
            pass


def test_nnsight_without_its_weights() -> None:
    nnsight = pytest.importorskip("nnsight")
    with torch.device("meta"):
        wrapped = nnsight.NNsight(built("Llama"))
    with pytest.raises(ValueError, match=r"^NNsight: its weights are not loaded; create it with dispatch=True"):
        describe(wrapped)


def plain(bridge: Any) -> Any:
    return bridge


def folded(bridge: Any) -> Any:
    """As HookedTransformer computes: norms are folded into the weights that follow."""
    bridge.enable_compatibility_mode()
    return bridge


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("mode", [plain, folded])
def test_transformer_lens(name: str, mode: Callable[[Any], Any], tmp_path: Path) -> None:
    lens = pytest.importorskip("transformer_lens.model_bridge")
    bare = built(name, **HEADS)
    bare.save_pretrained(tmp_path)
    tiny_tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}'
    )
    bridge = mode(lens.TransformerBridge.boot_transformers(str(tmp_path), hf_model=built(name, **HEADS)))
    for variant in variants(name):
        found, wanted = observed(bridge, variant, 3), observed(bare, variant, 3)
        # Rounding of float32: norms are computed in another order.
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=float(1e-5 * wanted.mean()))
        assert entropy(found) == pytest.approx(entropy(wanted), abs=1e-5)
        print(f"{name}, {mode.__name__}, {variant}: H {entropy(found):.6f}, bare {entropy(wanted):.6f}")
    with observe(bridge):
        pass
    assert describe(bridge).startswith(type(bare).__name__)
    with pytest.raises(ValueError, match="no rows to multiply; edit the model without it"):
        rescale_model(bridge, {layer: torch.ones(found.shape[-1]) for layer in range(2)})
