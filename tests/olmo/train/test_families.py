"""A run of every family, from `load_path`, against a plain torch loop over transformers' own class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from olmo.distributed import Ranks
from olmo.model.causal_lm import CausalLM
from olmo.train import Trainer
from tests.architectures import built
from tests.plain_loop import batches, family_run, plain_loop
from tests.running import CPU, series

WITHOUT_DROPOUT = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Pythia": {},
    "Qwen2": {"tie_word_embeddings": True},
    "Gemma 2": {"final_logit_softcapping": 3.0},  # so that it matters in a model this small
    "Gemma 3": {},
    "GPT-2": WITHOUT_DROPOUT,
    "OLMoE": {"router_aux_loss_coef": 0.5},
}


@pytest.mark.parametrize("name", FAMILIES)
def test_twenty_steps_equal_a_plain_loop(name: str, tmp_path: Path) -> None:
    network = built(name, **FAMILIES[name])
    trainer = Trainer(family_run(tmp_path, network), CPU, Ranks())
    assert isinstance(trainer.model, CausalLM) and type(trainer.model.network) is type(network)
    trainer.fit()
    losses, added = plain_loop(network, batches(tmp_path))
    found = list(series(tmp_path / "run").values())
    print(
        name, losses[0], losses[-1], max(abs(a / b - 1) for a, b in zip(found, losses)), worst(trainer.model, network)
    )
    assert found == pytest.approx(losses, rel=1e-6) and losses[-1] < 0.9 * losses[0]
    balancing = list(series(tmp_path / "run", "train/LoadBalancingLoss").values())
    assert balancing == (pytest.approx(added, rel=1e-6) if name == "OLMoE" else [])
    assert worst(trainer.model, network) < 1e-5


def worst(model: CausalLM, network: torch.nn.Module) -> float:
    """The largest difference between their weights."""
    ours, theirs = model.network.state_dict(), network.state_dict()
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)
