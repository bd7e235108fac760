"""Measure the knowledge entropy of a model in memory, or of a checkpoint, from a program."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from analysis.choices import MEASURES, PRECISIONS
from analysis.device_map import DeviceMap, check_device_map
from analysis.downloads import Downloads
from analysis.given import Given, GivenTokenizer
from analysis.hub_data import opened as opened_by_name
from analysis.instances import Instances
from analysis.job import Job, Settings
from analysis.locations import checkpoint_locations
from analysis.module import measure_module, own_precision
from analysis.result import Result
from olmo.distributed import Ranks, pick_device
from olmo.memory import COEFFICIENTS

if TYPE_CHECKING:
    from numpy.typing import ArrayLike
    from tokenizers import Tokenizer

_MOST = 2048  # instances, where data_size is not given, as of analysis.entropy


def measure(
    model: nn.Module | str | Path,
    data: str | Path | Iterable[str] | ArrayLike | Iterable[Any],
    *,
    tokenizer: str | Path | Tokenizer | Any = None,
    data_size: int | None = None,
    sequence_length: int | None = None,
    pack: str = "eos",
    batch_size: int = 4,
    coefficient: str = "abs",
    measures: Sequence[str] = ("knowledge",),
    tolerance: float | None = None,
    precision: str | None = None,
    device: str | torch.device | None = None,
    device_map: DeviceMap | None = None,
) -> Result:
    """The knowledge entropy of a model on instances of data (paper, section 3.1).

    A module is measured in evaluation mode and in the type of its own weights. The training mode of every module,
    hooks, gradients and torch's random states are afterwards as before, also after an exception.

    Args:
        model: a module (one of transformers, or ours), or a checkpoint folder or hub id (`owner/name@revision`), which
            is opened as analysis.entropy does.
        data: strings; rows of token ids (lists, an array or a tensor), without padding; a `datasets` object with a
            column `input_ids` (with an `attention_mask`, without its padding) or `text`; or the path of what `--data`
            takes.
        tokenizer: of texts: an object, a path or a name; by default that of the folder that the model was loaded from.
        data_size: instances; by default all that data has, up to 2048.
        sequence_length: tokens of an instance at most; by default the model's context, at most 2048 for families other
            than OLMo's; of rows of token ids, the longest one.
        pack: "eos" packs texts to full instances, an EOS token after each, as in training; "none" takes each by itself.
        batch_size: instances of a forward pass.
        coefficient: "abs" or "relu".
        measures: of knowledge, attention and next_token; knowledge is always measured.
        tolerance: stop once the standard error of H is below it.
        precision: of a checkpoint: fp32 (default), bf16, fp16, or auto, the type of its files.
        device: of a checkpoint; by default a GPU if there is one.
        device_map: of a checkpoint, instead of `device`: "auto", or modules and their places (docs/entropy.md).

    Raises:
        ValueError: in one line, where an argument is wrong, where the memories of the model cannot be found, and where
            the data cannot be read or has fewer than `data_size` instances.
        OSError: where a file cannot be read.
    """
    with naming_arguments():
        settings = settings_of(
            data,
            tokenizer=tokenizer,
            data_size=data_size,
            sequence_length=sequence_length,
            pack=pack,
            batch_size=batch_size,
            coefficient=coefficient,
            measures=measures,
            precision=precision,
            tolerance=tolerance,
        )
        if not isinstance(model, (str, Path)):
            for name, value in (("precision", precision), ("device", device), ("device_map", device_map)):
                if value is not None:
                    raise ValueError(f"{name}: only for a path or hub id as model; a module has its own")
            return measure_module(model, settings)
        if precision not in (None, "auto", *PRECISIONS):
            raise ValueError(f"precision {precision!r} is none of auto, {', '.join(PRECISIONS)}")
        if device_map is not None:
            if device is not None:
                raise ValueError("device: no effect with device_map; give one of the two")
            settings = replace(settings, device_map=check_device_map(device_map))
        return _measure_checkpoint(str(model), settings, None if device is None else str(device))


def settings_of(
    data: Any,
    *,
    tokenizer: Any = None,
    data_size: int | None = None,
    sequence_length: int | None = None,
    pack: str = "eos",
    batch_size: int = 4,
    coefficient: str = "abs",
    measures: Sequence[str] = ("knowledge",),
    precision: str | None = None,
    tolerance: float | None = None,
) -> Settings:
    """The settings of a measurement with the arguments of `measure`. Raises ValueError where one is wrong."""
    _check(pack, batch_size, data_size, sequence_length, coefficient, measures, tolerance)
    most = data_size or _MOST
    named = isinstance(data, (str, Path))
    given = opened_by_name(str(data), most, Ranks()) if named else Given.of(data, most)
    by_name = isinstance(tokenizer, (str, Path))
    opened = None if tokenizer is None else str(tokenizer) if by_name else GivenTokenizer.of(tokenizer)
    instances = Instances(
        given,
        most,
        sequence_length,
        tokenizer=opened,
        pack=pack == "eos",
        at_most=data_size is None,
    )
    if not instances.is_text and (tokenizer is not None or pack != "eos"):
        what = "tokenizer" if tokenizer is not None else "pack"
        raise ValueError(f"{what}: only for text as data; {instances.data} holds tokens")
    return Settings(
        instances,
        coefficient,
        precision=precision or "fp32",
        measures=("knowledge", *(name for name in MEASURES if name in measures and name != "knowledge")),
        tolerance=tolerance,
        batch_size=batch_size,
    )


def _measure_checkpoint(model: str, settings: Settings, device: str | None) -> Result:
    locations = checkpoint_locations(None, "1B", [model])
    if len(locations) > 1:
        raise ValueError(f"model: {model}: {len(locations)} folders match; name one")
    job = Job(locations[0], None, settings, Downloads(None))
    prepared = job.read()
    before = torch.get_float32_matmul_precision()
    try:
        chosen = pick_device(device)
        with own_precision(chosen), torch.random.fork_rng(devices=[]):
            result, _ = job.result(prepared, chosen, Ranks())
    finally:
        torch.set_float32_matmul_precision(before)
    return result


def _check(
    pack: str,
    batch_size: int,
    data_size: int | None,
    sequence_length: int | None,
    coefficient: str,
    measures: Sequence[str],
    tolerance: float | None,
) -> None:
    """Raise ValueError for an argument out of range."""
    for name, number in (("batch_size", batch_size), ("data_size", data_size), ("sequence_length", sequence_length)):
        if number is not None and (not isinstance(number, Integral) or number < 1):
            raise ValueError(f"{name}: {number!r}; expected a whole number of at least 1")
    if isinstance(measures, str):
        raise ValueError(f"measures: {measures!r}; expected a sequence of names, such as ({measures!r},)")
    words = [("pack", pack, ("eos", "none")), ("coefficient", coefficient, COEFFICIENTS)]
    for name, word, known in [*words, *(("measures", one, MEASURES) for one in measures)]:
        if word not in known:
            raise ValueError(f"{name}: {word!r} is none of {', '.join(known)}")
    if tolerance is not None and not tolerance > 0:
        raise ValueError(f"tolerance: {tolerance} must be above 0; no standard error is below it")


@contextmanager
def naming_arguments() -> Iterator[None]:
    """Raise errors that name flags of the commands (--data_size 4) as ValueErrors that name arguments (data_size 4)."""
    try:
        yield
    except ValueError as error:
        message = str(error).replace(", or --allow_longer to measure it all the same", "")  # only the command can
        raise ValueError(re.sub(r"(?<![\w-])--([a-z])", r"\1", message)) from error
