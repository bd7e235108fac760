"""Scores over the vocabulary, with the logits of only some tokens in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model.causal_lm import Model

PREDICTIONS = 1024  # tokens whose logits are in memory at a time: 200 MB in float32 for 50,304 rows of a vocabulary

Score = TypeVar("Score")


def score_in_parts(model: Model, hidden: Tensor, score: Callable[..., Score], *beside: Tensor) -> list[Score]:
    """`score(logits, *beside)` of at most PREDICTIONS tokens at a time, in order.

    hidden (n, D) and beside (n, ...) are split alike; `score` gets their logits, float32 (k, V), and k rows of each.
    """
    parts = zip(*(tensor.split(PREDICTIONS) for tensor in (hidden, *beside)))
    return [score(model.logits(states).float(), *others) for states, *others in parts]


def perplexity(loss: float) -> float:
    """exp(loss); infinity beyond the largest float64."""
    return math.exp(loss) if not loss > 709 else math.inf


def token_losses(model: Model, hidden: Tensor, targets: Tensor) -> Tensor:
    """Negative log-probabilities (n,), float32, of targets (n,) after hidden states (n, D)."""

    def losses(logits: Tensor, wanted: Tensor) -> Tensor:
        return F.cross_entropy(logits, wanted, reduction="none")

    return torch.cat(score_in_parts(model, hidden, losses, targets))
