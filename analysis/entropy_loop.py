"""The loop of analysis.entropy over its checkpoints: one is measured while the next is downloaded and read."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from analysis.choices import EDITS
from analysis.downloads import Downloads
from analysis.hub_data import opened
from analysis.instances import Instances
from analysis.job import Job, Settings
from analysis.locations import Location, folder_names
from analysis.prefetch import Failures, prefetch, together
from analysis.series import Series
from olmo.console import fixed
from olmo.distributed import Ranks, disable_malloc_trim, pick_device, process_group
from olmo.exceptions import ConfigurationError


def measure_all(args: argparse.Namespace, locations: Sequence[Location]) -> None:
    """Measure the checkpoints as the flags of analysis.entropy have it. Raises as that command does."""
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
