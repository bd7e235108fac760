"""Other ways to the same entropies, each on the same weights and tokens: ours without compilation; transformers with
hooks that reduce coefficients at once, and no logits; and the obvious script, which computes logits and takes the
coefficients of every layer to the host in float32, where it averages them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from analysis.measure import measure as measure_entropy
from olmo.checkpoint.config_json import to_transformers_config
from olmo.checkpoint.transformers_layout import to_transformers_state
from olmo.distributed import Ranks
from olmo.model import OLMo
from scripts.gpu.entropy import BATCH, RATE
from scripts.gpu.models import entropy_operations, random_model, random_rows, shape
from scripts.gpu.place import Place
from scripts.gpu.rows import Row

APART = 1e-3  # of H of a layer; the models of the paper differ by 0.4 in the sum over 16


def measure(place: Place) -> Iterator[Row]:
    """Tokens per second and memory of each way, ratios to the obvious script, and how far H of a layer differs."""
    config = shape(place, "OLMo-1B")
    ours = random_model(place, config, torch.bfloat16)
    rows = random_rows(config, 8 if place.small else 256)
    length = config.max_sequence_length
    few = rows[: 2 * BATCH]
    with torch.device(place.device):
        theirs = as_transformers(ours)
    ways: dict[str, tuple[Callable[[list[Any]], NDArray[np.float64]], list[Any]]] = {
        "eager": (partial(eager, ours, place), rows),
        "transformers with hooks": (partial(hooked, theirs, place), rows),
        "obvious script": (partial(obvious, theirs, place), few),
    }
    rates, found = {}, {}
    for name, (way, given) in ways.items():
        way(few)  # warm up; all ways measure these few, whose H are compared
        found[name] = way(few)
        seconds: list[float] = []
        peak = place.peak_gib(partial(_time, way, given, seconds))
        rates[name] = len(given) * length / seconds[0]
        size = f"{len(given)} x {length:,} tokens"
        yield Row(f"tokens/s, {name}", rates[name], "tokens/s", note=size, samples=(rates[name],))
        yield Row(f"peak memory, {name}", peak, "GiB", samples=(peak,), note="both models' weights included")
        if name == "eager":
            operations = entropy_operations(ours) * len(given) * length
            yield place.mfu(operations, seconds, "MFU, eager", None, size)
    fastest = place.earlier.get(f"entropy: {RATE}")
    rate, name = (rates["eager"], "eager") if fastest is None else (fastest, "compiled")
    for other, value in (("obvious script", 10), ("transformers with hooks", 1)):
        ratio, bar = rate / rates[other], None if fastest is None else place.bar(value)  # of compiled layers
        yield Row(f"{name} / {other}", ratio, "x", at_least=bar, samples=(ratio,))
    apart = max(float(np.abs(found["eager"] - layers).max()) for layers in found.values())
    yield Row("H of a layer, largest difference", apart, "", at_most=APART, samples=(apart,), note="of all three ways")


def _time(way: Callable[[list[Any]], Any], rows: list[Any], seconds: list[float]) -> None:
    started = time.perf_counter()
    way(rows)  # ends with numbers on the host
    seconds.append(time.perf_counter() - started)


def as_transformers(model: OLMo) -> Any:
    """The same weights in transformers' class, on the default device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = to_transformers_config(model.config, torch.bfloat16)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    theirs = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    missing, unexpected = theirs.load_state_dict(to_transformers_state(model.state_dict(), model.config), strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)  # the latter is tied
    return theirs.eval()


def batches(rows: list[NDArray[np.int64]], device: torch.device) -> Iterator[Tensor]:
    for start in range(0, len(rows), BATCH):
        yield torch.from_numpy(np.stack(rows[start : start + BATCH])).to(device)


def eager(model: OLMo, place: Place, rows: list[NDArray[np.int64]]) -> NDArray[np.float64]:
    return measure_entropy(model, rows, BATCH, "abs", place.device, Ranks()).layers


@torch.no_grad()
def hooked(model: Any, place: Place, rows: list[NDArray[np.int64]]) -> NDArray[np.float64]:
    layers = model.model.layers
    totals = [torch.zeros(layer.mlp.down_proj.in_features, device=place.device) for layer in layers]

    def before_down(total: Tensor, module: Any, args: tuple[Tensor, ...]) -> None:
        total += args[0].abs().float().mean(1).sum(0)

    hooks = [
        layer.mlp.down_proj.register_forward_pre_hook(partial(before_down, total))
        for layer, total in zip(layers, totals)
    ]
    for ids in batches(rows, place.device):
        model.model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return entropies([total.cpu().double().numpy() for total in totals])


@torch.no_grad()
def obvious(model: Any, place: Place, rows: list[NDArray[np.int64]]) -> NDArray[np.float64]:
    layers = model.model.layers
    totals = [np.zeros(layer.mlp.down_proj.in_features) for layer in layers]
    kept: dict[int, Tensor] = {}

    def before_down(number: int, module: Any, args: tuple[Tensor, ...]) -> None:
        kept[number] = args[0]

    hooks = [
        layer.mlp.down_proj.register_forward_pre_hook(partial(before_down, number))
        for number, layer in enumerate(layers)
    ]
    for ids in batches(rows, place.device):
        model(ids)
        for number, coefficients in kept.items():
            for instance in coefficients.float().cpu().abs():
                totals[number] += instance.mean(0).double().numpy()
    for hook in hooks:
        hook.remove()
    return entropies(totals)


def entropies(totals: list[NDArray[np.float64]]) -> NDArray[np.float64]:
    """H of each layer, by the formula."""
    shares = [total / total.sum() for total in totals]
    return np.array([-(share * np.log(share)).sum() for share in shares])
