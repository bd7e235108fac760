"""The paper's other entropies, of attention and of the next token, and memory coefficients, in one forward pass.

Method section 1 (paper, appendix A.3 and A.4). Shapes: B instances, T tokens, L layers, H heads, K key-value heads,
C numbers per head, V tokens in the vocabulary, M memories of all layers.
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
from olmo.model.placement import to_one

SCORES_AT_ONCE = 2**23  # float32 values: 32 MB


def distribution_entropy(scores: Tensor) -> Tensor:
    """Entropy of softmax(scores) over the last dimension, natural log, float32 (..., n) -> (...)."""
    shifted = scores.float() - scores.amax(-1, keepdim=True).float()
    # Masks set scores to -inf, which would make the sum below 0 * -inf.
    shifted.clamp_(min=-1e30)
    weights = shifted.exp()
    total = weights.sum(-1)
    return total.log() - weights.mul_(shifted).sum(-1) / total


def attention_entropy(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """- sum_i A_ji log A_ji of every position j (appendix A.3), float32 (B, H, T), in blocks of queries.

    The arguments are those of scaled_dot_product_attention: query (B, H, T, C), key (B, K, T, C).
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
    """Within `with`, appends the entropy (B, H, T) of every call of scaled_dot_product_attention to `calls`."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            self.calls.append(attention_entropy(*args, **(kwargs or {})))
        return func(*args, **(kwargs or {}))


def next_token_entropy(model: nn.Module, output: Tensor) -> Tensor:
    """Entropy of the distribution over the vocabulary (appendix A.4), float32 (B, T), in blocks of tokens.

    output: our model's hidden states (B, T, D), or any model's logits (B, T, V).
    """
    rows = model.config.embedding_size or model.config.vocab_size if isinstance(model, OLMo) else output.shape[-1]
    pieces = output.split(max(SCORES_AT_ONCE // (output.shape[0] * rows), 1), 1)
    return torch.cat([distribution_entropy(model.logits(p) if isinstance(model, OLMo) else p) for p in pieces], 1)


@torch.no_grad()
def instance_entropies(
    model: nn.Module,
    observation: Observation,
    input_ids: Tensor,
    mask: Tensor | None = None,
    measures: Sequence[str] = ("knowledge",),
) -> dict[str, Tensor]:
    """Means over the tokens of each instance, float32, by measure: `knowledge`, its coefficients (B, M), layer after
    layer, always; `attention` (B, L), also averaged over heads, of all L layers; `next_token` (B,).

    input_ids (B, T); mask (B, T), 1 for tokens. Raises ValueError unless each layer computes its attention by one call
    of scaled_dot_product_attention.
    """
    with_logits = "next_token" in measures
    if with_logits and not isinstance(model, OLMo) and (len(input_ids) > 1 or mask is not None):
        # Logits of several instances need much memory, and only the model's own head knows how to scale them.
        lengths = [input_ids.shape[1]] * len(input_ids) if mask is None else mask.sum(1).tolist()
        each = [
            instance_entropies(model, observation, ids[None, :length], None, measures)
            for ids, length in zip(input_ids, lengths)
        ]
        return {name: torch.cat([one[name] for one in each]) for name in each[0]}
    values: dict[str, Tensor] = {}
    with AttentionWatch() if "attention" in measures else nullcontext() as watch:
        if not with_logits:
            instance_means(model, observation, input_ids, mask)
        else:
            observation.mask, observation.shape, observation.ends_early = mask, input_ids.shape, False
            output = model.hidden_states(input_ids) if isinstance(model, OLMo) else model(input_ids, use_cache=False)
            observation.ends_early = True
            if not isinstance(output, Tensor) and not hasattr(output, "logits"):
                raise ValueError(
                    f"{type(model).__name__}: has no logits, which next_token needs; use the model with its head"
                )
            logits_or_states = output if isinstance(output, Tensor) else output.logits
            values["next_token"] = _over_tokens(next_token_entropy(model, logits_or_states), mask)
    values["knowledge"] = torch.cat(to_one(observation.means), 1)
    if watch is not None:
        layers, calls = len(observation.sizes), watch.calls
        per_layer, rest = divmod(len(calls), layers)  # our own model may take only some instances at a time
        by_layer = [torch.cat(calls[n * per_layer : (n + 1) * per_layer]) for n in range(layers)] if per_layer else []
        if rest or [len(layer) for layer in by_layer] != [len(input_ids)] * layers:
            raise ValueError(
                f"{type(model).__name__}: {len(calls)} calls of scaled_dot_product_attention for {layers} layers; "
                "attention entropy needs one per layer"
            )
        values["attention"] = torch.stack(to_one([_over_tokens(layer.mean(1), mask) for layer in by_layer]), 1)
    return values


def _over_tokens(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the tokens of each instance, (B, T) -> (B,)."""
    if mask is None:
        return values.mean(1)
    mask = mask.to(values.device)
    # Not multiplied by 0: padding that attends to padding alone has an entropy of nan.
    return values.masked_fill(mask == 0, 0.0).sum(1) / mask.sum(1)
