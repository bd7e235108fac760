"""Measure knowledge entropy of checkpoints (method section 1), with standard errors.

    python -m analysis.entropy --checkpoint 'runs/demo/pretrain/step*-unsharded' --data runs/demo/text/general_train.npy
    python -m analysis.entropy --step 738020 --data_size 2048 --batch_size 4
    python -m analysis.entropy --step all --data_size 2048 --batch_size 4
    python -m analysis.entropy --checkpoint allenai/OLMo-1B@step20000-tokens84B allenai/OLMo-1B@step738020-tokens3095B \
        --data_size 2048 --output results --keep none

Without --data, the instances are the first ones of Dolma in the official run's own order; only their bytes are fetched.
Writes `knowledge_entropy.json` and `mlp_average_coefficients.safetensors` beside each checkpoint, or in
`--output` (one folder a checkpoint where there are several). Under torchrun the instances are shared out among
the processes; any number of them gives the same result.

Of several checkpoints the next one is downloaded and read while one is measured. What is done already (same weights
or commit of the hub, same data and settings) is not measured again, nor downloaded. One that fails is told of, and the
others are measured. A table with paired differences, `knowledge_entropy_series.json` and figures go into `--output`,
or into the folder in which all the checkpoints lie; `python -m analysis.entropy_series` makes them from results alone.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.utils import disable_progress_bars
from numpy.typing import NDArray
from torch import nn

from analysis.instances import CONFIGURATIONS, digest_of, read_instances
from analysis.locations import (
    Location,
    add_checkpoint_flags,
    check_writable,
    checkpoint_locations,
    identity_of,
    label_of,
    step_of,
    tokens_of,
)
from analysis.other_entropies import MEASURES, instance_measures
from analysis.prefetch import is_first_of_machine, prefetch, together
from analysis.series import COEFFICIENTS_FILE, RESULT, Series
from analysis.speed import Speed
from olmo import checkpoint
from olmo.config import load
from olmo.console import Progress
from olmo.data.masks import padded
from olmo.distributed import Ranks, disable_malloc_trim, leave, pick_device, process_group
from olmo.exceptions import ConfigurationError, Parser, exit_status
from olmo.files.atomic import atomic_path
from olmo.files.digests import file_digest
from olmo.files.paths import check_readable
from olmo.files.tensors import read_tensors, save_tensors
from olmo.memory import COEFFICIENTS, CoefficientAverages, GroupedMeans, jackknife_error, layer_entropy, observe
from olmo.memory.locate import describe
from olmo.memory.rescaling import rescale_model
from olmo.model import OLMo

# Of a context's length in the config.json of one family or another: GPT-2 says n_positions, MPT max_seq_len.
_CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


# --- measurement -------------------------------------------------------------------------------------------------


def open_model(
    folder: Path,
    device: torch.device,
    dtype: torch.dtype | str,
    resuscitation: Path | None = None,
    force: bool = False,
) -> nn.Module:
    """The model of a checkpoint folder: ours for OLMo's layouts, transformers' own class for any other, which may keep
    its "auto" dtype. With the edit of a resuscitation file, which must have been made for it, unless `force`.
    """
    if checkpoint.is_olmo(folder):
        assert isinstance(dtype, torch.dtype)
        name = None if resuscitation is None else str(resuscitation)
        config = replace(checkpoint.read_config(folder), resuscitation=name, resuscitation_force=force)
        return checkpoint.load_model(folder, device, dtype, config).eval()
    from transformers import AutoModelForCausalLM

    for path in checkpoint.model_files(folder):
        check_readable(path)
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    except Exception as error:  # each library below has its own errors for damaged files
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"{folder}: transformers cannot load this model: {reason}") from error
    if resuscitation is not None and resuscitation.suffix == ".pt":
        try:
            model.load_state_dict(read_tensors(resuscitation))
        except RuntimeError as error:  # torch's own says it of every tensor
            raise ValueError(f"{resuscitation}: no state dict of the model in {folder}") from error
    elif resuscitation is not None:
        identity = identity_of(folder)
        rescale_model(model, checkpoint.multipliers_for(resuscitation, identity, folder, force))
    return model.to(device).eval()


def measure(
    model: nn.Module,
    rows: Sequence[NDArray[np.int64]],
    batch_size: int,
    coefficient: str,
    device: torch.device,
    ranks: Ranks,
    tolerance: float | None = None,
    description: str = "entropy",
    measures: Sequence[str] = ("knowledge",),
    compiled: bool = False,
) -> dict[str, GroupedMeans]:
    """Averages over instances `rows` (ragged token ids): of coefficients, under "knowledge" (CoefficientAverages), and
    of the other `measures` under their names: "attention" (L,), "next_token" ().

    `compiled`: our own model's layers go through torch.compile, where nothing but coefficients (`abs`) is asked for.
    With a `tolerance` it stops at the first check at which the standard error of H is below it; it checks whenever
    the number of instances has grown by a quarter, at 64 instances the earliest.
    """
    averages: dict[str, GroupedMeans] = {}
    next_check, estimate = 64, ""
    embedding = next(module for module in model.modules() if isinstance(module, nn.Embedding))
    vocabulary = embedding.num_embeddings
    with (
        observe(model, coefficient) as observation,
        Progress(description, len(rows), "instances", show=ranks.is_first) as progress,
    ):
        observation.compiled = compiled and tuple(measures) == ("knowledge",)
        speed = Speed(model, max(map(len, rows)), device, ranks.world_size)
        for start in range(0, len(rows), batch_size * ranks.world_size):
            stop = min(start + batch_size * ranks.world_size, len(rows))
            mine = np.arange(start + ranks.rank, stop, ranks.world_size)
            if len(mine):
                chosen = [rows[i] for i in mine.tolist()]
                largest = max(int(row.max()) for row in chosen)
                if largest >= vocabulary:
                    raise ValueError(f"token {largest} in the data, the model knows {vocabulary}")
                ids, mask = padded(chosen, device)
                found = instance_measures(model, observation, ids, mask, measures)
                if not averages:
                    averages = {name: GroupedMeans(*values.shape[1:]) for name, values in found.items()}
                    averages["knowledge"] = CoefficientAverages(*found["knowledge"].shape[1:])
                for name, values in found.items():
                    averages[name].add(values, mine)
            speed.advance(sum(len(row) for row in rows[start:stop]))
            progress.note = f"{speed}{estimate}"
            progress.advance(stop - start)
            if stop >= next_check and averages and (tolerance is not None or ranks.is_first):
                seen = copy(averages["knowledge"])
                if tolerance is not None:
                    seen.reduce(ranks)  # all ranks decide alike; otherwise what this one has seen will do
                error = float(jackknife_error(seen.leave_one_out().sum(1)))
                estimate = f", H {layer_entropy(seen.average).sum():.4f} +- {error:.1e}"
                if tolerance is not None and error < tolerance:
                    break
                next_check = math.ceil(stop * 1.25)
    if not averages:
        raise ValueError("fewer instances than processes")
    for average in averages.values():
        average.reduce(ranks)
    return averages


def _known(errors: NDArray[np.float64]) -> Any:
    """Standard errors as JSON has them: None where they are not known, of a single instance."""
    return np.where(np.isnan(errors), None, errors).tolist()  # type: ignore[call-overload]


def summary(averages: Mapping[str, GroupedMeans]) -> dict[str, Any]:
    """The numbers of `knowledge_entropy.json` that follow from the averages alone."""
    coefficients = averages["knowledge"].average
    layers, left_out = layer_entropy(coefficients), averages["knowledge"].leave_one_out()
    result = {
        "knowledge_entropy": float(layers.sum()),
        "standard_error": _known(jackknife_error(left_out.sum(1))),
        "layers": layers.tolist(),
        "layer_standard_errors": _known(jackknife_error(left_out)),
        "entropy_avg_act_abs": layers.tolist(),
        "maximum": coefficients.shape[0] * math.log(coefficients.shape[1]),
        "number_of_instances": averages["knowledge"].instances,
        "leave_one_group_out": left_out.tolist(),
        "measures": [name for name in MEASURES if name in averages],
    }
    for name in result["measures"][1:]:
        average, left_out = averages[name].average, averages[name].leave_one_out()
        by_layer = average.ndim == 1
        result[f"{name}_entropy"] = float(average.sum())
        result[f"{name}_standard_error"] = _known(jackknife_error(left_out.sum(1) if by_layer else left_out))
        if by_layer:
            result[f"{name}_layers"] = average.tolist()
            result[f"{name}_layer_standard_errors"] = _known(jackknife_error(left_out))
        result[f"{name}_leave_one_group_out"] = left_out.tolist()
    return result


def _edit(args: argparse.Namespace, folder: Path) -> Path | None:
    """The file of --resuscitation: a path, or a name inside the checkpoint folder."""
    if args.resuscitation is None:
        return None
    return checkpoint.resuscitation_file(args.resuscitation, folder, "--resuscitation")


def _identity(args: argparse.Namespace, location: Location, folder: Path, rows: Sequence[Any]) -> dict[str, Any]:
    """What a result must agree in to be the one asked for; the weights of a folder are told apart by `fingerprint`,
    those of the hub by their commit, after which their folder is named."""
    edit = _edit(args, folder)
    named = {"path": str(location), "step": step_of(location)}
    return {
        "checkpoint": named if isinstance(location, Path) else {**named, "commit": folder.name},
        "data": {"path": args.data, "sha256": digest_of(rows)},
        "coefficient": args.coefficient,
        "precision": args.precision,
        "tolerance": args.tolerance,
        "resuscitation": None if edit is None else file_digest(edit),
    }


def _agrees(result: Any, wanted: Any) -> bool:
    """Whether a result says all that is wanted; it may say more."""
    if isinstance(wanted, dict):
        return isinstance(result, dict) and all(_agrees(result.get(key), value) for key, value in wanted.items())
    return result == wanted


def official_data(args: argparse.Namespace) -> None:
    """Let args name the data of the official run. Raises ConfigurationError where a file of it is missing."""
    args.data = f"configs/official/OLMo-{args.model_size}.yaml"
    if not Path(args.data).is_file():
        raise ConfigurationError(f"--data is missing, and the default, {args.data}, is not in this folder")
    if args.order is None:
        args.order = f"data/global_indices/{args.model_size}/global_indices.npy"
        if not Path(args.order).is_file():
            raise ConfigurationError(
                f"{args.order}: no such data order, whose first instances are the default of --data; get it with: bash "
                f"scripts/get_dataorder.sh --model_size {args.model_size}, or rebuild only as much as is needed with: "
                f"python -m scripts.data_order rebuild {args.data} --first {args.data_size} --output {args.order}"
            )


def check_tokenizer(args: argparse.Namespace, folder: Path) -> None:
    """Raise ConfigurationError where a model cannot have the tokenizer of the official run's data."""
    shape = checkpoint.read_config(folder) if checkpoint.is_olmo(folder) else None
    if shape is None or (shape.embedding_size or shape.vocab_size) != load(args.data).model.embedding_size:
        raise ConfigurationError(f"--data is missing: {folder} has not the tokenizer of the default, OLMo's Dolma")


@dataclass
class Ready:
    """A checkpoint at hand, and what to measure on it; `done` is the result where it is there already."""

    folder: Path
    rows: list[NDArray[np.int64]]
    length: int
    identity: dict[str, Any]
    done: dict[str, Any] | None


def _downloads(output: Path) -> Path:
    """Where `--keep none` has downloads of its own: only what this command brought can lie there."""
    return output / ".download"


def _fetch(args: argparse.Namespace, hub_id: str, output: Path, weights: bool) -> Path:
    if args.keep == "all":
        return checkpoint.download(hub_id, weights=weights)
    try:
        configuration = checkpoint.download(hub_id, _downloads(output), weights=False)
    except FileNotFoundError:
        if (had := checkpoint.downloaded(hub_id)) is None:
            raise
        return had
    had = checkpoint.downloaded(f"{hub_id.partition('@')[0]}@{configuration.name}")
    if had is not None or not weights:
        return had or configuration
    return checkpoint.download(hub_id, _downloads(output))


def _fetched(args: argparse.Namespace, hub_id: str, output: Path) -> Path:
    """What `_fetch` of the first process of this machine has brought; FileNotFoundError where it is not there."""
    cache = None if args.keep == "all" else _downloads(output)
    configuration = checkpoint.downloaded(hub_id, cache, weights=False)
    named = hub_id if configuration is None else f"{hub_id.partition('@')[0]}@{configuration.name}"
    folder = checkpoint.downloaded(named, cache) or checkpoint.downloaded(named)
    if folder is None:
        raise FileNotFoundError(f"{hub_id}: the first process of this machine has not brought it")
    return folder


def prepare(args: argparse.Namespace, location: Location, output: Path) -> Ready:
    """Download a checkpoint where it is on the hub, and read it, so that opening it will not wait for the disk.

    A result that is there already with the same identity spares it: of the hub's, commits tell, before any weights.
    """
    on_hub = isinstance(location, str)
    if on_hub and args.keep == "none":
        check_writable(output)
    folder = _fetch(args, location, output, weights=False) if isinstance(location, str) else location
    if args.official:
        check_tokenizer(args, folder)
    length = args.sequence_length or _context(folder)
    rows = read_instances(args, folder, length)
    identity = _identity(args, location, folder, rows)
    done = _done(args, output, identity) if on_hub else None
    if done is None:
        if isinstance(location, str):
            folder = _fetch(args, location, output, weights=True)
            identity = _identity(args, location, folder, rows)
        identity["checkpoint"]["fingerprint"] = identity_of(folder)
        done = None if on_hub else _done(args, output, identity)
        identity["checkpoint"]["tokens"] = tokens_of(location, folder)
    return Ready(folder, rows, length, identity, done)


def _done(args: argparse.Namespace, output: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    result_file = output / RESULT
    if not result_file.is_file() or not (output / COEFFICIENTS_FILE).is_file():
        return None
    result = json.loads(result_file.read_text(encoding="utf-8"))
    enough = set(args.measures) <= set(result.get("measures", ("knowledge",)))
    return result if enough and _agrees(result, identity) else None


def measure_checkpoint(
    args: argparse.Namespace,
    location: Location,
    ready: Ready | None,
    output: Path,
    device: torch.device,
    ranks: Ranks,
) -> dict[str, Any]:
    """Measure one checkpoint and write its two files; on the first rank, which has `ready`, a result that is done is
    returned as it is."""
    if ranks.sum(np.array([float(ranks.is_first and ready is not None and ready.done is not None)]))[0]:
        return ready.done if ready is not None and ready.done is not None else {}

    def opened() -> tuple[Ready, nn.Module, str]:
        if ranks.is_first:
            check_writable(output)
        here = ready or _prepared_by_another(args, location, output)
        edit = (_edit(args, here.folder), args.resuscitation_force)
        model = open_model(here.folder, device, PRECISIONS[args.precision], *edit)
        return here, model, describe(model)

    here, model, memories = together(ranks, opened)
    if ranks.is_first and not isinstance(model, OLMo):  # ours are known, another family's were found
        print(f"{location}: {memories}", file=sys.stderr)
    asked = (args.batch_size, args.coefficient, device, ranks, args.tolerance)
    compiled = device.type == "cuda" and not args.eager
    averages = measure(model, here.rows, *asked, f"entropy of {label_of(location)}", args.measures, compiled)
    numbers = summary(averages)
    result = {
        **numbers,
        "number_of_tokens": int(sum(len(row) for row in here.rows[: numbers["number_of_instances"]])),
        "sequence_length": here.length,
        "memories": memories,
        **here.identity,
    }
    if ranks.is_first:
        # What finds the same instances again.
        sources = {"order": args.order, "tokenizer": args.tokenizer, "instances": len(here.rows)}
        result["data"] = {**result["data"], **sources}
        output.mkdir(parents=True, exist_ok=True)
        edited = "" if result["resuscitation"] is None else f" resuscitated by {result['resuscitation']}"
        about = {
            "checkpoint_fingerprint": f"{result['checkpoint']['fingerprint']}{edited}",
            "coefficient": args.coefficient,
        }
        average = torch.from_numpy(averages["knowledge"].average).float()
        with atomic_path(output / COEFFICIENTS_FILE) as partial:
            save_tensors(partial, {"mlp_average_coefficients": average}, about)
        with atomic_path(output / RESULT) as partial:
            partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def _prepared_by_another(args: argparse.Namespace, location: Location, output: Path) -> Ready:
    """What a rank needs that does not write: the first one of its machine has downloaded it."""
    folder = location if isinstance(location, Path) else _fetched(args, location, output)
    length = args.sequence_length or _context(folder)
    return Ready(folder, read_instances(args, folder, length), length, {"checkpoint": {}}, None)


def _context(folder: Path) -> int:
    """Tokens that the model takes at once; at most 2048 of another family, whose contexts can be very long."""
    if checkpoint.is_olmo(folder):
        return checkpoint.read_config(folder).max_sequence_length
    raw = checkpoint.transformers_config(folder) or {}
    named = (raw.get(name) for name in _CONTEXT_NAMES)
    return min(next((int(length) for length in named if length), 2048), 2048)


# --- command -----------------------------------------------------------------------------------------------------


def measures(text: str) -> tuple[str, ...]:
    """Names of MEASURES, separated by commas."""
    names = tuple(text.split(","))
    for name in names:
        if name not in MEASURES:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(MEASURES)}")
    return names


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        prog="python -m analysis.entropy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_checkpoint_flags(parser, several=True)
    parser.add_argument(
        "--data",
        help="token .npy (file or URL), datasets folder, JSON with 'text', plain text, or the configuration of a run "
        "(.yaml), for the first instances that it sees; default: the official run of --model_size",
    )
    parser.add_argument("--order", metavar="FILE_OR_URL", help="the data order of the run that --data names")
    parser.add_argument("--tokenizer", help="for text; default: the checkpoint's")
    parser.add_argument("--data_size", type=int, default=2048, help="instances (default 2048)")
    parser.add_argument("--batch_size", type=int, default=4, help="instances a forward pass (default 4)")
    parser.add_argument("--sequence_length", type=int, help="tokens an instance; default: the model's context")
    parser.add_argument("--precision", choices=sorted(PRECISIONS), default="fp32")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps; default: a GPU where there is one")
    parser.add_argument(
        "--eager", action="store_true", help="on a GPU: without torch.compile, which takes a minute before it is faster"
    )
    parser.add_argument("--coefficient", choices=COEFFICIENTS, default="abs")
    parser.add_argument(
        "--measures",
        type=measures,
        default=("knowledge",),
        metavar=",".join(MEASURES),
        help="entropies to measure; knowledge always is (default)",
    )
    parser.add_argument(
        "--resuscitation",
        metavar="FILE",
        help="measure the edit that analysis.change_parameters wrote: a path, or a name inside the checkpoint's folder",
    )
    parser.add_argument("--resuscitation_force", action="store_true", help="also one made for another checkpoint")
    parser.add_argument("--tolerance", type=float, help="stop when the standard error of H is below this")
    parser.add_argument("--output", type=Path, help="folder for the results; default: beside the checkpoint")
    parser.add_argument(
        "--keep",
        choices=("all", "none"),
        default="all",
        help="of what this command downloads from the hub (default all, in the hub's cache); none: each checkpoint is "
        "downloaded into its folder in --output and removed after use",
    )
    args = parser.parse_args(argv)
    if args.order is not None and args.data is not None and Path(args.data).suffix not in CONFIGURATIONS:
        raise ConfigurationError("--order: goes with the configuration of a run as --data")
    for name in ("data_size", "batch_size", "sequence_length"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ConfigurationError(f"--{name} must be at least 1")
    if args.resuscitation is not None and args.output is None:
        raise ConfigurationError("--resuscitation: needs --output; beside the checkpoint lie its own results")
    if args.resuscitation is None and args.resuscitation_force:
        raise ConfigurationError("--resuscitation_force: goes with --resuscitation")
    if args.tolerance is not None and not args.tolerance > 0:
        raise ConfigurationError(f"--tolerance {args.tolerance:g} must be above 0; no standard error is below it")
    return args


def main(argv: Sequence[str]) -> None:
    args = _parse(argv)
    locations = checkpoint_locations(args.step, args.model_size, args.checkpoint or [])
    if args.output is None and not all(isinstance(location, Path) for location in locations):
        raise ConfigurationError("--output: needed with a hub id, whose folder is the download cache")
    if args.output is not None and len({label_of(location) for location in locations}) < len(locations):
        raise ConfigurationError("--output: two checkpoint folders of one name; measure them beside the checkpoints")
    given = Path(args.resuscitation or "")
    if len(locations) > 1 and given.suffix == ".pt" and given.is_file():
        raise ConfigurationError(f"--resuscitation: {args.resuscitation} holds the weights of one checkpoint; name one")
    args.official = args.data is None
    if args.official:
        official_data(args)
        for folder in locations:
            if isinstance(folder, Path):
                check_tokenizer(args, folder)
    series = Series.of(locations, args.output) if len(locations) > 1 else None
    disable_malloc_trim()
    device = pick_device(args.device)

    def output_of(location: Location) -> Path:
        if args.output is None:
            return Path(location)
        return args.output / (label_of(location) if series is not None else "")

    for place in locations:
        if args.resuscitation is not None and output_of(place).resolve() == Path(place).resolve():
            raise ConfigurationError(f"--output: {place} holds the checkpoint's own results; name another folder")

    def prepared(location: Location) -> Ready | None:
        return prepare(args, location, output_of(location)) if is_first_of_machine() else None

    with process_group(device) as ranks:

        def measured(location: Location, ready: Ready | None) -> None:
            output = output_of(location)
            if isinstance(location, str):
                disable_progress_bars()  # those of the next download would run through our own
            result = measure_checkpoint(args, location, ready, output, device, ranks)
            if ranks.is_first:
                error = result["standard_error"]
                shown = "unknown (one instance)" if error is None else f"{error:.4f}"
                others = "".join(
                    f", {name.replace('_', ' ')} {result[f'{name}_entropy']:.4f}"
                    + ("" if error is None else f" +- {result[f'{name}_standard_error']:.4f}")
                    for name in result.get("measures", ["knowledge"])[1:]
                )
                print(
                    f"{location}: H = {result['knowledge_entropy']:.4f}, standard error {shown}, "
                    f"{result['number_of_instances']} instances, at most {result['maximum']:.2f}{others}",
                    flush=True,
                )
                if series is not None:
                    series.add(output, new=ready is not None and ready.done is None)

        def let_go(location: Location) -> None:
            if args.keep == "none" and is_first_of_machine() and isinstance(location, str):
                shutil.rmtree(_downloads(output_of(location)), ignore_errors=True)

        try:
            prefetch(locations, prepared, measured, let_go, ranks)
        finally:
            if series is not None and ranks.is_first:
                series.draw()


if __name__ == "__main__":
    leave(exit_status(main))
