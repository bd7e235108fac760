"""Observe the memory coefficients of the feed-forward layers of any model.

Method section 1 (paper, section 3.1, equation 2). Shapes: B instances, T tokens, L layers, M memories of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..model import Block, OLMo
from .locate import Experts, Memory, find_memories

COEFFICIENTS = ("abs", "relu")
SUMMED_AT_ONCE = 2**21  # coefficients, on a CPU: 8 MB
PROJECTED_AT_ONCE = 2**24  # numbers that a first projection of ours gives together, on a CPU: 1024 tokens of OLMo-1B
MEMORIES_AT_ONCE = 2048  # of a layer of ours whose coefficients are computed together, on a CPU


class _LastCoefficientSeen(Exception):
    """Ends a forward pass once nothing that follows can change a coefficient."""


class Observation:
    """Mean coefficients of the instances of the last forward pass.

    Set `mask` (B, T), 1 for tokens and 0 for padding, before the pass; None counts every position. `shape` (B, T)
    is only needed where a model flattens its tokens in front of the feed-forward layer, as OPT and mixtures of experts
    do. A layer has several `parts` where shared experts stand beside routed ones; their memories are one layer's.
    """

    def __init__(self, layers: int, parts: int = 1, coefficient: str = "abs"):
        self.coefficient = coefficient
        self.mask: Tensor | None = None
        self.shape: torch.Size | None = None
        self.ends_early = True  # the forward pass, at the last coefficient
        self.window: tuple[slice, slice] | None = None  # the instances and tokens that come now, where not all do
        self.compiled = False  # our own model's layers, for `abs`; worth its minute on a GPU
        self.parts = parts
        self._means: list[Tensor | None] = [None] * (layers * parts)

    def record(self, part: int, coefficients: Tensor) -> None:
        """Reduce C (B, T, M) or (B T, M), non-negative or signed-for-abs, to its mean over tokens, float32 (B, M)."""
        if coefficients.ndim == 2 and self.shape is not None:
            coefficients = coefficients.unflatten(0, self.shape)
        instances, length, memories = coefficients.shape
        rows, tokens = self.window or (slice(None), slice(None))
        mask = None if self.mask is None else self.mask[rows, tokens, None].bool()
        total = torch.zeros(instances, memories, device=coefficients.device)
        # On a CPU in pieces that stay in its cache, ten times faster than one sum over T; in no smaller ones, because
        # threads that wait for each other all the time suffer where they share processors with other work.
        size = length if coefficients.device.type != "cpu" else max(SUMMED_AT_ONCE // (instances * memories), 1)
        for start in range(0, length, size):
            piece = coefficients[:, start : start + size].abs().float()
            if mask is not None:
                piece.masked_fill_(~mask[:, start : start + size], 0.0)
            total += piece.sum(1)
        means = self._means[part]
        if self.window is None:
            self._means[part] = total / (length if self.mask is None else self.mask.sum(1, keepdim=True))
        else:
            assert self.shape is not None, "no shape of the batch"
            if means is None:
                means = self._means[part] = total.new_zeros(self.shape[0], memories)
            means[rows] += total / (self.shape[1] if self.mask is None else self.mask[rows].sum(1, keepdim=True))

    def record_routed(self, part: int, coefficients: Iterator[tuple[Tensor, Tensor]]) -> None:
        """Reduce, expert by expert, the numbers of the tokens routed to it (N,), counted through (B, T), and their C
        (N, M), to means (B, E * M); the coefficients of all other tokens of the batch are 0."""
        assert self.shape is not None, "no shape of the batch"
        instances, length = self.shape
        means = []
        for tokens, values in coefficients:
            values = values.abs().float()
            if self.mask is not None:
                # Not multiplied by 0: padding that sees padding alone may have no number as its coefficient.
                values.masked_fill_(self.mask.flatten()[tokens, None] == 0, 0.0)
            # A product of matrices, unlike index_add_, gives the same sum every time on a GPU too.
            owner = torch.arange(instances, device=tokens.device)[:, None] == tokens // length
            means.append(owner.float() @ values)
        self._means[part] = torch.cat(means, 1) / (length if self.mask is None else self.mask.sum(1, keepdim=True))

    def set(self, part: int, means: Tensor) -> None:
        """Take means, float32 (B, M), that were reduced elsewhere."""
        self._means[part] = means

    def forget(self) -> None:
        """Begin a forward pass that comes window by window."""
        self._means = [None] * len(self._means)

    def stop_after(self, part: int) -> None:
        """End the forward pass after the last part; where a layer has several, their order is not known."""
        if self.ends_early and self.parts == 1 and part == len(self._means) - 1:
            raise _LastCoefficientSeen

    @property
    def means(self) -> Tensor:
        """1/T_n sum_j C[n, j, i] of every layer, float32 (B, L, M)."""
        assert all(m is not None for m in self._means), "no forward pass yet"
        means = [m for m in self._means if m is not None]
        return torch.stack([torch.cat(means[i : i + self.parts], 1) for i in range(0, len(means), self.parts)], dim=1)


@contextmanager
def observe(model: nn.Module, coefficient: str = "abs") -> Iterator[Observation]:
    """Observe the memory coefficients of every forward pass inside the block; the hooks go when it ends.

    coefficient "abs": |act(gate) * up|, the absolute input of the down projection (equation 2).
    coefficient "relu": relu(gate) * up with negatives set to 0 (appendix A.2); of a plain MLP the input of the
    second projection with negatives set to 0.

    A mixture of experts writes sum_e w_e * V_e c_e. Its memories are those of all experts, in the experts' order,
    then those of a shared expert. A memory's coefficient is w_e * c_e, the router's weight times the expert's own
    coefficient; it is 0 for a token that is not routed to expert e. A shared expert's w_e is 1 or its sigmoid. c_e of
    routed experts is computed a second time, because transformers' fused implementations never show it.

    Raises ValueError where the memories cannot be told (`find_memories`) and, for relu, where they are no product of a
    gate's activation and something else.
    """
    if coefficient not in COEFFICIENTS:
        raise ValueError(f"coefficient {coefficient!r} is none of {', '.join(COEFFICIENTS)}")
    layers = find_memories(model)
    observation = Observation(len(layers), len(layers[0]), coefficient)
    handles: list[Any] = []
    try:
        for part, memory in enumerate(memory for layer in layers for memory in layer):
            if isinstance(memory, Experts):
                handles.extend(_experts_hooks(memory, part, observation, coefficient))
            else:
                handles.extend(_hooks(memory, part, observation, coefficient))
        yield observation
    finally:
        for handle in handles:
            handle.remove()


def _hooks(memory: Memory, part: int, observation: Observation, coefficient: str) -> Iterator[Any]:
    kept: dict[str, Tensor] = {}

    def keep_input(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        kept["input"] = args[0]

    def keep_output(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            kept[name] = output

        return hook

    def before_down(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        signed = args[0]
        if "first" in kept:
            first = kept.pop("first")
            halves = (first, kept.pop("second")) if "second" in kept else first.chunk(2, dim=-1)
            signed = _rectified(halves, signed, memory.name)
            if memory.temperature is not None:
                signed = signed / memory.temperature
        if memory.weight is not None:
            signed = signed * memory.weight(kept.pop("input")).sigmoid()
        observation.record(part, signed.relu() if coefficient == "relu" else signed)
        observation.stop_after(part)

    if coefficient == "relu" and memory.gated:
        for name, module in zip(("first", "second"), memory.into):
            yield module.register_forward_hook(keep_output(name))
    if memory.weight is not None:
        yield memory.into[0].register_forward_pre_hook(keep_input)
    yield memory.down.register_forward_pre_hook(before_down)


def _experts_hooks(memory: Experts, part: int, observation: Observation, coefficient: str) -> Iterator[Any]:
    def before(module: nn.Module, args: tuple[Tensor, ...], keywords: dict[str, Tensor]) -> None:
        hidden, chosen, weights = (*args, *keywords.values())
        if hidden.ndim != 2 or chosen.shape != weights.shape or len(chosen) != len(hidden):
            raise ValueError(f"{memory.name}: the experts are called with something else than tokens and their routes")
        observation.record_routed(part, _routed(memory, hidden, chosen, weights, coefficient))
        observation.stop_after(part)

    yield memory.module.register_forward_pre_hook(before, with_kwargs=True)


def _routed(
    memory: Experts, hidden: Tensor, chosen: Tensor, weights: Tensor, coefficient: str
) -> Iterator[tuple[Tensor, Tensor]]:
    """For each expert the numbers (N,) of its tokens in hidden (T, D), and w_e * c_e (N, M); chosen, weights (T, K)."""
    module: Any = memory.module
    first = "gate_up_proj" if memory.gated else "up_proj"
    matrices, biases = getattr(module, first), getattr(module, f"{first}_bias") if module.has_bias else None
    for expert in range(memory.experts):
        tokens, place = torch.where(chosen == expert)
        matrix = matrices[expert] if module.is_transposed else matrices[expert].T
        projected = hidden[tokens] @ matrix
        if biases is not None:
            projected = projected + biases[expert]
        own = module._apply_gate(projected) if memory.gated else module.act_fn(projected)
        if coefficient == "relu":
            own = _rectified(projected.chunk(2, dim=-1), own, memory.name) if memory.gated else own.relu()
        yield tokens, own * weights[tokens, place, None]


def _rectified(halves: tuple[Tensor, ...], signed: Tensor, name: str) -> Tensor:
    """relu(gate) * up with negatives set to 0, of gate and up in either order: it is relu(gate) * relu(up).

    Raises ValueError where `signed`, what the model computes, does not have the sign of their product, as that of every
    usual activation has: interleaved halves, or something else than a gate.
    """
    first, second = halves
    if (first.sign() * second.sign() * signed.sign() < 0).any():
        raise ValueError(f"{name}: cannot tell gate and up projection of this layer, which relu needs")
    return first.relu() * second.relu()


@torch.no_grad()
def instance_means(model: nn.Module, observation: Observation, input_ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean coefficients of each instance, float32 (B, L, M), by a forward pass that ends at the last coefficient.

    input_ids (B, T); mask (B, T), 1 for tokens. Neither the last down projection nor the vocabulary is computed.
    """
    observation.mask, observation.shape = mask, input_ids.shape
    if isinstance(model, OLMo):
        _pass_through_ours(model, input_ids, observation)
        return observation.means
    with suppress(_LastCoefficientSeen):
        body = model.base_model
        body(input_ids=input_ids, attention_mask=mask, use_cache=False)  # type: ignore[operator]
    return observation.means


def _pass_through_ours(model: OLMo, input_ids: Tensor, observation: Observation) -> None:
    """A forward pass of our own model up to its last coefficient, in little memory: on a CPU some tokens at a time. A
    GPU wants all of them together. Without the dropout of the residual stream, so for a model in evaluation.
    """
    observation.forget()
    stream, table = model.embed(input_ids)
    if observation.compiled and observation.coefficient == "abs":
        mask = torch.ones_like(input_ids) if observation.mask is None else observation.mask
        for number, block in enumerate(model.blocks):
            stream, means = _compiled_layer()(block, stream, table, mask, number == len(model.blocks) - 1)
            observation.set(number, means)
        return
    instances, length, _ = stream.shape
    step = (
        instances * length if stream.device.type != "cpu" else max(PROJECTED_AT_ONCE // model.config.projection_size, 1)
    )
    together = max(step // length, 1)
    rows = [slice(row, min(row + together, instances)) for row in range(0, instances, together)]
    pieces = [(row, slice(start, min(start + step, length))) for row in rows for start in range(0, length, step)]
    for block in model.blocks:
        for row in rows:
            stream[row].add_(block.attention_update(stream[row], table))
        for piece in pieces:
            observation.window = piece
            # Raised by the hook of the last down projection, each time before that would be computed.
            with suppress(_LastCoefficientSeen):
                stream[piece].add_(block.memory_update(_coefficients(block, stream[piece], observation)))
    observation.window = None


def _layer(
    block: Block, stream: Tensor, table: tuple[Tensor, Tensor] | None, mask: Tensor, last: bool
) -> tuple[Tensor, Tensor]:
    """One of our layers as nothing but a graph of tensors: the residual stream (B, T, D) that leaves it, unless it is
    the last one, and its mean coefficients, float32 (B, M)."""
    stream = stream + block.attention_update(stream, table)
    coefficients = block.coefficients(block.project(stream))
    sizes = coefficients.abs().float().masked_fill(mask[..., None] == 0, 0.0)
    means = sizes.sum(1) / mask.sum(1, keepdim=True)
    if last:
        return stream, means
    # Not by calling ff_out, whose hooks are no part of a graph.
    written = F.linear(coefficients, block.ff_out.weight, block.ff_out.bias)
    return stream + (block.ff_norm(written) if block.config.norm_after else written), means


@cache
def _compiled_layer() -> Callable[..., tuple[Tensor, Tensor]]:
    """`_layer` compiled, once for all layers and checkpoints of a shape: between the projection and the means there is
    then no other tensor of the coefficients' size than the coefficients."""
    return torch.compile(_layer)


def _coefficients(block: Block, stream: Tensor, observation: Observation) -> Tensor:
    """Signed memory coefficients of one of our layers, (B, n, D) -> (B, n, M).

    On a CPU a gated layer computes MEMORIES_AT_ONCE: a product of matrices as wide as the whole projection is a tenth
    slower, perhaps because its rows lie a large power of two apart. `relu` needs the whole, for its hooks.
    """
    gated = block.config.activation_type == "swiglu" and block.memory_temperature is None
    if stream.device.type != "cpu" or not gated or block.ff_proj.bias is not None or observation.coefficient == "relu":
        return block.coefficients(block.project(stream))
    entering = stream if block.config.norm_after else block.ff_norm(stream)
    ups, gates = (half.split(MEMORIES_AT_ONCE) for half in block.ff_proj.weight.chunk(2))
    parts = [
        F.silu(F.linear(entering, gate), inplace=True).mul_(F.linear(entering, up)) for up, gate in zip(ups, gates)
    ]
    return torch.cat(parts, -1)
