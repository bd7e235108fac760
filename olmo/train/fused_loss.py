"""The loss by Liger Kernel, which the key `fused_loss` chooses."""

from __future__ import annotations

import torch
from torch import Tensor

from ..exceptions import ConfigurationError, needs
from .loss import Losses, LossFunction, linear_cross_entropy


def fused_linear_cross_entropy(
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
    """`linear_cross_entropy` by Liger Kernel (github.com/linkedin/Liger-Kernel, 0.8), whose kernel replaces logits by
    their gradient in place, for about as many tokens at a time as give N x D logits.

    Gradients of weight and bias are summed in float32 and rounded once, to the parameter's type. It has no `divisor`;
    hidden states and bias are divided instead. Unlike ours it waits for the device, twice: it counts the targets, and
    compares the incoming gradient with 1.
    """
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    if not len(places):  # Liger divides by their number
        return linear_cross_entropy(
            hidden, weight, bias, places, targets, divisor=divisor, cap=cap, z_multiplier=z_multiplier
        )
    states = hidden.index_select(0, places)
    if torch.is_autocast_enabled(hidden.device.type):
        states = states.float()  # autocast rounds them for the product; z-losses have the dtype of the states
    found = liger_fused_linear_cross_entropy(
        states / divisor,
        weight,
        targets,
        bias=None if bias is None else bias / divisor,
        lse_square_scale=z_multiplier or 0.0,
        softcap=cap,
        reduction="sum",
        return_z_loss=True,
        accum_dtype=torch.float32,
    )
    z_loss = found.z_loss.detach()
    return found.loss, found.loss.detach() - z_loss, z_loss  # Liger's loss is the sum of both


def loss_function(fused: bool | None, device: torch.device) -> LossFunction:
    """The function that computes the loss of a training step, chosen by the key `fused_loss`."""
    if not fused:
        return linear_cross_entropy
    if device.type != "cuda":
        raise ConfigurationError(f"fused_loss: Liger Kernel needs a CUDA device, not {device.type}; leave it out")
    needs("liger_kernel.transformers.functional", "liger", "fused_loss")
    return fused_linear_cross_entropy
