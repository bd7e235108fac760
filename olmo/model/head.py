"""How a model of transformers' computes logits from its hidden states, found by calling it with chosen numbers.

Families differ in what surrounds the product with the vocabulary: a scale before it (MiniCPM) or behind it (Cohere,
Granite), or a soft cap (Gemma 2). The loss needs to know, because it computes the logits of only some tokens at a time.
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
    """z = s / divisor of scores s = h W^T + b, and with a cap c tanh(z / c)."""

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

    The network is called once, whose hidden states and scores are replaced on the way by random numbers: what remains
    does not depend on any weight.
    """
    linear = network.get_output_embeddings()
    if not isinstance(linear, nn.Linear):
        return None
    generator = torch.Generator().manual_seed(0)
    ids = torch.zeros(1, _TOKENS, dtype=torch.long, device=linear.weight.device)
    seen: dict[str, Tensor] = {}

    def replace_hidden(module: nn.Module, args: Any, output: Any) -> Any:
        seen["hidden"] = torch.randn(output[0].shape, generator=generator).to(output[0])
        output.last_hidden_state = seen["hidden"]
        return output

    def keep_input(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen["input"] = args[0]

    def replace_scores(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        seen["scores"] = (torch.randn(output.shape, generator=generator) * _LARGE).to(output)
        return seen["scores"].clone()  # some families cap in place

    training = network.training
    network.eval()
    hooks = (
        network.base_model.register_forward_hook(replace_hidden),
        linear.register_forward_pre_hook(keep_input),
        linear.register_forward_hook(replace_scores),
    )
    try:
        logits = network(input_ids=ids, use_cache=False).logits
    except AttributeError:  # its output has other names
        return None
    finally:
        for hook in hooks:
            hook.remove()
        network.train(training)
    if seen.keys() != {"hidden", "input", "scores"} or seen["input"].shape != seen["hidden"].shape:
        return None
    before = _factor(seen["input"], seen["hidden"])
    if before is None or (before != 1.0 and linear.bias is not None):
        return None
    numbers = list(_numbers(network.config))
    factors = [1.0, *(factor for number in numbers for factor in (number, 1 / number))]
    for cap in (None, *numbers):
        for factor in factors if cap is None else (1.0,):
            if _equal(Head(1 / factor, cap).logits(seen["scores"]), logits):
                return Head(1 / (factor * before), cap)
    return None


def _factor(scaled: Tensor, original: Tensor) -> float | None:
    """f where scaled = f * original; None if there is none."""
    found = float((scaled.double().cpu() * original.double().cpu()).sum() / original.double().cpu().square().sum())
    found = 1.0 if torch.equal(scaled, original) else found
    return found if found and _equal(scaled, original * found) else None


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one.float(), other.float(), rtol=1e-5, atol=1e-5)


def _numbers(config: Any) -> Iterator[float]:
    """The numbers of a configuration above 0."""
    for value in config.get_text_config().to_dict().values():
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0:
            yield float(value)
