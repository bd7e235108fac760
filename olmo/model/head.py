"""How a model of transformers' computes logits from the scores of its vocabulary, found by calling it with chosen ones.

Families differ in what follows the product with the vocabulary: nothing, a scale (Cohere, Granite), or a soft cap
(Gemma 2). The loss applies the same, because it computes the logits of only some tokens at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_TOKENS = 6
_LARGE = 30.0  # of the scores that the soft cap is shown; those of new weights are too small to be capped


@dataclass(frozen=True)
class Head:
    """z = s / divisor of scores s = h W^T + b, and with a cap c tanh(z / c); h is what the module with W and b, the
    vocabulary, is called with."""

    divisor: float = 1.0
    cap: float | None = None

    def logits(self, scores: Tensor) -> Tensor:
        """Logits of scores, of any shape."""
        if self.divisor != 1.0:
            scores = scores / self.divisor
        return scores if self.cap is None else torch.tanh(scores / self.cap) * self.cap


@torch.no_grad()
def find_head(network: Any) -> Head | None:
    """The head of a network, on whatever device it is; None if logits are not computed as `Head` does.

    The network is called once, with random numbers in place of its scores: what remains does not depend on any weight.
    """
    linear = network.get_output_embeddings()
    if not isinstance(linear, nn.Linear):
        return None
    generator = torch.Generator().manual_seed(0)
    ids = torch.zeros(1, _TOKENS, dtype=torch.long, device=linear.weight.device)
    seen: list[Tensor] = []

    def replace_scores(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        seen.append((torch.randn(output.shape, generator=generator) * _LARGE).to(output))
        return seen[-1].clone()  # some families cap in place

    training = network.training
    network.eval()
    try:
        with linear.register_forward_hook(replace_scores):
            logits = network(input_ids=ids, use_cache=False).logits
    finally:
        network.train(training)
    if len(seen) != 1 or seen[0].shape != logits.shape:
        return None
    numbers = list(_numbers(network.config))
    factors = [1.0, *(factor for number in numbers for factor in (number, 1 / number))]
    for cap in (None, *numbers):
        for factor in factors:
            head = Head(1 / factor, cap)
            if torch.allclose(head.logits(seen[0]).float(), logits.float(), rtol=1e-5, atol=1e-5):
                return head
    return None


def _numbers(config: Any) -> Iterator[float]:
    """The numbers of a configuration above 0."""
    for value in config.get_text_config().to_dict().values():
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0:
            yield float(value)
