"""Find the feed-forward memories of a causal language model of any architecture.

Found by structure: the longest list of layers, and in each layer every matrix outside the attention. All of them must
belong to one key-value memory FFN(x) = f(x K^T) V (paper, section 3.1), or to a mixture of them. A layer with any other
matrix, such as a state-space mixer or a second feed-forward layer, is rejected; nothing is guessed.
Shapes: E experts of a layer, M memories of a layer or an expert, D the width of the model.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..model.causal_lm import CausalLM
from ..model.olmo import Block, OLMo


@dataclass(frozen=True)
class Memory:
    """One feed-forward layer, or one shared expert, that every token goes through."""

    name: str  # of `down` in the model
    down: nn.Module  # second projection; its input holds the M coefficients
    into: tuple[nn.Module, ...]  # first projection; two modules if up and gate are separate
    count: int  # M
    gated: bool
    weight: nn.Module | None = None  # D -> 1; the sigmoid of its output multiplies what a shared expert writes


@dataclass(frozen=True)
class Experts:
    """The routed experts of one layer in one module, in the terms of transformers' experts interface."""

    name: str  # of their second projections in the model
    module: nn.Module  # takes tokens (N, D), their experts (N, K) and router weights (N, K)
    experts: int  # E
    count: int  # E * M
    gated: bool


@dataclass(frozen=True)
class Layer:
    """One layer of a model's stack."""

    name: str  # in the model
    number: int  # in the stack, from 0
    module: nn.Module
    parts: tuple[Memory | Experts, ...]  # its feed-forward memories; empty for a layer that has none


def find_layers(model: nn.Module) -> list[Layer]:
    """Every layer of the model's stack with its feed-forward memories, first layer first; several parts only for a
    shared expert beside routed ones.

    Ours are known by name. Otherwise the matrices of a layer outside the attention (any module with "att" in its name)
    must be one linear map from M to D with M != D, and from D one map to M, two to M (gated) or one to 2 M (gated); or
    experts as in transformers 5 with their router, and optionally a shared expert whose output is added (checked with
    random tokens). Layers may differ. Raises ValueError, naming the place, for anything else.
    """
    if isinstance(model, CausalLM):
        return find_layers(model.network)
    if isinstance(model, OLMo):
        return [
            Layer(f"transformer.blocks.{number}", number, block, (_ours(block, number),))
            for number, block in enumerate(model.blocks)
        ]
    try:
        where, stack = _layers(model)
        width = _width(model)
        return [
            Layer(f"{where}.{number}", number, layer, tuple(_parts(layer, f"{where}.{number}", width)))
            for number, layer in enumerate(stack)
        ]
    except ValueError as error:
        raise ValueError(f"{type(model).__name__}: {error}") from None


def find_memories(model: nn.Module) -> list[list[Memory | Experts]]:
    """The parts of each of `find_layers` that has any."""
    return [list(layer.parts) for layer in find_layers(model) if layer.parts]


def describe(model: nn.Module) -> str:
    """What `find_layers` finds, in one line; raises ValueError as it does."""
    layers = find_layers(model)
    groups: dict[str, list[int]] = {}
    for layer in layers:
        # Only the number of the layer differs between the names of layers that are alike.
        pattern = f"{layer.name.rpartition('.')[0]}.*"
        shown = [f"{part.name.replace(layer.name, pattern, 1)}: {_held(part)}" for part in layer.parts]
        groups.setdefault(", and shared in ".join(shown), []).append(layer.number)
    if len(groups) == 1:
        return f"{type(model).__name__}, {len(layers)} layers; each has in {next(iter(groups))}"
    held = [f"{_numbered(numbers)} in {shown}" if shown else "" for shown, numbers in groups.items()]
    without = [f"no feed-forward memories in {_numbered(groups[''])}"] if "" in groups else []
    return "; ".join([f"{type(model).__name__}, {len(layers)} layers", *filter(None, held), *without])


def _numbered(numbers: Sequence[int]) -> str:
    """Increasing numbers of layers in words: "layer 0", "layers 1 to 3, 5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    shown = [f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    return f"layer{'s' if len(numbers) > 1 else ''} {', '.join(shown)}"


def _held(part: Memory | Experts) -> str:
    kind = "gated" if part.gated else "plain"
    if isinstance(part, Experts):
        return f"{part.count} memories ({part.experts} experts of {part.count // part.experts}, {kind})"
    return f"{part.count} memories ({kind})"


def sizes(module: nn.Module) -> tuple[int, int]:
    """(inputs, outputs) of a linear map; transformers' Conv1D holds its weight transposed."""
    rows, columns = module.weight.shape  # type: ignore[misc]
    return (rows, columns) if is_conv1d(module) else (columns, rows)


def is_conv1d(module: nn.Module) -> bool:
    """Whether a linear map is transformers' Conv1D, whose rows are its columns."""
    return type(module).__name__ == "Conv1D"


def up_projection(model: nn.Module, part: Memory | Experts) -> tuple[nn.Module, slice]:
    """The module, and which outputs of its first projection scale the coefficients: in a gated layer those of the up
    projection, found by doubling the outputs of either projection and comparing coefficients; in a plain one all.

    `model` may be on the meta device. Raises ValueError if the up projection cannot be told from the gate.
    """
    if isinstance(part, Experts):
        return part.module, _up_half_of_experts(part) if part.gated else slice(None)
    halves = [(module, slice(None)) for module in part.into]
    if part.gated and len(part.into) == 1:
        halves = [(part.into[0], half) for half in (slice(part.count), slice(part.count, None))]
    if isinstance(model, OLMo) or not part.gated:
        return halves[0]
    block = model.get_submodule(part.name.rpartition(".")[0])
    plain = _coefficients(block, part, part.into[0], slice(0))
    doubling = [half for half in halves if torch.equal(_coefficients(block, part, *half), 2 * plain)]  # exact
    if len(doubling) != 1:
        raise ValueError(f"{part.name}: cannot tell the up projection of this layer from its gate")
    return doubling[0]


def _up_half_of_experts(part: Experts) -> slice:
    """Which outputs of the first projection of each expert are the up projection's: one of two blocks, or every other.

    Raises ValueError unless doubling exactly one of these doubles the coefficients."""
    count = part.count // part.experts
    projected = torch.randn(8, 2 * count, generator=torch.Generator().manual_seed(0))
    gate: Any = part.module._apply_gate
    doubling = []
    for half in (slice(count), slice(count, None), slice(0, None, 2), slice(1, None, 2)):
        changed = projected.clone()
        changed[:, half] *= 2
        if torch.equal(gate(changed), 2 * gate(projected)) and count > 1:
            doubling.append(half)
    if len(doubling) != 1:
        raise ValueError(f"{part.name}: cannot tell the up projection of these experts from their gate")
    return doubling[0]


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

    block, down, first = _with_weights(block, memory.down, first)
    try:
        with down.register_forward_pre_hook(keep), first.register_forward_hook(double):
            block(_tokens(block, sizes(first)[0]))
    except TypeError as error:  # it needs more than tokens
        raise ValueError(f"{memory.name}: cannot tell the up projection of this layer from its gate") from error
    return seen[0]


def _with_weights(block: nn.Module, *inside: nn.Module) -> tuple[nn.Module, ...]:
    """A module and modules in it; for those on the meta device, copies on the CPU with the same random weights."""
    if not any(parameter.is_meta for parameter in block.parameters()):
        return block, *inside
    modules = copy.deepcopy((block, *inside))
    modules[0].to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for parameter in modules[0].parameters():
        parameter.normal_(generator=generator).mul_(parameter.shape[-1] ** -0.5)
    for buffer in modules[0].buffers():
        buffer.zero_()
    return modules


def _tokens(block: nn.Module, width: int) -> Tensor:
    """Random tokens (1, 8, D) of the type and on the device of a module's weights."""
    return torch.randn(1, 8, width, generator=torch.Generator().manual_seed(0)).to(next(block.parameters()))


def _ours(block: Block, number: int) -> Memory:
    count = sizes(block.ff_out)[0]
    gated = sizes(block.ff_proj)[1] == 2 * count
    return Memory(f"transformer.blocks.{number}.ff_out", block.ff_out, (block.ff_proj,), count, gated)


def _layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The longest list of modules that is not inside another list (such as of experts), and its name in the model."""
    # Encoders of images or sound before the language model have layers too.
    decoder: Any = model.get_decoder() if hasattr(model, "get_decoder") else None  # type: ignore[operator]
    root = model if decoder is None else decoder  # None for most families in transformers 4.56
    prefix = next(name for name, module in model.named_modules() if module is root)
    lists = {name: module for name, module in root.named_modules(prefix=prefix) if isinstance(module, nn.ModuleList)}
    outer = {n: m for n, m in lists.items() if not any(n.startswith(f"{other}.") for other in lists)}
    if not any(map(len, outer.values())):
        raise ValueError("no list of layers, cannot tell its feed-forward memories")
    depth = max(map(len, outer.values()))
    longest = [name for name, module in outer.items() if len(module) == depth]
    if len(longest) > 1:
        raise ValueError(f"cannot tell which list is that of its layers: {_listed(longest)}")
    return longest[0], outer[longest[0]]


def _width(model: nn.Module) -> int:
    """D, from the configuration if it has it, because embeddings can be narrower (OPT-350m)."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    named = getattr(text, "hidden_size", None)
    return named if isinstance(named, int) else model.get_input_embeddings().weight.shape[1]  # type: ignore[operator]


def _parts(layer: nn.Module, where: str, width: int) -> list[Memory | Experts]:
    """The memories of a layer. Raises ValueError for a matrix outside the attention that does not belong to them."""
    matrices = {
        name: parameter
        for name, parameter in layer.named_parameters()
        if parameter.ndim > 1 and not any("att" in part for part in name.lower().split("."))
    }
    parts: list[Memory | Experts] = []
    owners = {name.rpartition(".")[0] for name, parameter in matrices.items() if parameter.ndim == 3}
    routed = _experts(layer, owners, where) if owners else None
    if routed is not None:
        parts.append(routed)
        own = {f"{next(iter(owners))}.{name}" for name, _ in routed.module.named_parameters(recurse=False)}
        router = {name for name, parameter in matrices.items() if parameter.shape == (routed.experts, width)}
        matrices = {name: parameter for name, parameter in matrices.items() if name not in own | router}
    maps = {}
    for name in matrices:
        module = layer.get_submodule(name.rpartition(".")[0])
        if not (name.endswith(".weight") and (isinstance(module, nn.Linear) or is_conv1d(module))):
            raise ValueError(
                f"{where}: cannot tell what {name} {tuple(matrices[name].shape)} does, which is not a linear map"
            )
        maps[name.removesuffix(".weight")] = module
    if routed is None:
        parts.append(_plain_or_gated(maps, where, width))
    elif maps:
        parts.append(_shared(layer, next(iter(owners)), maps, where, width))
    return parts


def _plain_or_gated(maps: Mapping[str, nn.Module], where: str, width: int, weight: nn.Module | None = None) -> Memory:
    """The memory that consists of exactly these linear maps. Raises ValueError if they are not one."""
    shown = _listed([f"{name} {sizes(module)[0]}->{sizes(module)[1]}" for name, module in maps.items()])
    down = [name for name, module in maps.items() if sizes(module)[1] == width != sizes(module)[0]]
    if len(down) != 1:
        raise ValueError(
            f"{where}: cannot tell the memory projection, the one linear map to the width {width} from another, "
            f"among: {shown}"
        )
    count = sizes(maps[down[0]])[0]
    into = tuple(module for name, module in maps.items() if name != down[0])
    written = sorted(sizes(module)[1] for module in into)
    if written not in ([count], [count, count], [2 * count]) or any(sizes(module)[0] != width for module in into):
        raise ValueError(
            f"{where}: the linear maps make up no feed-forward layer with {count} memories in {down[0]}: {shown}"
        )
    return Memory(f"{where}.{down[0]}", maps[down[0]], into, count, written != [count], weight=weight)


def _experts(layer: nn.Module, owners: set[str], where: str) -> Experts:
    """The routed experts of a layer, in the one module with three-dimensional parameters."""
    name = min(owners)
    module = layer.get_submodule(name)
    down = getattr(module, "down_proj", None)
    if len(owners) > 1 or not hasattr(module, "_apply_gate") or not isinstance(down, Tensor) or down.ndim != 3:
        raise ValueError(
            f"{where}: cannot tell what {_listed(sorted(owners))} computes; experts are known as transformers 5 "
            "holds them, in one module with its experts interface (use_experts_implementation)"
        )
    if module.has_post_expert_norm:
        raise ValueError(f"{where}.{name}: each expert's output is normalized, so its memories add to no sum")
    experts, count = down.shape[0], down.shape[1 if module.is_transposed else 2]
    return Experts(f"{where}.{name}.down_proj", module, experts, experts * count, bool(module.has_gate))


def _shared(layer: nn.Module, experts: str, maps: Mapping[str, nn.Module], where: str, width: int) -> Memory:
    """The shared expert beside routed ones, in the module that contains both; its output must be added to theirs."""
    block = experts.rpartition(".")[0]
    weights = [name for name, module in maps.items() if sizes(module) == (width, 1)]
    weight = maps[weights[0]] if len(weights) == 1 else None
    rest = {name: module for name, module in maps.items() if module is not weight}
    memory = _plain_or_gated(rest, where, width, weight)
    shared = memory.name.removeprefix(f"{where}.").rpartition(".")[0]
    if not block or not shared.startswith(f"{block}.") or not _adds_up(layer, block, experts, shared, weight, width):
        raise ValueError(
            f"{where}: cannot place the shared expert {shared}: its output, or that times a sigmoid, is not added to "
            "the output of the routed experts"
        )
    return memory


@torch.no_grad()
def _adds_up(layer: nn.Module, block: str, experts: str, shared: str, weight: nn.Module | None, width: int) -> bool:
    """Whether the output of a block for a few random tokens is routed + [sigmoid of the weight] * shared."""
    inside = [layer.get_submodule(name) for name in (experts, shared)] + ([] if weight is None else [weight])
    whole, *modules = _with_weights(layer.get_submodule(block), *inside)
    outputs: dict[nn.Module, Tensor] = {}
    tokens = _tokens(whole, width)

    def keep(module: nn.Module, args: object, output: Tensor) -> None:
        outputs[module] = output.reshape(8, width).cpu().double()

    try:
        with modules[0].register_forward_hook(keep), modules[1].register_forward_hook(keep):
            written = whole(tokens)
    except TypeError:  # it needs more than tokens
        return False
    routed, added = (outputs[module] for module in modules[:2])
    if weight is not None:
        added = added * modules[2](tokens)[0].cpu().double().sigmoid()
    found = (written[0] if isinstance(written, tuple) else written).reshape(8, width).cpu().double()
    rounding = 4 * torch.finfo(tokens.dtype).eps * (routed.norm() + added.norm())
    return bool((found - routed - added).norm() <= rounding)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (f", ... ({len(names)} in all)" if len(names) > 6 else "") or "none"
