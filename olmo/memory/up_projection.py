"""Which rows of a feed-forward part scale its memory coefficients: those of the up projection, told from the gate.

They are found by doubling the outputs of either projection and comparing coefficients.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..model.olmo import OLMo
from .maps import entry, is_conv1d, is_quantized, outlet, sizes, wrapped_map
from .parts import Experts, Memory, random_tokens, with_weights
from .unwrap import is_sharded, unwrapped


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
    if is_sharded(model):
        raise ValueError(
            f"{part.name}: FSDP has sharded this layer, so its gate cannot be told from its up projection; measure a "
            "saved checkpoint instead"
        )
    block = model.get_submodule(part.name.rpartition(".")[0])
    plain = _coefficients(block, part, part.into[0], slice(0))
    return [half for half in halves if _are_twice(_coefficients(block, part, *half), plain)]


def _are_twice(found: Tensor, plain: Tensor) -> bool:
    """Whether coefficients are twice the others: exactly, but for the rounding of numbers so small that their type has
    fewer digits for them, which many coefficients in float16 are."""
    info = torch.finfo(plain.dtype)
    smallest = info.smallest_normal * info.eps
    return bool(((found.double() - 2 * plain.double()).abs() <= 2 * smallest).all())


def parameters_of(
    module: Any, part: Memory | Experts, rows: slice, own: Tensor
) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """The weight and the bias of a first projection, and the factors that multipliers (M,) of its memories make."""
    if isinstance(part, Experts):
        weight = "gate_up_proj" if part.gated else "up_proj"
        bias, transposed, own = f"{weight}_bias", part.transposed, own.view(part.experts, -1)
    else:
        yield from _of_adapters(module, part.name, rows, own)
        module = wrapped_map(module)
        weight, bias, transposed = "weight", "bias", is_conv1d(module)
    matrix = getattr(module, weight)
    factors = own.new_ones(*own.shape[:-1], matrix.shape[-1 if transposed else -2])
    factors[..., rows] = own
    yield matrix, factors.unsqueeze(-2 if transposed else -1)
    if getattr(module, bias, None) is not None:
        yield getattr(module, bias), factors


def _of_adapters(module: Any, name: str, rows: slice, own: Tensor) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """The same for the adapters of a first projection: u (W + s B A) has the rows of W and of B multiplied. What
    multiplies its outputs (IA3) stays."""
    inner = wrapped_map(module)
    if is_quantized(inner):
        raise ValueError(f"{name}: the up projection of this layer is quantized; edit the model before it is quantized")
    while module is not inner:
        adapters: Any = getattr(module, "lora_B", {})
        plain = bool(adapters) and all(type(one) is nn.Linear for one in adapters.values())
        known = plain and not getattr(module, "lora_variant", None) and not len(module.lora_magnitude_vector)
        if not known and not hasattr(module, "ia3_l"):
            kind = f"{type(module).__module__.partition('.')[0]}'s {type(module).__qualname__}"
            raise ValueError(
                f"{name}: the up projection of this layer is wrapped in {kind}, which has no rows to multiply; edit "
                "the model without it (of PEFT: after model.merge_and_unload())"
            )
        for one in adapters.values():
            factors = own.new_ones(one.out_features)
            factors[rows] = own
            yield one.weight, factors[:, None]
            if one.bias is not None:
                yield one.bias, factors
        module = module.base_layer


def rectified(halves: tuple[Tensor, ...], signed: Tensor, name: str) -> Tensor:
    """relu(gate) * up with negatives set to 0, of gate and up in either order: it equals relu(gate) * relu(up).

    Raises ValueError if `signed`, the model's own coefficients, does not have the sign of the product of both, as with
    every usual activation: the halves are interleaved, or there is no gate.
    """
    first, second = halves
    if (first.sign() * second.sign() * signed.sign() < 0).any():
        raise without_gate(name)
    return first.relu() * second.relu()


def without_gate(name: str) -> ValueError:
    return ValueError(f"{name}: cannot tell gate and up projection of this layer, which relu needs")


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
        with entry(down).register_forward_pre_hook(keep), outlet(first).register_forward_hook(double):
            block(random_tokens(block, sizes(first)[0], 8))
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:  # it needs more than tokens
        raise ValueError(f"{memory.name}: cannot tell the up projection of this layer from its gate") from error
    return seen[0]
