"""Which rows of a feed-forward part scale its memory coefficients: those of the up projection, told from the gate.

They are found by doubling the outputs of either projection and comparing coefficients.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..model.olmo import OLMo
from .maps import sizes
from .parts import Experts, Memory, random_tokens, with_weights
from .unwrap import unwrapped


def up_projection(model: nn.Module, part: Memory | Experts) -> tuple[nn.Module, slice]:
    """The module, and which outputs of its first projection scale the coefficients: in a gated layer those of the up
    projection, in a plain one all.

    `model` may be on the meta device. Raises ValueError if the up projection cannot be told from the gate.
    """
    if isinstance(part, Memory) and part.adapted:
        raise ValueError(f"{part.name}: adapters add to the up projection of this layer, which has no rows of its own")
    found = scaling_outputs(model, part)
    if len(found) != 1:
        these = "these experts from their" if isinstance(part, Experts) else "this layer from its"
        raise ValueError(f"{part.name}: cannot tell the up projection of {these} gate")
    return found[0]


def scaling_outputs(model: nn.Module, part: Memory | Experts) -> list[tuple[nn.Module, slice]]:
    """Each half of a gated layer's first projection to which the coefficients are proportional, as `up_projection`
    returns it: of ReLU's gates both, of coefficients that are normalized, or no product of two factors, none."""
    if isinstance(part, Experts):
        return (
            [(part.module, half) for half in _halves_of_experts(part)] if part.gated else [(part.module, slice(None))]
        )
    model = unwrapped(model)
    halves = [(module, slice(None)) for module in part.into]
    if part.gated and len(part.into) == 1:
        halves = [(part.into[0], half) for half in (slice(part.count), slice(part.count, None))]
    if isinstance(model, OLMo) or not part.gated:
        return halves[:1]
    block = model.get_submodule(part.name.rpartition(".")[0])
    plain = _coefficients(block, part, part.into[0], slice(0))
    return [half for half in halves if torch.equal(_coefficients(block, part, *half), 2 * plain)]  # exact


def _halves_of_experts(part: Experts) -> list[slice]:
    """Which outputs of each expert's first projection scale the coefficients: one of two blocks, or every other."""
    count = part.count // part.experts
    projected = torch.randn(8, 2 * count, generator=torch.Generator().manual_seed(0))
    doubling = []
    for half in (slice(count), slice(count, None), slice(0, None, 2), slice(1, None, 2)):
        changed = projected.clone()
        changed[:, half] *= 2
        if torch.equal(part.coefficients(changed), 2 * part.coefficients(projected)) and count > 1:
            doubling.append(half)
    return doubling


@torch.no_grad()
def _coefficients(block: nn.Module, memory: Memory, first: nn.Module, doubled: slice) -> Tensor:
    """The input of a layer's down projection for random tokens, with some outputs of a first projection doubled."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0])

    def double(module: nn.Module, args: object, output: Tensor) -> Tensor:
        output = output.clone()
        output[..., doubled] *= 2
        return output

    block, down, first = with_weights(block, memory.down, first)
    try:
        with down.register_forward_pre_hook(keep), first.register_forward_hook(double):
            block(random_tokens(block, sizes(first)[0], 8))
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:  # it needs more than tokens
        raise ValueError(f"{memory.name}: cannot tell the up projection of this layer from its gate") from error
    return seen[0]
