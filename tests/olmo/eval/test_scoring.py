"""Scores over the vocabulary in parts are those of all logits together."""

from __future__ import annotations

import pytest
import torch

from olmo.eval import scoring
from olmo.eval.scoring import token_losses
from olmo.model import OLMo
from tests.reference import tiny_olmo2_config


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_token_losses_are_the_models(monkeypatch: pytest.MonkeyPatch, precision: torch.dtype) -> None:
    """In float32, whatever the logits have."""
    torch.manual_seed(0)
    model, ids = OLMo(tiny_olmo2_config()).eval().to(precision), torch.randint(128, (2, 16))
    monkeypatch.setattr(scoring, "PREDICTIONS", 7)
    with torch.no_grad():
        hidden = model.hidden_states(ids)[:, :-1].flatten(0, 1)
        found = token_losses(model, hidden, ids[:, 1:].flatten())
        wanted = -model(ids).double().log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None]).flatten()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-6)
