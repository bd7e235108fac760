"""Find the feed-forward memories of a causal language model of any architecture.

Found by structure: the list of layers, and in each layer the parts that `parts.py` describes. Layers need not be alike,
and some may have no feed-forward part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..model.olmo import Block, OLMo
from .maps import sizes
from .parts import Experts, Memory, Parts, listed, parts_of
from .unwrap import computing, is_sharded, kind_of, plain_name, unwrapped


@dataclass(frozen=True)
class Layer:
    """One layer of a model's stack."""

    name: str  # in the model
    number: int  # in the stack, from 0
    module: nn.Module
    parts: Parts  # its feed-forward memories; empty for a layer that has none


def find_layers(model: nn.Module) -> list[Layer]:
    """Every layer of the model's stack with its feed-forward memories, first layer first; several parts only for a
    shared expert beside routed ones.

    The model may be wrapped (`unwrapped`), maps quantized or adapted (`maps.py`). Ours are known by name. Otherwise,
    the matrices of a layer outside its attention (any module with "att" in its name), its mixers of tokens and the
    connections of its streams must be one linear map from M to D with M != D, and from D one map to M, two to M (gated)
    or one to 2 M (gated); or experts as in transformers 5 with their router, and optionally a shared expert whose
    output is added (checked with random tokens). Layers may differ; those with no other matrices have no parts. Raises
    ValueError, naming the place, for anything else.
    """
    model = unwrapped(model)
    if isinstance(model, OLMo):
        return [
            Layer(f"transformer.blocks.{number}", number, block, (_ours(block, number),))
            for number, block in enumerate(model.blocks)
        ]
    try:
        where, stack = _stack(model)
        width = _width(model)
        layers = [
            Layer(f"{where}.{number}", number, layer, parts_of(layer, f"{where}.{number}", width))
            for number, layer in enumerate(map(computing, stack))
        ]
        if not any(layer.parts for layer in layers):
            raise ValueError(f"none of its {len(layers)} layers ({where}) has a feed-forward part")
        _check_separate(layers)
    except ValueError as error:
        sharded = "; FSDP has sharded its weights: measure a saved checkpoint instead" if is_sharded(model) else ""
        raise ValueError(f"{kind_of(model)}: {error}{sharded}") from None
    return layers


def _check_separate(layers: Sequence[Layer]) -> None:
    """Raise ValueError if one module is the part of two layers: its coefficients could not be told apart."""
    owners: dict[nn.Module, str] = {}
    for layer in layers:
        for part in layer.parts:
            module = part.module if isinstance(part, Experts) else part.down
            if module in owners:
                raise ValueError(f"{owners[module]} and {layer.name} are one feed-forward layer that is used twice")
            owners[module] = layer.name


def find_memories(model: nn.Module) -> list[list[Memory | Experts]]:
    """The parts of each of `find_layers` that has any."""
    return [list(layer.parts) for layer in find_layers(model) if layer.parts]


def describe(model: nn.Module) -> str:
    """What `find_layers` finds, in one line; raises ValueError as it does."""
    layers, kind = find_layers(model), kind_of(unwrapped(model))
    groups: dict[str, list[int]] = {}
    for layer in layers:
        # Only the number of the layer differs between the names of layers that are alike.
        pattern = f"{layer.name.rpartition('.')[0]}.*"
        shown = [f"{part.name.replace(layer.name, pattern, 1)}: {_held(part)}" for part in layer.parts]
        groups.setdefault(", and shared in ".join(shown), []).append(layer.number)
    if len(groups) == 1:
        return f"{kind}, {len(layers)} layers; each has in {next(iter(groups))}"
    held = [f"{numbered(numbers)} in {shown}" if shown else "" for shown, numbers in groups.items()]
    without = [f"no feed-forward memories in {numbered(groups[''])}"] if "" in groups else []
    return "; ".join([f"{kind}, {len(layers)} layers", *filter(None, held), *without])


def numbered(numbers: Sequence[int]) -> str:
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


def _ours(block: Block, number: int) -> Memory:
    count = sizes(block.ff_out)[0]
    gated = sizes(block.ff_proj)[1] == 2 * count
    return Memory(f"transformer.blocks.{number}.ff_out", block.ff_out, (block.ff_proj,), count, gated)


def _stack(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The list of the language model's layers, and its name in the model: of those not inside another list (such as of
    experts), the one as long as the configuration's number of layers, else the longest."""
    decoder: Any = model.get_decoder() if hasattr(model, "get_decoder") else None  # type: ignore[operator]
    lists = _lists(model, decoder) if isinstance(decoder, nn.Module) else {}  # without encoders of images or sound
    lists = lists or _lists(model, model)  # most families of transformers 4.56 name no decoder
    if not lists:
        raise ValueError("no list of layers, cannot tell its feed-forward memories")
    depth: Any = getattr(_text_config(model), "num_hidden_layers", None)
    if depth not in [len(module) for module in lists.values()]:
        depth = max(map(len, lists.values()))
    found = [name for name, module in lists.items() if len(module) == depth]
    if len(found) > 1:
        raise ValueError(f"cannot tell which list is that of its layers: {listed(found)}")
    return plain_name(found[0]), lists[found[0]]


def _lists(model: nn.Module, root: nn.Module) -> dict[str, nn.ModuleList]:
    """The outermost lists of modules in a part of the model that are not empty, by their name in the model; none of a
    submodel that has another configuration, such as an encoder of images."""
    prefix = next(name for name, module in model.named_modules() if module is root)
    own = {type(getattr(model, "config", None)), type(_text_config(model)), type(getattr(root, "config", None))}
    found: dict[str, nn.ModuleList] = {}
    others: list[str] = []
    for name, module in root.named_modules(prefix=prefix):
        if any(name.startswith(f"{outer}.") for outer in (*found, *others)):
            continue
        if isinstance(module, nn.ModuleList) and len(module):
            found[name] = module
        elif hasattr(module, "config") and type(module.config) not in own:
            others.append(name)
    return found


def _text_config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _width(model: nn.Module) -> int:
    """D, from the configuration if it has it, because embeddings can be narrower (OPT-350m)."""
    named = getattr(_text_config(model), "hidden_size", None)
    if not hasattr(model, "base_model") or not hasattr(model, "get_input_embeddings"):
        raise ValueError("no model of transformers, whose base_model and get_input_embeddings it lacks")
    return named if isinstance(named, int) else model.get_input_embeddings().embedding_dim  # type: ignore
