"""The paper's other entropies, of attention and of the next token, beside the memory coefficients, in one forward pass.

Method section 1 (paper, appendix A.3 and A.4). Shapes: B instances, T tokens, L layers, H heads, K key-value heads,
C numbers a head, V tokens in the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from olmo.memory import Observation, instance_means
from olmo.model import OLMo

MEASURES = ("knowledge", "attention", "next_token")
SCORES_AT_ONCE = 2**23  # float32 numbers: 32 MB


def distribution_entropy(scores: Tensor) -> Tensor:
    """Entropy of softmax(scores) over the last dimension, natural log, float32 (..., n) -> (...)."""
    shifted = scores.float() - scores.amax(-1, keepdim=True).float()
    # Scores of -inf, as masks have them, would make 0 * -inf of the sum below.
    shifted.clamp_(min=-1e30)
    weights = shifted.exp()
    total = weights.sum(-1)
    return total.log() - weights.mul_(shifted).sum(-1) / total


def attention_entropy(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """- sum_i A_ji log A_ji of every position j (appendix A.3), float32 (B, H, T), in blocks of queries.

    query (B, H, T, C), key (B, K, T, C) and the others as scaled_dot_product_attention takes them.
    """
    batch, heads, length, size = query.shape
    groups = heads // key.shape[1]
    grouped = query.unflatten(1, (-1, groups)).float() * (size**-0.5 if scale is None else scale)  # (B, K, H / K, T, C)
    keys = key.float().transpose(-1, -2)[:, :, None]
    entropy = torch.empty(batch, heads, length, device=query.device)
    step = max(SCORES_AT_ONCE // (batch * heads * key.shape[2]), 1)
    for start in range(0, length, step):
        stop = min(start + step, length)
        end = stop if is_causal else key.shape[2]
        scores = (grouped[..., start:stop, :] @ keys[..., :end]).flatten(1, 2)
        if is_causal:
            later = torch.ones(stop - start, end, dtype=torch.bool, device=query.device).triu(start + 1)
            scores.masked_fill_(later, float("-inf"))
        if attn_mask is not None:
            part = attn_mask.expand(*attn_mask.shape[:-2], length, key.shape[2])[..., start:stop, :end]
            scores = scores.masked_fill(~part, float("-inf")) if part.dtype == torch.bool else scores + part
        entropy[..., start:stop] = distribution_entropy(scores)
    return entropy


class AttentionWatch(TorchFunctionMode):
    """Within `with`, every call of scaled_dot_product_attention leaves its entropy (B, H, T) in `calls`."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            self.calls.append(_entropy_of_call(*args, **(kwargs or {})))
        return func(*args, **(kwargs or {}))


def _entropy_of_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    return attention_entropy(query, key, attn_mask, is_causal, scale)


def next_token_entropy(model: nn.Module, output: Tensor) -> Tensor:
    """Entropy of the distribution over the vocabulary (appendix A.4), float32 (B, T), in blocks of tokens.

    output: our model's hidden states (B, T, D), or any model's logits (B, T, V).
    """
    rows = model.config.embedding_size or model.config.vocab_size if isinstance(model, OLMo) else output.shape[-1]
    pieces = output.split(max(SCORES_AT_ONCE // (output.shape[0] * rows), 1), 1)
    return torch.cat([distribution_entropy(model.logits(p) if isinstance(model, OLMo) else p) for p in pieces], 1)


@torch.no_grad()
def instance_measures(
    model: nn.Module,
    observation: Observation,
    input_ids: Tensor,
    mask: Tensor | None = None,
    measures: Sequence[str] = ("knowledge",),
) -> dict[str, Tensor]:
    """What every instance gives, each a mean over its tokens, float32: `knowledge` (B, L, M), always, `attention`
    (B, L), also over the heads, `next_token` (B,).

    input_ids (B, T); mask (B, T), 1 for tokens. Raises ValueError where attention is not computed by one call of
    scaled_dot_product_attention a layer.
    """
    to_the_end = "next_token" in measures
    if to_the_end and not isinstance(model, OLMo) and (len(input_ids) > 1 or mask is not None):
        # The logits of several instances are many, and only the whole model knows how it scales them.
        lengths = [input_ids.shape[1]] * len(input_ids) if mask is None else mask.sum(1).tolist()
        each = [
            instance_measures(model, observation, ids[None, :length], None, measures)
            for ids, length in zip(input_ids, lengths)
        ]
        return {name: torch.cat([one[name] for one in each]) for name in each[0]}
    found: dict[str, Tensor] = {}
    with AttentionWatch() if "attention" in measures else nullcontext() as watch:
        if not to_the_end:
            instance_means(model, observation, input_ids, mask)
        else:
            observation.mask, observation.shape, observation.ends_early = mask, input_ids.shape, False
            output = model.hidden_states(input_ids) if isinstance(model, OLMo) else model(input_ids, use_cache=False)
            observation.ends_early = True
            logits_or_states = output if isinstance(output, Tensor) else output.logits
            found["next_token"] = _over_tokens(next_token_entropy(model, logits_or_states), mask)
    found["knowledge"] = observation.means
    if watch is not None:
        layers, calls = observation.means.shape[1], watch.calls
        of_layer, rest = divmod(len(calls), layers)  # our own model takes some instances at a time
        by_layer = [torch.cat(calls[n * of_layer : (n + 1) * of_layer]) for n in range(layers)] if of_layer else []
        if rest or [len(layer) for layer in by_layer] != [len(input_ids)] * layers:
            raise ValueError(
                f"{type(model).__name__}: {len(calls)} calls of scaled_dot_product_attention for {layers} layers; "
                "attention entropy needs one a layer"
            )
        found["attention"] = torch.stack([_over_tokens(layer.mean(1), mask) for layer in by_layer], 1)
    return found


def _over_tokens(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the tokens of each instance, (B, T) -> (B,)."""
    if mask is None:
        return values.mean(1)
    # Not multiplied: padding that sees padding alone has no entropy, but nan.
    return values.masked_fill(mask == 0, 0.0).sum(1) / mask.sum(1)
