"""Observe the memory coefficients of the feed-forward layers of any model.

Method section 1 (paper, section 3.1, equation 2). Shapes: B instances, T tokens, D = width of the model, M memories of
a part, M_l of layer l, E experts of a layer, N tokens of one expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from ..config.model import COEFFICIENTS
from ..model.olmo import Block, OLMo
from ..model.placement import device_of, to_one
from .forward import compiled_means, counted, means_in_pieces, token_means
from .locate import Layer, find_layers
from .maps import entry, outlet
from .parts import Experts, Memory, listed
from .unwrap import computing, is_sharded, loaded, uncompiled, unwrapped
from .up_projection import rectified, scaling_outputs, without_gate


class _LastCoefficientSeen(Exception):
    """Ends a forward pass once nothing that follows can change a coefficient."""


class Observation:
    """Mean coefficients of the instances of the last forward pass.

    Set `mask` (B, T), 1 for tokens and 0 for padding, before the pass; None counts every position. `shape` (B, T) is
    only needed if the model flattens its tokens before the feed-forward layer, as OPT and mixtures of experts do. A
    layer with shared experts beside routed ones has several parts, whose memories are concatenated; `parts` has their
    number for each layer that has any.
    """

    def __init__(self, layers: Sequence[Layer], coefficient: str = "abs"):
        self.coefficient = coefficient
        self.parts = [len(layer.parts) for layer in layers if layer.parts]
        # Of every layer of the model, 0 where it has none.
        self.sizes = [sum(part.count for part in layer.parts) for layer in layers]
        self.mask: Tensor | None = None
        self.shape: torch.Size | None = None
        self.ends_early = True  # the forward pass of a model that is not ours, at the last coefficient
        self.sharded = False  # whether FSDP has sharded the weights; then every pass is one through the whole model
        self.compiled = False  # the layers of our own model, for `abs`; worth its minute on a GPU
        self.names = [part.name for layer in layers for part in layer.parts]
        self.counts = [part.count for layer in layers for part in layer.parts]
        self.complete = False  # whether a whole pass has shown that each part is used once
        self.of_parts: list[Tensor | None] = [None] * sum(self.parts)  # float32 (B, M)

    def begin(self, *_: object) -> None:
        """Forget the coefficients of the last pass."""
        self.of_parts[:] = [None] * len(self.of_parts)

    def _keep(self, part: int, means: Tensor) -> None:
        if self.of_parts[part] is not None:
            raise ValueError(f"{self.names[part]}: used more than once in a forward pass, which cannot be measured")
        self.of_parts[part] = means

    def record(self, part: int, coefficients: Tensor) -> None:
        """Reduce C (B, T, M) or (B T, M), non-negative or signed-for-abs, to its mean over tokens, float32 (B, M)."""
        if self.shape is not None and coefficients.shape[:-1] != self.shape:
            if coefficients.shape[:-1].numel() != self.shape.numel() or coefficients.ndim != 2:
                found, wanted = tuple(coefficients.shape[:-1]), tuple(self.shape)
                raise ValueError(f"{self.names[part]}: computed for tokens of shape {found}, the batch has {wanted}")
            coefficients = coefficients.unflatten(0, self.shape)
        if coefficients.shape[-1] != self.counts[part]:
            counts = f"{coefficients.shape[-1]} coefficients of {self.counts[part]}"
            raise ValueError(f"{self.names[part]}: {counts}; is the layer split over devices?")
        mask = None if self.mask is None else self.mask.to(coefficients.device)  # layers may be on several devices
        self._keep(part, token_means(coefficients, mask))

    def record_routed(self, part: int, coefficients: Iterator[tuple[Tensor, Tensor]]) -> None:
        """Reduce, expert by expert, the positions in the flattened batch of its tokens (N,) and their C (N, M) to means
        (B, E * M); the coefficients of all other tokens are 0."""
        assert self.shape is not None, "no shape of the batch"
        instances, length = self.shape
        means: list[Tensor] = []
        for tokens, values in coefficients:
            values = values.abs().float()
            if self.mask is not None:
                # Not multiplied by 0: padding that sees padding alone may have nan as its coefficient.
                values.masked_fill_(self.mask.to(tokens.device).flatten()[tokens, None] == 0, 0.0)
            # A product of matrices, unlike index_add_, gives the same sum every time on a GPU too.
            owner = torch.arange(instances, device=tokens.device)[:, None] == tokens // length
            means.append(owner.float() @ values)
        mean = torch.cat(means, 1)
        self._keep(part, mean / (length if self.mask is None else self.mask.sum(1, keepdim=True).to(mean.device)))

    def stop_after(self, part: int) -> None:
        """End the forward pass after the last part; if the last layer has several, their order is not known."""
        ends = self.ends_early and self.complete and not self.sharded
        if ends and self.parts[-1] == 1 and part == len(self.of_parts) - 1:
            raise _LastCoefficientSeen

    @property
    def means(self) -> list[Tensor]:
        """1/T_n sum_j C[n, j, i] of every layer that has memories, float32 (B, M_l) each."""
        means = [m for m in self.of_parts if m is not None]
        assert len(means) == len(self.of_parts), "no forward pass yet"
        ends = list(accumulate(self.parts))
        return [torch.cat(to_one(means[end - n : end]), 1) for end, n in zip(ends, self.parts)]


@contextmanager
def observe(model: nn.Module, coefficient: str = "abs") -> Iterator[Observation]:
    """Observe the memory coefficients of every forward pass inside the block; its hooks are removed when it ends.

    coefficient "abs": |act(gate) * up|, the absolute input of the down projection (equation 2).
    coefficient "relu": relu(gate) * up with negatives set to 0 (appendix A.2); of a plain MLP the input of the
    second projection with negatives set to 0.

    The memories of a mixture of experts (docs/entropy.md) are those of all experts, in the experts' order, then those
    of a shared expert, whose w_e is 1 or its sigmoid. c_e of routed experts is computed a second time, because
    transformers' fused implementations do not expose it.

    Raises ValueError where the memories cannot be found (`find_layers`), in a pass that uses one of them twice or not
    at all, and, for relu, where they are no product of a gate's activation and another factor. The model may be wrapped
    (`unwrapped`); inside the block, what torch.compile made of it is not used.
    """
    if coefficient not in COEFFICIENTS:
        raise ValueError(f"coefficient {coefficient!r} is none of {', '.join(COEFFICIENTS)}")
    model = unwrapped(model)
    layers = find_layers(model)
    observation = Observation(layers, coefficient)
    observation.sharded = is_sharded(model)
    blocks: Any = [*map(computing, model.blocks)] if isinstance(model, OLMo) else []
    for memory in (part for layer in layers for part in layer.parts if coefficient == "relu" and part.gated):
        if isinstance(memory, Memory) and memory.adapted:
            raise ValueError(f"{memory.name}: adapters add to gate and up projection of this layer, which relu needs")
        if not scaling_outputs(model, memory):
            raise without_gate(memory.name)
    with uncompiled(model), ExitStack() as hooks:
        for part, block in enumerate(blocks):
            block.tap = partial(_tap, observation, part, block)
            hooks.callback(setattr, block, "tap", None)
        for module in {model, getattr(model, "base_model", model)} if not blocks else ():
            hooks.enter_context(computing(module).register_forward_pre_hook(observation.begin))
        for part, memory in enumerate(memory for layer in layers for memory in layer.parts if not blocks):
            at = (part, observation)
            for handle in _experts_hooks(memory, *at) if isinstance(memory, Experts) else _hooks(memory, *at):
                hooks.enter_context(handle)
        yield observation


def _tap(observation: Observation, part: int, block: Block, projected: Tensor, signed: Tensor) -> None:
    observation.of_parts[part] = None
    observation.record(part, counted(block, projected, signed, observation.coefficient))


def _hooks(memory: Memory, part: int, observation: Observation) -> Iterator[Any]:
    inputs: dict[nn.Module, Tensor] = {}  # of first projections
    outputs: dict[nn.Module, Tensor] = {}
    halved = [outlet(first) for first in memory.into if observation.coefficient == "relu" and memory.gated]

    def keep_input(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs[module] = args[0]

    def keep_output(module: nn.Module, args: Any, output: Tensor) -> None:
        outputs[module] = output

    def before_down(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        signed = args[0]
        if halved:
            halves = tuple(outputs.pop(half) for half in halved)
            signed = rectified(halves if len(halves) == 2 else halves[0].chunk(2, dim=-1), signed, memory.name)
        if memory.weight is not None:
            signed = signed * memory.weight(inputs.pop(memory.into[0])).sigmoid()
        observation.record(part, signed.relu() if observation.coefficient == "relu" else signed)
        observation.stop_after(part)

    for half in halved:
        yield half.register_forward_hook(keep_output)
    if memory.weight is not None:
        yield memory.into[0].register_forward_pre_hook(keep_input)
    yield entry(memory.down).register_forward_pre_hook(before_down)


def _experts_hooks(memory: Experts, part: int, observation: Observation) -> Iterator[Any]:
    def before(module: nn.Module, args: tuple[Tensor, ...], keywords: dict[str, Tensor]) -> None:
        hidden, *routes = (*args, *keywords.values())
        if hasattr(module, "_hf_hook"):  # accelerate moves what enters after this
            hidden, *routes = (given.to(device_of(module)) for given in (hidden, *routes))
        called = len(routes) == (0 if memory.each else 2) and hidden.ndim == 2
        if not called or any(route.shape != routes[0].shape or len(route) != len(hidden) for route in routes):
            raise ValueError(f"{memory.name}: the experts are not called with tokens and their routes")
        with loaded(module):
            observation.record_routed(part, _routed(memory, hidden, routes, observation.coefficient))
        observation.stop_after(part)

    yield memory.module.register_forward_pre_hook(before, with_kwargs=True)


def _routed(
    memory: Experts, hidden: Tensor, routes: Sequence[Tensor], coefficient: str
) -> Iterator[tuple[Tensor, Tensor]]:
    """For each expert the rows (N,) of its tokens in hidden (T, D), and w_e * c_e (N, M); routes are their experts and
    router weights, (T, K) each. Without them hidden (E * T, D) holds each expert's tokens, which have their weights."""
    for expert in range(memory.experts):
        if memory.each:
            own_hidden = hidden.view(memory.experts, -1, hidden.shape[-1])[expert]
            tokens, weights = torch.arange(len(own_hidden), device=hidden.device), None
        else:
            tokens, place = torch.where(routes[0] == expert)
            own_hidden, weights = hidden[tokens], routes[1][tokens, place, None]
        projected = memory.projected(own_hidden, expert)
        own = memory.coefficients(projected)
        if coefficient == "relu":
            own = rectified(projected.chunk(2, dim=-1), own, memory.name) if memory.gated else own.relu()
        own = own if weights is None else own * weights
        yield tokens, own if memory.scale == 1.0 else own * memory.scale


@torch.no_grad()
def instance_means(
    model: nn.Module, observation: Observation, input_ids: Tensor, mask: Tensor | None = None
) -> list[Tensor]:
    """Mean coefficients of each instance, float32 (B, M_l) for every layer that has memories, by a forward pass that
    ends at the last coefficient.

    input_ids (B, T); mask (B, T), 1 for tokens. Neither the last down projection nor the vocabulary is computed.
    """
    model = unwrapped(model)
    square = len(input_ids) == input_ids.shape[1] > 1 and not observation.sharded
    if square and not isinstance(model, OLMo) and not observation.complete:
        # A model that takes tokens first, instances second (XLNet) is noticed by shapes that are not square.
        instance_means(model, observation, input_ids[:1], None if mask is None else mask[:1])
    observation.mask, observation.shape = mask, input_ids.shape
    if isinstance(model, OLMo):
        if observation.compiled and observation.coefficient == "abs":
            observation.of_parts[:] = compiled_means(model, input_ids, mask)
        else:
            observation.of_parts[:] = means_in_pieces(model, input_ids, mask, observation.coefficient)
    else:
        called = model if observation.sharded else model.base_model
        with suppress(_LastCoefficientSeen):
            called(input_ids=input_ids, attention_mask=mask, use_cache=False)  # type: ignore[operator]
        unused = [name for name, mean in zip(observation.names, observation.of_parts) if mean is None]
        if unused:
            raise ValueError(f"{type(model).__name__}: a forward pass does not use {listed(unused)}")
        observation.complete = True  # from now on passes end at the last coefficient
    return observation.means
