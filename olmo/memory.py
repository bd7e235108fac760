"""The feed-forward layer as a key-value memory, in any model: observe its coefficients, measure their entropy,
rescale rows of the up projection.

Method section 1 (paper, section 3.1, equation 2). Shapes: B instances, T tokens, L layers, M memories of a layer.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor, nn

from .distributed import Ranks
from .model import OLMo
from .tensors import check_readable, save_tensors

COEFFICIENTS = ("abs", "relu")
GROUPS = 64  # of instances, for the jackknife
TOKENS_AT_ONCE = 64  # whose coefficients are summed in one step


class _LastCoefficientSeen(Exception):
    """Ends a forward pass once nothing that follows can change a coefficient."""


@dataclass(frozen=True)
class Memory:
    """The two projections of one feed-forward layer. `up` and `gate` are the same module where it is fused."""

    name: str
    down: nn.Module  # second projection; its input holds the M coefficients
    up: nn.Module | None = None
    gate: nn.Module | None = None
    gated: bool = False  # also where up and gate cannot be told apart
    temperature: Tensor | None = None  # (M,), what the model divides the coefficients by


def find_memories(model: nn.Module) -> list[Memory]:
    """The feed-forward memories of a causal language model, first layer first.

    Ours are known by name. In another model they are found by structure: its longest list of layers; in each layer
    the one linear map outside the attention that writes vectors of the layer's width from a wider or narrower
    space. Raises ValueError where there is none or more than one (as in a mixture of experts).
    """
    if isinstance(model, OLMo):
        return [
            Memory(
                f"transformer.blocks.{i}.ff_out",
                block.ff_out,
                block.ff_proj,
                block.ff_proj,
                temperature=block.memory_temperature,
            )
            for i, block in enumerate(model.blocks)
        ]
    stacks = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    if not stacks:
        raise ValueError(f"{type(model).__name__}: no list of layers, cannot tell its feed-forward memories")
    stack_name, stack = max(stacks, key=lambda item: len(item[1]))
    width = model.get_input_embeddings().weight.shape[1]  # type: ignore[operator]
    memories = []
    for number, layer in enumerate(stack):
        linear = {
            name: module
            for name, module in layer.named_modules()
            if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
            if not any("att" in part for part in name.lower().split("."))
        }
        down = [n for n, m in linear.items() if _sizes(m)[1] == width and _sizes(m)[0] != width]
        where = f"{stack_name}.{number}"
        if len(down) != 1:
            found = ", ".join(down) or "none"
            raise ValueError(f"{where}: cannot tell the memory projection of this layer (candidates: {found})")
        siblings = {n.rsplit(".", 1)[-1]: m for n, m in linear.items()}
        fused = siblings.get("gate_up_proj")  # Phi-3, GLM
        up, gate = siblings.get("up_proj", fused), siblings.get("gate_proj", fused)
        inner = _sizes(linear[down[0]])[0]
        written = [_sizes(m)[1] for n, m in linear.items() if n != down[0]]
        gated = written.count(inner) > 1 or 2 * inner in written
        memories.append(Memory(f"{where}.{down[0]}", linear[down[0]], up, gate, gated))
    return memories


def _sizes(module: nn.Module) -> tuple[int, int]:
    """(inputs, outputs) of a linear map; transformers' Conv1D holds its weight transposed."""
    rows, columns = module.weight.shape  # type: ignore[misc]
    return (rows, columns) if type(module).__name__ == "Conv1D" else (columns, rows)


class Observation:
    """Mean coefficients of the instances of the last forward pass.

    Set `mask` (B, T), 1 for tokens and 0 for padding, before the pass; None counts every position. `shape` (B, T)
    is only needed where a model flattens its tokens in front of the feed-forward layer, as OPT does.
    """

    def __init__(self, layers: int):
        self.mask: Tensor | None = None
        self.shape: torch.Size | None = None
        self.ends_early = True  # the forward pass, at the last coefficient
        self._means: list[Tensor | None] = [None] * layers

    def record(self, layer: int, coefficients: Tensor) -> None:
        """Reduce C (B, T, M) or (B T, M), non-negative or signed-for-abs, to its mean over tokens, float32 (B, M)."""
        if coefficients.ndim == 2 and self.shape is not None:
            coefficients = coefficients.unflatten(0, self.shape)
        instances, length, memories = coefficients.shape
        total = torch.zeros(instances, memories, device=coefficients.device)
        # On a CPU in pieces that stay in its cache, ten times faster than one sum over T.
        size = length if coefficients.is_cuda else TOKENS_AT_ONCE
        for start in range(0, length, size):
            piece = coefficients[:, start : start + size].abs().float()
            if self.mask is not None:
                piece.masked_fill_(~self.mask[:, start : start + size, None].bool(), 0.0)
            total += piece.sum(1)
        self._means[layer] = total / (length if self.mask is None else self.mask.sum(1, keepdim=True))

    @property
    def means(self) -> Tensor:
        """1/T_n sum_j C[n, j, i] of every layer, float32 (B, L, M)."""
        assert all(m is not None for m in self._means), "no forward pass yet"
        return torch.stack([m for m in self._means if m is not None], dim=1)


@contextmanager
def observe(model: nn.Module, coefficient: str = "abs") -> Iterator[Observation]:
    """Observe the memory coefficients of every forward pass inside the block; the hooks go when it ends.

    coefficient "abs": |act(gate) * up|, the absolute input of the down projection (equation 2).
    coefficient "relu": relu(gate) * up with negatives set to 0 (appendix A.2); of a plain MLP the input of the
    second projection with negatives set to 0.
    """
    if coefficient not in COEFFICIENTS:
        raise ValueError(f"coefficient {coefficient!r} is none of {', '.join(COEFFICIENTS)}")
    memories = find_memories(model)
    observation = Observation(len(memories))
    handles: list[Any] = []
    try:
        for layer, memory in enumerate(memories):
            handles.extend(_hooks(memory, layer, observation, coefficient))
        yield observation
    finally:
        for handle in handles:
            handle.remove()


def _hooks(memory: Memory, layer: int, observation: Observation, coefficient: str) -> Iterator[Any]:
    last = layer == len(observation._means) - 1
    kept: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            kept[name] = output

        return hook

    def before_down(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        signed = args[0]
        if coefficient == "relu":
            if "fused" in kept:
                # In either order: relu(gate) * up with negatives set to 0 is relu(gate) * relu(up).
                kept["up"], kept["gate"] = kept.pop("fused").chunk(2, dim=-1)
            if "up" in kept:
                signed = kept.pop("gate").relu() * kept.pop("up")
                if memory.temperature is not None:
                    signed = signed / memory.temperature
            signed = signed.relu()
        observation.record(layer, signed)
        if last and observation.ends_early:
            raise _LastCoefficientSeen

    if coefficient == "relu" and memory.gated and (memory.up is None or memory.gate is None):
        raise ValueError(f"{memory.name}: cannot tell up projection and gate of this layer, which relu needs")
    if coefficient == "relu" and memory.up is not None:
        inner = _sizes(memory.down)[0]
        if memory.up is memory.gate and _sizes(memory.up)[1] == 2 * inner:
            yield memory.up.register_forward_hook(keep("fused"))
        elif memory.gate is not None and memory.up is not memory.gate:
            yield memory.up.register_forward_hook(keep("up"))
            yield memory.gate.register_forward_hook(keep("gate"))
    yield memory.down.register_forward_pre_hook(before_down)


@torch.no_grad()
def instance_means(model: nn.Module, observation: Observation, input_ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean coefficients of each instance, float32 (B, L, M), by a forward pass that ends at the last coefficient.

    input_ids (B, T); mask (B, T), 1 for tokens. Neither the last down projection nor the vocabulary is computed.
    """
    observation.mask, observation.shape = mask, input_ids.shape
    try:
        if isinstance(model, OLMo):
            model.hidden_states(input_ids)
        else:
            body = model.base_model
            body(input_ids=input_ids, attention_mask=mask, use_cache=False)  # type: ignore[operator]
    except _LastCoefficientSeen:
        pass
    return observation.means


def layer_entropy(average: NDArray[np.float64]) -> NDArray[np.float64]:
    """H^l, natural log, of average coefficients (..., M) -> (...); a coefficient of 0 contributes 0.

    Raises ValueError for a layer whose coefficients are all 0, negative or not finite.
    """
    total = average.sum(-1, keepdims=True)
    if not np.isfinite(total).all() or (average < 0).any() or (total <= 0).any():
        raise ValueError("average coefficients must be finite, not negative and not all 0 in a layer")
    p = average / total
    return -np.where(p > 0, p * np.log(np.where(p > 0, p, 1.0)), 0.0).sum(-1)


class GroupedMeans:
    """A mean over instances of numbers of any shape, in float64, with what its standard error needs.

    Instance k belongs to group k mod 64. Leaving one group out at a time (delete-a-group jackknife) gives the sampling
    error as far as instances are independent samples: neighbours that share a document, as in packed text, make it a
    little too small.
    """

    def __init__(self, *shape: int):
        self.sums = np.zeros((GROUPS, *shape))
        self.counts = np.zeros(GROUPS)

    def add(self, values: Tensor, instances: NDArray[np.integer]) -> None:
        """Add the values (B, ...) of the instances with these numbers (B,)."""
        groups = instances % GROUPS
        # numpy's add.at, because one batch may hold several instances of a group.
        np.add.at(self.sums, groups, values.double().cpu().numpy())
        np.add.at(self.counts, groups, 1.0)

    def reduce(self, ranks: Ranks) -> None:
        """Add up what all ranks have seen."""
        self.sums, self.counts = ranks.sum(self.sums), ranks.sum(self.counts)

    @property
    def instances(self) -> int:
        return int(self.counts.sum())

    @property
    def average(self) -> NDArray[np.float64]:
        return self.sums.sum(0) / self.counts.sum()

    def _without_each(self) -> Iterator[NDArray[np.float64]]:
        """The averages without group g, for the groups that are not empty, where there are two or more."""
        filled = np.flatnonzero(self.counts)
        total, count = self.sums.sum(0), self.counts.sum()
        for group in filled if len(filled) > 1 else ():
            yield (total - self.sums[group]) / (count - self.counts[group])

    def leave_one_out(self) -> NDArray[np.float64]:
        """The statistic without group g, (G, ...), G at most 64; here the mean itself."""
        return np.array(list(self._without_each())).reshape(-1, *self.sums.shape[1:])


class CoefficientAverages(GroupedMeans):
    """Average coefficients Cbar (L, M), whose statistic is H^l (L,), no mean but a function of one."""

    def __init__(self, layers: int, memories: int):
        super().__init__(layers, memories)

    def leave_one_out(self) -> NDArray[np.float64]:
        """H^l without group g, (G, L)."""
        return np.array([layer_entropy(average) for average in self._without_each()]).reshape(-1, self.sums.shape[1])


def jackknife_error(left_out: NDArray[np.float64]) -> NDArray[np.float64]:
    """Standard error from estimates without group g, (G, ...) -> (...); nan with fewer than two groups."""
    groups = len(left_out)
    if groups < 2:
        return np.full(left_out.shape[1:], math.nan)
    return np.sqrt((groups - 1) / groups * ((left_out - left_out.mean(0)) ** 2).sum(0))


# --- rescaling the up projection ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Multipliers:
    """What resuscitation does to a model: factor u (L, M) float32 of every row of the up projections; 1 where
    nothing changes. `about` says how they were made, for which checkpoint."""

    values: Tensor
    about: dict[str, Any]

    def save(self, path: Path) -> None:
        """Write as safetensors, whole or not at all."""
        partial = path.with_name(f".{path.name}.partial")
        metadata = {"resuscitation": json.dumps(self.about, sort_keys=True)}
        save_tensors(partial, {"multipliers": self.values.contiguous()}, metadata)
        partial.replace(path)


def load_multipliers(path: Path) -> Multipliers:
    """Read a multiplier file; raises OSError where it cannot be read, ValueError where it is none."""
    check_readable(path)
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {})["resuscitation"])
            values = file.get_tensor("multipliers")
    except Exception as error:  # safetensors raises its own error type for files it cannot read
        raise ValueError(f"{path}: no multiplier file of analysis.change_parameters: {error}") from error
    if values.ndim != 2 or not torch.isfinite(values).all():
        raise ValueError(f"{path}: multipliers must be finite, one row a layer")
    return Multipliers(values.float(), about)


def up_projection_name(layer: int) -> str:
    """The parameter of an OLMo state dict whose first M rows are the up projection of a layer."""
    return f"transformer.blocks.{layer}.ff_proj.weight"


def rescale(state: Mapping[str, Tensor], multipliers: Tensor) -> dict[str, Tensor]:
    """A state dict whose up projections have row i of layer l multiplied by multipliers[l, i] (algorithm 1).

    Only the edited tensors are copied. Rows of a bias of ff_proj are multiplied too, so that the whole up
    projection scales. Raises ValueError when the shapes do not fit.
    """
    edited = dict(state)
    layers, memories = multipliers.shape
    depth = sum(1 for name in state if name.endswith(".ff_proj.weight"))
    if depth != layers:
        raise ValueError(f"multipliers for {layers} layers, the model has {depth}")
    for layer in range(layers):
        inner = state[f"transformer.blocks.{layer}.ff_out.weight"].shape[1]
        if inner != memories:
            raise ValueError(f"{up_projection_name(layer)}: multipliers for {memories} memories, the layer has {inner}")
        for name in (up_projection_name(layer), up_projection_name(layer).replace("weight", "bias")):
            if name not in state:
                continue
            tensor = state[name].clone()
            rows = tensor[:memories]
            changed = multipliers[layer] != 1
            factor = multipliers[layer][changed].to(tensor.dtype)
            rows[changed] = rows[changed] * (factor[:, None] if tensor.ndim == 2 else factor)
            edited[name] = tensor
    return edited


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """Identity of a checkpoint, the same for every file layout that holds the same OLMo state dict.

    SHA-256 over names, shapes, the first and last 64 values of every tensor and a checksum of all its values (the sum
    of their float32 bit patterns as integers, at the speed of reading): it tells checkpoints apart, edited ones
    included, but it is no protection against someone who forges one.
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        flat = state[name].detach().reshape(-1).float().cpu().contiguous()
        checksum = int(flat.view(torch.int32).sum(dtype=torch.int64))
        digest.update(f"{name} {tuple(state[name].shape)} {checksum}".encode())
        digest.update(torch.cat((flat[:64], flat[-64:])).numpy().tobytes())
    return digest.hexdigest()
