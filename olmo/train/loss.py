"""The training loss, with the logits of only some tokens in memory at a time.

The logits of 32 x 1024 tokens over 50,304 entries of a vocabulary are 6.6 GB in float32, and with their gradient and
temporary copies several times that. Here the logits of a part of the tokens are computed, reduced to the loss and the
gradients of hidden states and vocabulary, and freed before the next part: nothing is computed twice.

N positions of a batch (rows x T), n of them predict a token that counts; D and V as in `olmo/model/olmo.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..model.causal_lm import CausalLM, Model
from ..model.olmo import LayerRunner

# Tokens whose logits are in memory at a time. Every part reads and writes the gradient of the vocabulary (V, D); on a
# GPU, where products are cheap compared with memory traffic, larger parts are faster.
TOKENS = {"cuda": 4096}
TOKENS_ELSEWHERE = 512
_CAPPED = 128  # of these, whose logits are copied for the derivative of a soft cap

Losses: TypeAlias = tuple[Tensor, Tensor, Tensor]
LossFunction: TypeAlias = Callable[..., Losses]  # as `linear_cross_entropy`


def predictions(input_ids: Tensor, label_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Which positions (n,) of the flattened rows predict a token that counts, and those tokens (n,); both int64.

    input_ids (B, T), label_mask (B, T) bool, the tokens that count; nothing predicts the first of a row. Call it before
    the rows are copied to a GPU: their number is then known without waiting for the GPU.
    """
    counted = torch.ones_like(input_ids, dtype=torch.bool) if label_mask is None else label_mask.clone()
    counted[:, 0] = False
    tokens = counted.flatten().nonzero()[:, 0]
    return tokens - 1, input_ids.flatten()[tokens]


class _LinearCrossEntropy(torch.autograd.Function):
    """(loss, cross-entropy, z-loss) of hidden states; the loss is the sum of the others and alone has a gradient.

    The forward pass computes the gradient for a loss of weight 1; the backward pass multiplies it, in place, once.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        places: Tensor,
        targets: Tensor,
        divisor: float,
        cap: float | None,
        z_multiplier: float | None,
    ) -> Losses:
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        exact = torch.promote_types(dtype, torch.float32)
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        hidden_gradient = torch.zeros_like(hidden) if wants_hidden else None
        weight_gradient = torch.zeros_like(weight, dtype=exact) if wants_weight else None
        bias_gradient = torch.zeros_like(bias, dtype=exact) if wants_bias and bias is not None else None
        cross_entropy, z_loss = hidden.new_zeros((), dtype=exact), hidden.new_zeros((), dtype=exact)
        size = min(TOKENS.get(kind, TOKENS_ELSEWHERE), max(len(places), 1))
        # All parts share these buffers: blocks of this size, allocated anew for each, fragment the heap.
        buffers = tuple(hidden.new_empty(size, len(weight), dtype=kept) for kept in (dtype, exact))
        with torch.autocast(kind, enabled=False):
            matrix, offset = weight.to(dtype), None if bias is None else bias.to(dtype)
            for chosen, wanted in zip(places.split(size), targets.unsqueeze(1).split(size)):
                states = hidden.index_select(0, chosen).to(dtype)
                logits, probabilities = (block[: len(chosen)] for block in buffers)
                if offset is None:
                    torch.mm(states, matrix.t(), out=logits)
                else:
                    torch.addmm(offset, states, matrix.t(), out=logits)
                if divisor != 1.0:
                    logits /= divisor
                if cap is not None:
                    logits.div_(cap).tanh_().mul_(cap)
                largest, scores = (t.to(exact) for t in (logits.amax(1, keepdim=True), logits.gather(1, wanted)))
                torch.softmax(logits, -1, dtype=exact, out=probabilities)
                # log of the sum of exp(logit - largest), whose largest term is 1: no second exp of all logits.
                log_sum = -probabilities.amax(1, keepdim=True).log()
                cross_entropy += (largest - scores + log_sum).sum()
                factor = None
                if z_multiplier is not None:
                    partition = largest + log_sum
                    z_loss += z_multiplier * partition.square().sum()
                    factor = 1.0 + 2.0 * z_multiplier * partition
                if not (wants_hidden or wants_weight or wants_bias):
                    continue
                gradient = probabilities if factor is None else probabilities.mul_(factor)
                gradient.scatter_add_(1, wanted, gradient.new_full((), -1.0).expand(wanted.shape))
                if cap is not None:  # z = c tanh(s / c), whose derivative is 1 - (z / c)^2
                    for rows, capped in zip(gradient.split(_CAPPED), logits.split(_CAPPED)):
                        rows.addcmul_(rows, capped.to(exact).div_(cap).square_(), value=-1)
                if divisor != 1.0:
                    gradient /= divisor
                if bias_gradient is not None:
                    bias_gradient += gradient.sum(0)
                if dtype != exact:
                    gradient = logits.copy_(gradient)
                if hidden_gradient is not None:
                    # Not by index_copy_, which is missing on MPS in torch 2.6 and very slow in later ones.
                    hidden_gradient[chosen] = (gradient @ matrix).to(hidden.dtype)
                if weight_gradient is not None and dtype == exact:
                    weight_gradient.addmm_(gradient.t(), states)
                elif weight_gradient is not None:
                    weight_gradient += gradient.t() @ states
        # Neither outputs nor inputs, so as attributes they make no reference cycle and are freed with the graph.
        ctx.gradients = (hidden_gradient, weight_gradient, bias_gradient)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.mark_non_differentiable(cross_entropy, z_loss)
        return cross_entropy + z_loss, cross_entropy, z_loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("backward: the gradient of this loss was already computed; it can be computed once")
        gradients, ctx.gradients = ctx.gradients, None
        scaled = (None if g is None else g.mul_(upstream).to(d) for g, d in zip(gradients, ctx.dtypes))
        return (*scaled, None, None, None, None, None)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    places: Tensor,
    targets: Tensor,
    *,
    divisor: float = 1.0,
    cap: float | None = None,
    z_multiplier: float | None = None,
) -> Losses:
    """(loss, cross-entropy, z-loss) summed over n predictions; the loss, the sum of both, alone has a gradient.

    hidden (N, D); weight (V, D), bias (V,) or none, whose scores are divided by `divisor`, then softly capped at `cap`;
    places (n,) of `hidden` that predict targets (n,). z-loss: `z_multiplier` times the squared log-partition; None: 0.
    Logits have the dtype of autocast, or else of `hidden`; all after them is float32 (float64 for float64).
    backward() may be called once, and has no second derivative.
    """
    return _LinearCrossEntropy.apply(hidden, weight, bias, places, targets, divisor, cap, z_multiplier)


def cross_entropy(logits: Tensor, targets: Tensor, z_multiplier: float | None = None) -> Losses:
    """`linear_cross_entropy` of given logits (n, V), all in memory at once, by torch's own operations."""
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss = F.cross_entropy(exact, targets, reduction="sum")
    z_loss = loss.new_zeros(()) if z_multiplier is None else z_multiplier * exact.logsumexp(1).square().sum()
    return loss + z_loss, loss.detach(), z_loss.detach()


class Objective(nn.Module):
    """A model with its loss, differentiated by a training step. One forward pass uses all parameters, so that FSDP and
    DDP see each of them."""

    def __init__(
        self,
        model: Model,
        z_multiplier: float | None = None,
        run_layer: LayerRunner | None = None,
        loss: LossFunction = linear_cross_entropy,
    ):
        super().__init__()
        self.model, self.z_multiplier, self.run_layer, self.loss = model, z_multiplier, run_layer, loss

    def forward(
        self, input_ids: Tensor, places: Tensor, targets: Tensor, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As `linear_cross_entropy`, of rows (B, T) and their `predictions`; attention_mask as in `OLMo`. Last, what
        the model adds to balance its experts, 0 for most, which has a gradient too."""
        model = self.model
        if isinstance(model, CausalLM) and model.has_auxiliary:
            hidden, auxiliary = model.balanced_states(input_ids, attention_mask)
        else:
            hidden = model.hidden_states(input_ids, attention_mask, self.run_layer)
            auxiliary = torch.zeros((), device=hidden.device)
        hidden = hidden.flatten(0, 1)
        if model.vocabulary is None:
            return *cross_entropy(hidden.index_select(0, places), targets, self.z_multiplier), auxiliary
        losses = self.loss(
            hidden,
            *model.vocabulary,
            places,
            targets,
            divisor=model.logit_divisor,
            cap=model.logit_cap,
            z_multiplier=self.z_multiplier,
        )
        return *losses, auxiliary
