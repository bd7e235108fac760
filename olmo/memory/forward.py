"""The forward pass of our own model up to its last memory coefficient: in little memory on a CPU, compiled on a GPU.

For a model in evaluation: the residual stream has no dropout. Shapes as in `olmo/model/olmo.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model.olmo import Block, OLMo, Table
from ..model.placement import device_of, on_device

SUMMED_AT_ONCE = 2**21  # coefficients, on a CPU: 8 MB
PROJECTED_AT_ONCE = 2**24  # outputs of ff_proj, on a CPU: 1024 tokens of OLMo-1B
MEMORIES_AT_ONCE = 2048  # of a layer, on a CPU


def token_means(coefficients: Tensor, mask: Tensor | None, lengths: Tensor | int | None = None) -> Tensor:
    """Mean of |C| (B, T, M) over the tokens that `mask` (B, T) counts, float32 (B, M).

    lengths (B, 1): numbers of tokens to divide by, where the coefficients are only a part of them.
    On a CPU in pieces that fit into its cache, ten times faster than one sum over T. Smaller pieces are slower where
    threads share processors with other work, because they wait for each other after every piece. On CUDA without a
    mask in one pass over C, instead of three and a copy of C in float32.
    """
    instances, length, memories = coefficients.shape
    if coefficients.is_cuda and mask is None:
        total = torch.linalg.vector_norm(coefficients, 1, dim=1, dtype=torch.float32)
        return total / (length if lengths is None else lengths)
    total = torch.zeros(instances, memories, device=coefficients.device)
    size = length if coefficients.device.type != "cpu" else max(SUMMED_AT_ONCE // (instances * memories), 1)
    for start in range(0, length, size):
        piece = coefficients[:, start : start + size].abs().float()
        if mask is not None:
            piece.masked_fill_(mask[:, start : start + size, None] == 0, 0.0)
        total += piece.sum(1)
    if lengths is None:
        lengths = length if mask is None else mask.sum(1, keepdim=True)
    return total / lengths


def counted(block: Block, projected: Tensor, signed: Tensor, coefficient: str) -> Tensor:
    """The coefficients of the variant `coefficient` (see `observe`), (..., M), signed for abs.

    projected (..., P): output of ff_proj; signed (..., M): what the block computes from it.
    """
    if coefficient == "abs":
        return signed
    if block.config.activation_type != "swiglu":
        return signed.relu()
    up, gate = projected.chunk(2, dim=-1)
    rectified = up.relu() * gate.relu()  # = relu(gate) * up, negatives set to 0
    return rectified if block.memory_temperature is None else rectified / block.memory_temperature


def means_in_pieces(model: OLMo, input_ids: Tensor, mask: Tensor | None, coefficient: str) -> list[Tensor]:
    """Mean coefficients of every layer, float32 (B, M) each; on a CPU some tokens at a time, on a GPU all together."""
    stream, table = model.embed(input_ids)
    instances, length, _ = stream.shape
    at_once = instances * length
    if stream.device.type == "cpu":
        at_once = max(PROJECTED_AT_ONCE // model.config.projection_size, 1)
    together = max(at_once // length, 1)
    rows = [slice(row, min(row + together, instances)) for row in range(0, instances, together)]
    pieces = [(row, slice(start, min(start + at_once, length))) for row in rows for start in range(0, length, at_once)]
    means = []
    for number, block in enumerate(model.blocks):
        device = device_of(block)
        stream, mask = stream.to(device), None if mask is None else mask.to(device)
        table = None if table is None else (table[0].to(device), table[1].to(device))
        mean = torch.zeros(instances, model.config.inner_size, device=device)
        with on_device(block):
            for row in rows:
                stream[row].add_(block.attention_update(stream[row], table))
            for row, tokens in pieces:
                signed, seen = _coefficients(block, stream[row, tokens], coefficient)
                here = (None, length) if mask is None else (mask[row, tokens], mask[row].sum(1, keepdim=True))
                mean[row] += token_means(seen, *here)
                if number < len(model.blocks) - 1:
                    stream[row, tokens].add_(block.memory_update(signed))
        means.append(mean)
    return means


def _coefficients(block: Block, stream: Tensor, coefficient: str) -> tuple[Tensor, Tensor]:
    """Signed memory coefficients (B, n, M) of a piece of the residual stream (B, n, D), and those of the variant.

    On a CPU a gated layer computes MEMORIES_AT_ONCE: a product of matrices as wide as the whole projection is a tenth
    slower, perhaps because its rows are a large power of two apart.
    """
    gated = block.config.activation_type == "swiglu" and block.memory_temperature is None
    if stream.device.type != "cpu" or not gated or block.ff_proj.bias is not None or coefficient == "relu":
        projected = block.project(stream)
        signed = block.coefficients(projected)
        return signed, counted(block, projected, signed, coefficient)
    entering = stream if block.config.norm_after else block.ff_norm(stream)
    ups, gates = (half.split(MEMORIES_AT_ONCE) for half in block.ff_proj.weight.chunk(2))
    parts = [
        F.silu(F.linear(entering, gate), inplace=True).mul_(F.linear(entering, up)) for up, gate in zip(ups, gates)
    ]
    signed = torch.cat(parts, -1)
    return signed, signed


def compiled_means(model: OLMo, input_ids: Tensor, mask: Tensor | None) -> list[Tensor]:
    """As `means_in_pieces` for `abs`, every layer as one compiled graph."""
    stream, table = model.embed(input_ids)
    mask = torch.ones_like(input_ids) if mask is None else mask
    means = []
    for number, block in enumerate(model.blocks):
        stream, mean = _compiled_layer()(block, stream, table, mask, number == len(model.blocks) - 1)
        means.append(mean)
    return means


def _layer(block: Block, stream: Tensor, table: Table, mask: Tensor, last: bool) -> tuple[Tensor, Tensor]:
    """The residual stream (B, T, D) after a layer, unless it is the last, and its mean coefficients, float32 (B, M)."""
    means: list[Tensor] = []

    def tap(projected: Tensor, signed: Tensor) -> None:
        means.append(token_means(signed, mask))

    after = block.compute(stream, table, tap=tap)
    return stream if last else after, means[0]  # the compiler leaves out what computes `after` where it is not returned


@cache
def _compiled_layer() -> Callable[..., tuple[Tensor, Tensor]]:
    """`_layer` compiled, once for all layers and checkpoints of a shape: between the projection and the means there is
    then no other tensor of the coefficients' size than the coefficients. Without a GPU, for tests alone, the graph is
    made but no code, which would need a compiler of C++."""
    return torch.compile(_layer, backend="inductor" if torch.cuda.is_available() else "aot_eager")
