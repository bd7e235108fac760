"""Whether a model of transformers' can be trained here, found by calling it with a few tokens, whatever its weights.

What is checked is what training relies on: logits that depend on no later token, that are what our head computes, that
a forward pass in training gives too, and that padding in front of a text does not change.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .causal_lm import CausalLM

_ROWS, _TOKENS, _KEPT = 2, 8, 4
# In parts of the largest logit. Encoders with new weights, whose tokens hardly matter, reach 1e-3; rounding 1e-5.
_FAR = 2e-4
_SAME = 1e-5


@torch.no_grad()
def refusal(model: CausalLM) -> str | None:
    """Why a network cannot be trained as a causal language model; None if it can.

    Where its logits are not those of its `head`, that is set to None; `has_auxiliary` and `obeys_mask` are set, too.
    Raises whatever the network does where it cannot be called with tokens alone.
    """
    network, training = model.network, model.training
    ids = _tokens(network)
    model.eval()
    try:
        logits = network(input_ids=ids, use_cache=False).logits
        if logits.shape[:2] != ids.shape or not _far(network, ids[:, :_KEPT], logits[:, :_KEPT]) < _FAR:
            return "its logits depend on later tokens, so it is no causal language model"
        if model.head is not None and not _distance(model(ids), logits) < _SAME:
            model.head = None
        if model.has_auxiliary:  # some configurations have no experts to balance, and some routers are not recorded
            output = network.base_model(input_ids=ids, use_cache=False, output_router_logits=True)
            model.has_auxiliary = bool(getattr(output, "router_logits", None))
        mask = torch.ones_like(ids)
        mask[:, :_KEPT] = 0
        other = torch.cat((ids[:, :_KEPT].flip(1), ids[:, _KEPT:]), 1)
        shown = network(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, _KEPT:]
        model.obeys_mask = _far(network, other, shown, slice(_KEPT, None), mask) < _FAR
        network.train()
        (model.balanced_states if model.has_auxiliary else model.hidden_states)(ids)  # as a training step does
    finally:
        model.train(training)
    return None


def _tokens(network: Any) -> Tensor:
    """Random ids (rows, tokens) other than that of padding, which some families do not count."""
    embedding, padding = network.get_input_embeddings().weight, getattr(network.config, "pad_token_id", None)
    ids = torch.randint(len(embedding), (_ROWS, _TOKENS), generator=torch.Generator().manual_seed(0))
    ids[ids == padding] = 0 if padding else 1
    return ids.to(embedding.device)


def _far(network: Any, ids: Tensor, wanted: Tensor, part: slice = slice(None), mask: Tensor | None = None) -> float:
    return _distance(network(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, part], wanted)


def _distance(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, in parts of the largest number; weights that are not finite are no one's fault here."""
    found, wanted = found.nan_to_num(), wanted.nan_to_num()
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30))
