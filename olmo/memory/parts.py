"""The feed-forward parts of one layer: key-value memories FFN(x) = f(x K^T) V (paper, section 3.1), and their mixtures.

Found by structure, never guessed. A layer's matrices belong to its attention, to a mixer of tokens (a module that holds
a convolution or the parameter A_log of a state space), to the connections of its residual streams, or to its
feed-forward parts; a layer with any other matrix is rejected, and what mixtures add up is checked with random tokens.
Shapes: E experts of a layer, M memories of a layer or an expert, D the width of the model.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..model.placement import copied
from .maps import is_map, matrices_of, modules_of, sizes


@dataclass(frozen=True)
class Memory:
    """One feed-forward layer, or one shared expert, that every token goes through."""

    name: str  # of `down` in the model
    down: nn.Module  # second projection; its input holds the M coefficients
    into: tuple[nn.Module, ...]  # first projection; two modules if up and gate are separate
    count: int  # M
    gated: bool
    weight: nn.Module | None = None  # D -> 1; the sigmoid of its output multiplies what a shared expert writes
    adapted: bool = False  # whether adapters add to what its first projection writes


@dataclass(frozen=True)
class Experts:
    """The routed experts of one layer in one module, in the terms of transformers' experts interface."""

    name: str  # of their second projections in the model
    module: nn.Module  # takes tokens (N, D), their experts (N, K), router weights (N, K); if `each`, tokens (E * N, D)
    experts: int  # E
    count: int  # E * M
    gated: bool
    transposed: bool = False  # whether first projections are (E, D, M), not (E, M, D)
    each: bool = False  # as in Llama 4: every expert takes all tokens, times its router's weight, which may be 0
    scale: float = 1.0  # of their output, beside a shared expert's

    def coefficients(self, projected: Tensor) -> Tensor:
        """An expert's own coefficients (N, M) from the output of its first projection, (N, M) or (N, 2 M)."""
        module: Any = self.module
        if self.gated and hasattr(module, "_apply_gate"):
            return module._apply_gate(projected)
        if self.gated:
            gate, up = projected.chunk(2, dim=-1)
            return up * module.act_fn(gate)
        return module.act_fn(projected)

    def projected(self, hidden: Tensor, expert: int) -> Tensor:
        """The output of an expert's first projection, (N, D) -> (N, M) or (N, 2 M)."""
        first = "gate_up_proj" if self.gated else "up_proj"
        matrix, bias = getattr(self.module, first)[expert], getattr(self.module, f"{first}_bias", None)
        projected = hidden @ (matrix if self.transposed else matrix.T)
        return projected if bias is None else projected + bias[expert]


Parts = tuple[Memory | Experts, ...]


def parts_of(layer: nn.Module, where: str, width: int) -> Parts:
    """The memories of a layer that is named `where` in its model; empty if all its matrices belong to attention,
    mixers and connections. Raises ValueError for a matrix that belongs to none of them and to no memory either.
    """
    beside = list(_beside(layer, where, width))
    matrices = {
        name: matrix
        for name, matrix in matrices_of(layer).items()
        if not _inside(name, beside) and "att" not in name.rpartition(".")[2].lower()
    }
    for name, module in modules_of(layer):
        if "base_layer" in vars(module)["_modules"] and not is_map(module) and not _inside(name, beside):
            raise ValueError(
                f"{where}: cannot tell what {name} ({type(module).__name__}) computes, an adapter of no linear map; "
                "merge it first: model = model.merge_and_unload()"
            )
    owners = sorted({name.rpartition(".")[0] for name, parameter in matrices.items() if parameter.ndim == 3})
    if not matrices:
        return ()
    if not owners:
        rest = _without_connection(matrices, width)
        adapters = _adapters(layer, rest)
        own = {name: parameter for name, parameter in rest.items() if name not in adapters}
        memory = replace(_memory(layer, own, where, width), adapted=bool(adapters))
        block = _common([memory.name.removeprefix(f"{where}."), *_names_of(layer, memory.into)])
        inside = next((name for name in beside if block and name.startswith(f"{block}.")), None)
        if inside:
            raise ValueError(f"{where}: cannot tell what {inside} does inside of the feed-forward layer {block}")
        return (memory,)
    experts = _experts(layer, owners, where, width)
    name = owners[0]
    router = {own for own, parameter in matrices.items() if parameter.shape == (experts.experts, width)}
    others = {own: p for own, p in matrices.items() if own not in router and not own.startswith(f"{name}.")}
    return _with_shared(layer, name, experts, others, beside, where, width) if others else (experts,)


def _beside(layer: nn.Module, where: str, width: int) -> Iterator[str]:
    """The names of a layer's outermost modules that are attention, mixers of tokens or connections of streams.

    Raises ValueError for one that could as well be, or hold, a feed-forward layer.
    """
    found: list[str] = []
    for name, module in modules_of(layer):
        if not name or _inside(name, found) or not matrices_of(module):
            continue
        own, kind = name.rpartition(".")[2].lower(), type(module).__name__.lower()
        known = "att" in own or "lstm" in own or kind.endswith("attention")
        known = known or "hyperconnection" in own.replace("_", "") + kind
        convolutions = [n for n, child in module.named_children() if isinstance(child, nn.Conv1d)]
        if known or convolutions or isinstance(module, nn.Conv1d) or hasattr(module, "A_log"):
            found.append(name)
            for inner, submodule in modules_of(module, name):
                if inner == name and known:
                    continue  # the projections of an attention may have the shapes of a feed-forward layer
                if _forms_memory(submodule, convolutions if inner == name else (), width):
                    raise ValueError(
                        f"{where}: cannot tell whether {inner} is a feed-forward layer or a part of what mixes tokens "
                        f"in {name}"
                    )
    yield from found


def _forms_memory(module: nn.Module, convolutions: Sequence[str], width: int) -> bool:
    matrices = {n: p for n, p in matrices_of(module).items() if not _inside(n, convolutions)}
    try:
        return bool(matrices) and bool(_memory(module, matrices, "", width))
    except ValueError:
        return False


def _inside(name: str, modules: Sequence[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _names_of(layer: nn.Module, modules: Sequence[nn.Module]) -> list[str]:
    return [name for name, module in modules_of(layer) if module in modules]


def _common(names: Sequence[str]) -> str:
    """The innermost module that contains all of these."""
    parents = [name.split(".")[:-1] for name in names]
    shared = [step[0] for step in zip(*parents) if len(set(step)) == 1]
    return ".".join(shared)


def _without_connection(matrices: Mapping[str, Tensor], width: int) -> dict[str, Tensor]:
    """Without the one square map that a layer itself holds beside a module that holds all others (Zamba), which moves
    what that module writes into the residual stream."""
    own = [name for name, parameter in matrices.items() if name.count(".") == 1 and parameter.shape == (width, width)]
    rest = {name: parameter for name, parameter in matrices.items() if name not in own}
    return rest if len(own) == 1 and rest and _common(list(rest)) and _common(list(rest)).count(".") else dict(matrices)


def _adapters(layer: nn.Module, matrices: Mapping[str, Tensor]) -> set[str]:
    """Pairs of maps D -> r -> P, each a sequence of its own, that are added to what another map from D to P writes,
    with r smaller than both (Zamba2): what enters the second projection is the coefficient all the same."""
    pairs: dict[str, list[str]] = {}
    for name in matrices:
        owner = name.rpartition(".")[0].rpartition(".")[0]
        if type(layer.get_submodule(owner)) is nn.Sequential:
            pairs.setdefault(owner, []).append(name)
    shapes = {name: tuple(matrix.shape) for name, matrix in matrices.items()}
    others = {shapes[name] for name in matrices if all(name not in names for names in pairs.values())}
    found: set[str] = set()
    for owner, names in pairs.items():
        if len(names) == 2 == len(list(layer.get_submodule(owner).children())):
            (rank, width), (written, inner) = (shapes[name] for name in names)
            if rank == inner < min(width, written) and (written, width) in others:
                found.update(names)
    return found


def _memory(
    layer: nn.Module, matrices: Mapping[str, Tensor], where: str, width: int, weight: nn.Module | None = None
) -> Memory:
    """The memory that consists of exactly these matrices. Raises ValueError if they are not one."""
    maps = {}
    for name, matrix in matrices.items():
        module = layer.get_submodule(name.rpartition(".")[0])
        if not (name.endswith(".weight") and is_map(module)):
            raise ValueError(f"{where}: cannot tell what {name} {tuple(matrix.shape)} does, which is not a linear map")
        maps[name.removesuffix(".weight")] = module
    shown = listed([f"{name} {sizes(module)[0]}->{sizes(module)[1]}" for name, module in maps.items()])
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


def _experts(layer: nn.Module, owners: Sequence[str], where: str, width: int) -> Experts:
    """The routed experts of a layer, in the one module with three-dimensional parameters."""
    name = owners[0]
    module: Any = layer.get_submodule(name)
    down = getattr(module, "down_proj", None)
    if len(owners) == 1 and isinstance(down, Tensor) and down.ndim == 3:
        here = f"{where}.{name}.down_proj"
        if not hasattr(module, "_apply_gate") and _takes_each(module, width):
            return Experts(here, module, down.shape[0], down.shape[0] * down.shape[1], True, True, each=True)
        if hasattr(module, "_apply_gate"):
            if getattr(module, "has_post_expert_norm", False):  # transformers 5.17 has no such norm
                raise ValueError(f"{where}.{name}: each expert's output is normalized, so its memories add to no sum")
            count = down.shape[1 if module.is_transposed else 2]
            gated, transposed = bool(module.has_gate), bool(module.is_transposed)
            return Experts(here, module, down.shape[0], down.shape[0] * count, gated, transposed)
    if all(p.ndim < 3 or len(p) == 1 for own in owners for p in layer.get_submodule(own).parameters(recurse=False)):
        raise ValueError(f"{where}: cannot tell what {listed(owners)} computes, whose parameters are no linear maps")
    raise ValueError(
        f"{where}: cannot tell what {listed(owners)} computes; experts are known as transformers 5 holds them, in one "
        "module with its experts interface (use_experts_implementation)"
    )


@torch.no_grad()
def _takes_each(module: nn.Module, width: int) -> bool:
    """Whether experts compute act(gate) * up times their second projection, each for its own block of the tokens."""
    [module] = with_weights(module)
    known: Any = module
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    experts, count, _ = known.down_proj.shape
    wanted = {"gate_up_proj": (experts, width, 2 * count), "down_proj": (experts, count, width)}
    if shapes != wanted or not hasattr(module, "act_fn"):
        return False
    tokens = random_tokens(module, width, experts * 2)[0]
    gate, up = (tokens.view(experts, 2, width) @ known.gate_up_proj).chunk(2, dim=-1)
    expected = (known.act_fn(gate) * up) @ known.down_proj
    try:
        written = module(tokens).view(expected.shape)
    except TypeError:  # it needs more than tokens
        return False
    return bool((written - expected).norm() <= 8 * torch.finfo(tokens.dtype).eps * expected.norm())


def _with_shared(
    layer: nn.Module,
    name: str,
    experts: Experts,
    rest: Mapping[str, Tensor],
    beside: Sequence[str],
    where: str,
    width: int,
) -> Parts:
    """Routed experts and a shared expert among the other matrices of their block, or beside the block in the layer.

    What the block, or the layer, writes must be their sum for random tokens; then whatever else is in it can only be
    their router.
    """
    block = name.rpartition(".")[0]
    here = {own: parameter for own, parameter in rest.items() if not block or own.startswith(f"{block}.")}
    outside = {own: parameter for own, parameter in rest.items() if own not in here}
    shared, weight = None, None
    if outside:
        shared, sum_of = _memory(layer, outside, where, width), ""
    else:
        sum_of = block
        children: dict[str, dict[str, Tensor]] = {}
        for own, parameter in here.items():
            children.setdefault(own.removeprefix(f"{block}.").split(".")[0], {})[own] = parameter
        ones = [own for own, parameter in here.items() if parameter.shape == (1, width)]
        weight = layer.get_submodule(ones[0].rpartition(".")[0]) if len(ones) == 1 else None
        for matrices in children.values():
            try:
                found = _memory(layer, matrices, where, width, weight)
            except ValueError:
                continue
            shared = found if shared is None else _memory(layer, rest, where, width)
    scale = _scale(layer, sum_of, name, experts, shared, beside, width) if block else None
    if scale is None:
        if shared is None:
            raise ValueError(f"{where}: cannot tell what {listed(list(rest))} does beside the routed experts")
        at = shared.name.removeprefix(f"{where}.").rpartition(".")[0]
        raise ValueError(
            f"{where}: cannot place the shared expert {at}: its output, or that times a sigmoid, is not added to "
            "the output of the routed experts"
        )
    return (replace(experts, scale=scale), *([] if shared is None else [shared]))


@torch.no_grad()
def _scale(
    layer: nn.Module,
    within: str,
    name: str,
    experts: Experts,
    shared: Memory | None,
    beside: Sequence[str],
    width: int,
) -> float | None:
    """s, if a module of the layer writes, or one of its norms receives, s * routed [+ [sigmoid of the weight] * shared]
    for random tokens, with s 1 or a number that the module holds, or a multiple of that sum; None if not. The layer
    itself adds it to the residual stream, if its attention and mixers write nothing.
    """
    parts = [name, *([] if shared is None else _names_of(layer, (shared.down,)))]
    weight = [] if shared is None or shared.weight is None else _names_of(layer, (shared.weight,))
    names = [within, *parts, *weight, *(beside if not within else ())]
    whole, *modules = with_weights(*(layer.get_submodule(each) for each in names))
    outputs: dict[nn.Module, Tensor] = {}
    sums: list[Tensor] = []
    tokens = random_tokens(whole, width, 8)

    def keep(module: nn.Module, args: object, output: Tensor) -> None:
        outputs[module] = output.cpu().double()

    def keep_input(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        sums.append(args[0])

    def nothing(*args: Tensor, **keywords: Any) -> Any:
        return torch.zeros_like(args[0] if args else keywords["hidden_states"])

    known: Any = whole.forward
    more = (
        {"input_ids": torch.zeros(1, 8, dtype=torch.long)} if "input_ids" in inspect.signature(known).parameters else {}
    )
    with ExitStack() as hooks:
        for module in modules[: len(parts) + len(weight)]:
            hooks.enter_context(module.register_forward_hook(keep))
        for child_name, child in whole.named_children():
            if within and "norm" in child_name:
                hooks.enter_context(child.register_forward_pre_hook(keep_input))
        for each, module in zip(beside if not within else (), modules[len(parts) + len(weight) :]):
            of_attention = "att" in each.rpartition(".")[2] or "Attention" in type(module).__name__
            written = (lambda *args, **keywords: (nothing(*args, **keywords), None)) if of_attention else nothing
            hooks.enter_context(_replaced(module, written))
        try:
            output = whole(tokens, **more)
        except (AttributeError, RuntimeError, TypeError, ValueError):  # it needs more than tokens
            return None
    routed = outputs[modules[0]].view(experts.experts if experts.each else 1, -1, width).sum(0)
    added = outputs[modules[1]].view(-1, width) if shared is not None else torch.zeros_like(routed)
    if weight:
        added = added * outputs[modules[2]].view(-1, 1).sigmoid()
    sums.append(output[0] if isinstance(output, tuple) else output)
    stream = torch.zeros_like(routed) if within else tokens[0].cpu().double()
    for scale in (1.0, *{value for value in vars(whole).values() if isinstance(value, float)}):
        wanted = scale * routed + added
        rounding = 4 * torch.finfo(tokens.dtype).eps * (scale * routed.norm() + added.norm() + stream.norm())
        for found in (written.reshape(-1, width).cpu().double() - stream for written in sums):
            factor = float((found * wanted).sum() / wanted.square().sum())
            if factor and (found - factor * wanted).norm() <= rounding:
                return scale
    return None


@contextmanager
def _replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Make a module compute something else meanwhile."""
    before = vars(module).get("forward")
    vars(module)["forward"] = forward
    try:
        yield
    finally:
        del vars(module)["forward"]
        if before is not None:
            vars(module)["forward"] = before


def with_weights(*modules: nn.Module) -> tuple[nn.Module, ...]:
    """A module and modules in it; for those on the meta device, copies on the CPU with the same random weights."""
    if not any(parameter.is_meta for parameter in modules[0].parameters()):
        return modules
    copies = copied(modules)
    copies[0].to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for parameter in copies[0].parameters():
        parameter.normal_(generator=generator).mul_(parameter.shape[-1] ** -0.5)
    for buffer in copies[0].buffers():
        buffer.zero_()
    return copies


def random_tokens(block: nn.Module, width: int, number: int) -> Tensor:
    """Random tokens (1, number, D) of the type and on the device of a module's weights."""
    tokens = torch.randn(1, number, width, generator=torch.Generator().manual_seed(0))
    weights: list[Tensor] = [*block.parameters(), *block.buffers()]
    kinds = [w.dtype for w in weights if w.is_floating_point() and w.dtype.itemsize > 1]  # others are packed
    return tokens.to(weights[0].device, kinds[0] if kinds else torch.float32)


def listed(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (f", ... ({len(names)} in all)" if len(names) > 6 else "") or "none"
