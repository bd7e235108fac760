"""Loss on held-out token files: the mean negative log-probability of every token after the first of an instance."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from ..data.sources import TokenSource, check_tokens
from ..distributed.ranks import Ranks
from ..model.causal_lm import Model
from .scoring import token_losses


@torch.no_grad()
def instance_losses(
    model: Model,
    source: TokenSource,
    batch_size: int,
    device: torch.device,
    ranks: Ranks,
    limit: int | None = None,
    progress: Callable[[int], None] = lambda _: None,
    where: str = "",
) -> NDArray[np.float64]:
    """Mean loss (n,), natural log, of each of the first `limit` instances (default: all).

    Instances are distributed over the ranks in turn, each is scored once. Log-probabilities in float32, means in
    float64. `progress` is called with the number of instances scored since the last call. Raises ValueError, with
    `where`, for a token that the model does not have.
    """
    count = len(source) if limit is None else min(limit, len(source))
    losses = np.zeros(count, dtype=np.float64)
    mine = np.arange(ranks.rank, count, ranks.world_size)
    for start in range(0, len(mine), batch_size):
        chosen = mine[start : start + batch_size]
        tokens = source.read(chosen)
        check_tokens(tokens, chosen, model.config.rows, where)
        ids = torch.from_numpy(tokens).to(device)
        loss = token_losses(model, model.hidden_states(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        losses[chosen] = loss.view(len(chosen), -1).cpu().double().mean(1).numpy()
        progress(len(chosen))
    return ranks.sum(losses)
