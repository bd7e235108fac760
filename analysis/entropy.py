"""Measure knowledge entropy of checkpoints (method section 1), with standard errors.

    python -m analysis.entropy --checkpoint 'runs/demo/pretraining/seed0/step*-unsharded' \\
        --data runs/demo/text/general_train.npy
    python -m analysis.entropy --step 738020 --data_size 2048 --batch_size 4
    python -m analysis.entropy --step all --data_size 2048 --batch_size 4
    python -m analysis.entropy --checkpoint allenai/OLMo-1B@step20000-tokens84B \\
        allenai/OLMo-1B@step738020-tokens3095B --data_size 2048 --output results --keep none

Without --data, the instances are the first ones of Dolma in the official run's own order; only their bytes are
downloaded. Writes `knowledge_entropy.json` and `mlp_average_coefficients.safetensors` beside each checkpoint, or into
`--output` (one folder per checkpoint where there are several). Under torchrun, srun or mpirun the instances are shared
out among the processes; any number of them gives the same result.

While one of several checkpoints is measured, the next one is downloaded and read. A checkpoint that has a result
already (same weights or commit of the hub, same data and settings) is neither measured nor downloaded again. If one
fails, the error is printed and the others are measured. A table with paired differences,
`knowledge_entropy_series.json` and figures are written to `--output`, or to the folder that contains all the
checkpoints; `python -m analysis.entropy_series` makes them again from the results alone.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from analysis.downloads import Downloads
from analysis.edit_flags import add_edit_flags, check_edit_flags, check_one_checkpoint
from analysis.hub_data import FORM, opened
from analysis.instances import CONFIGURATIONS, Instances
from analysis.job import Job, Settings
from analysis.locations import Location, add_checkpoint_flags, checkpoint_locations, folder_names
from analysis.models import PRECISIONS, read_device_map
from analysis.other_entropies import MEASURES
from analysis.prefetch import Failures, prefetch, together
from analysis.results import EDITS
from analysis.series import Series
from olmo.console import fixed
from olmo.distributed import Ranks, adopt_launcher, disable_malloc_trim, exit_process, pick_device, process_group
from olmo.exceptions import ConfigurationError, Parser, exit_status
from olmo.memory import COEFFICIENTS


def main(argv: Sequence[str]) -> None:
    adopt_launcher()
    args = _parse(argv)
    locations = checkpoint_locations(args.step, args.model_size, args.checkpoint or [], args.every)
    _check_output(args, locations)
    series = Series(locations, args.output) if len(locations) > 1 else None
    disable_malloc_trim()
    device = pick_device(args.device)
    flags = {name: value for name, value in vars(args).items() if name in Settings.__dataclass_fields__}
    compiled = device.type == "cuda" and not args.eager and args.device_map is None
    names = folder_names(locations) if args.output is not None and len(locations) > 1 else [""] * len(locations)
    with process_group(device) as ranks:
        instances = _instances(args, locations, ranks)
        settings = Settings(instances, compiled=compiled, **flags)
        jobs = [_job(args, location, settings, name) for location, name in zip(locations, names)]
        failures = Failures(len(jobs), ranks)
        try:
            for job, preparation in prefetch(jobs, Job.prepare, ranks):
                with failures.of(job), job.downloads.deleted_after_use():
                    prepared = together(ranks, preparation)
                    result = job.measure(prepared, device, ranks)
                    if ranks.is_first:
                        given = {word: value for name, word in EDITS.items() if (value := getattr(args, name))}
                        edited = "".join(f", {word} {value}" for word, value in given.items())
                        print(f"{job}{edited}: {_line(result)}", flush=True)
                        _warn_of_few_tokens(result)
                    if ranks.is_first and series is not None and job.output is not None:
                        series.add(job.output, new=prepared is not None and prepared.earlier is None)
            failures.check()
        finally:
            if ranks.is_first and series is not None:
                series.draw()


def _instances(args: argparse.Namespace, locations: Sequence[Location], ranks: Ranks) -> Instances:
    """The instances that the command line names. Raises ConfigurationError where a flag does not apply to them."""
    which = {"length": args.sequence_length, "order": args.order, "tokenizer": args.tokenizer}
    which["pack"] = args.pack != "none"
    if args.data is None:
        instances = Instances.official(args.model_size, args.data_size, **which)
    else:
        instances = Instances(opened(args.data, args.data_size, ranks), args.data_size, **which)
    for name in ("tokenizer", "pack"):
        if getattr(args, name) is not None and not instances.is_text:
            raise ConfigurationError(f"--{name}: only for text as --data; {instances.data} holds tokens")
    for folder in locations:
        if isinstance(folder, Path):
            instances.check_tokenizer(folder)
    return instances


def _job(args: argparse.Namespace, location: Location, settings: Settings, name: str) -> Job:
    output = Path(location) if args.output is None else args.output / name
    if any(getattr(args, name) for name in EDITS) and output.resolve() == Path(location).resolve():
        raise ConfigurationError(f"--output: {location} holds the checkpoint's own results; name another folder")
    # Only what this command has downloaded is in that folder.
    temporary = args.keep == "none" and isinstance(location, str)
    return Job(location, output, settings, Downloads(output / ".download" if temporary else None))


def _warn_of_few_tokens(result: dict[str, Any]) -> None:
    """Print a warning where most of the tokens that the instances could have are missing."""
    mean, most = result["number_of_tokens"] / result["number_of_instances"], result["sequence_length"]
    if mean < most / 2:
        print(
            f"warning: {result['number_of_tokens']:,} tokens: instances have {mean:.1f} on average, --sequence_length "
            f"allows {most}. H grows with their length; compare it with results of the same instances only",
            file=sys.stderr,
        )


def _line(result: dict[str, Any]) -> str:
    """The numbers of one result, for a person."""
    error = result["standard_error"]
    others = "".join(
        f", {name.replace('_', ' ')} {fixed(result[f'{name}_entropy'], 4)}"
        + ("" if error is None else f" +- {result[f'{name}_standard_error']:.4f}")
        for name in result.get("measures", ["knowledge"])[1:]
    )
    return (
        f"H = {fixed(result['knowledge_entropy'], 4)}, standard error "
        f"{'unknown (one instance)' if error is None else f'{error:.4f}'}, "
        f"{result['number_of_instances']} instances{_lengths(result)}, at most {result['maximum']:.2f}{others}"
    )


def _lengths(result: dict[str, Any]) -> str:
    """The lengths of the instances of a result, which those of earlier versions do not have."""
    if "shortest_length" not in result:
        return ""
    mean, shortest = result["mean_length"], result["shortest_length"]
    if mean == shortest:
        return f" of {shortest} tokens"
    return f" ({result['number_of_tokens']:,} tokens, mean {mean:.1f}, shortest {shortest})"


# --- command line ------------------------------------------------------------------------------------------------


def _measures(text: str) -> tuple[str, ...]:
    """Names of MEASURES, separated by commas."""
    names = tuple(text.split(","))
    for name in names:
        if name not in MEASURES:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(MEASURES)}")
    return names


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog="python -m analysis.entropy", description=__doc__)
    add_checkpoint_flags(parser, several=True)
    parser.add_argument(
        "--data",
        help="token .npy (file or URL), datasets folder, JSON with 'text', plain text, a dataset on the Hugging Face "
        f"hub ({FORM}), or the configuration of a run (.yaml), for the first instances that it trains on; default: the "
        "official run of --model_size",
    )
    parser.add_argument("--order", metavar="FILE_OR_URL", help="the data order of the run that --data names")
    parser.add_argument("--tokenizer", help="for text: a file, folder or hub id; default: the checkpoint's")
    parser.add_argument(
        "--pack",
        choices=("eos", "none"),
        help="for text: eos (default) packs documents to instances of --sequence_length tokens, an EOS token after "
        "each document, as in training; none takes each JSON object or paragraph as an instance, however short",
    )
    parser.add_argument("--data_size", type=int, default=2048, help="instances (default 2048)")
    parser.add_argument("--batch_size", type=int, default=4, help="instances per forward pass (default 4)")
    parser.add_argument("--sequence_length", type=int, help="tokens per instance; default: the model's context")
    parser.add_argument(
        "--allow_longer",
        action="store_true",
        help="accept a --sequence_length beyond the model's context where its positions are computed (rotary)",
    )
    parser.add_argument(
        "--precision",
        choices=("auto", *sorted(PRECISIONS)),
        default="fp32",
        help="of the forward pass (default fp32); auto: the type of the checkpoint's files",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps; default: a GPU if there is one")
    parser.add_argument(
        "--device_map",
        metavar="auto|FILE",
        help="spread the model over all GPUs, then CPU memory, then the disk (auto), or as a JSON file of modules and "
        "their devices has it; needs accelerate",
    )
    parser.add_argument(
        "--eager", action="store_true", help="on a GPU: without torch.compile, which needs a minute to compile"
    )
    parser.add_argument("--coefficient", choices=COEFFICIENTS, default="abs")
    parser.add_argument(
        "--measures",
        type=_measures,
        default=("knowledge",),
        metavar=",".join(MEASURES),
        help="entropies to measure (default knowledge, which is always measured)",
    )
    add_edit_flags(parser, "measure")
    parser.add_argument("--tolerance", type=float, help="stop when the standard error of H is below this")
    parser.add_argument("--output", type=Path, help="folder for the results; default: beside the checkpoint")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace results of other weights, instances or settings, or of another program; without it they are an "
        "error, and only the same measurement continues",
    )
    parser.add_argument(
        "--keep",
        choices=("all", "none"),
        default="all",
        help="downloads from the hub to keep (default all, in the hub's cache); none: each checkpoint is downloaded "
        "into its folder in --output and deleted after use",
    )
    args = parser.parse_args(argv)
    if args.order is not None and args.data is not None and Path(args.data).suffix not in CONFIGURATIONS:
        raise ConfigurationError("--order: needs the configuration of a run as --data")
    for name in ("data_size", "batch_size", "sequence_length"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ConfigurationError(f"--{name} must be at least 1")
    if args.allow_longer and args.sequence_length is None:
        raise ConfigurationError("--allow_longer: needs --sequence_length; the default is the model's context")
    check_edit_flags(args)
    if args.device_map is not None:
        for name in ("device", "eager"):
            if getattr(args, name):
                raise ConfigurationError(f"--{name}: no effect with --device_map; give one of the two")
        args.device_map = read_device_map(args.device_map)
    for name in EDITS:
        if getattr(args, name) is not None and args.output is None:
            raise ConfigurationError(f"--{name}: needs --output; the folder of the checkpoint is for its own results")
    if args.tolerance is not None and not args.tolerance > 0:
        raise ConfigurationError(f"--tolerance {args.tolerance:g} must be above 0; no standard error is below it")
    return args


def _check_output(args: argparse.Namespace, locations: Sequence[Location]) -> None:
    """Raise ConfigurationError where the checkpoints need another --output, or another edit."""
    if args.output is None and not all(isinstance(location, Path) for location in locations):
        raise ConfigurationError("--output: needed with a hub id, whose folder is the download cache")
    check_one_checkpoint(args, locations)


if __name__ == "__main__":
    exit_process(exit_status(main))
