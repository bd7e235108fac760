"""Resuscitate inactive memories of a checkpoint (paper, algorithm 1).

    python -m analysis.change_parameters --step 738020 --resuscitation_ratio 0.5 --amplifying_factor 2

Reads the average coefficients that `python -m analysis.entropy` wrote and writes, beside the checkpoint, a file
`resuscitation_ratio{p}_amplifying{q}.safetensors` of multipliers (default), or with `--format full` the full edited
state dict as the published script does (`.pt`). Either file can be used as `model.resuscitation` in a training
configuration and as `--resuscitation` of analysis.entropy and scripts.convert. Models of other families can be edited
too.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from analysis.choices import SELECTIONS, SUFFIXES, THRESHOLDS
from analysis.locations import add_checkpoint_flags, checkpoint_locations
from olmo.checkpoint import resolve
from olmo.distributed import exit_process
from olmo.exceptions import ConfigurationError, Parser, exit_status
from olmo.files.adapters import MERGE, is_adapter
from olmo.files.paths import local_path

if TYPE_CHECKING:
    import torch


def main(argv: Sequence[str]) -> None:
    args = _parse(argv)
    folder = _checkpoint_of(args)
    if is_adapter(folder):
        raise ConfigurationError(f"{folder}: an adapter, which has no up projection to edit; merge it first: {MERGE}")
    from analysis.edit import Edit, check_output, write_edit  # torch, which no check so far needs
    from analysis.results import read_coefficients
    from analysis.verification import measured_before, verify
    from olmo.memory.by_layer import count

    edit = Edit(**{name: getattr(args, name) for name in Edit.__dataclass_fields__})
    coefficients_file = _coefficients_of(args.coefficients, folder)
    output = args.output or folder / edit.file_name(args.format)
    check_output(output, folder, coefficients_file)
    coefficients = read_coefficients(coefficients_file)
    chosen = edit.of(coefficients.average)
    before = measured_before(coefficients, folder) if args.verify else None
    verified: list[str] = []

    def check(written: Path, dtype: torch.dtype) -> None:
        if before is not None:
            how = (args.amplifying_factor, args.batch_size, args.device)
            verified.extend(verify(before, folder, written, dtype, coefficients.average, chosen, *how))

    if coefficients.checkpoint is None:
        print(f"warning: {coefficients.path}: states no checkpoint; it may belong to another one", file=sys.stderr)
    write_edit(folder, edit, chosen, coefficients, output, args.format, check, args.overwrite)
    rows, dead, capped = map(count, (chosen.selected, chosen.dead, chosen.capped))
    done = "memories get a temperature" if args.format == "temperature" else "up-projection rows multiplied"
    print(f"{output}: {rows - dead} of {sum(map(len, chosen.selected.values()))} {done}")
    asked = edit.number_selected(coefficients.average)
    if rows > asked + len(coefficients.average):  # rounding may add one to a layer
        print(f"warning: {rows} memories are selected, not {asked}, because of equal coefficients", file=sys.stderr)
    if capped:
        print(f"{capped} multipliers are capped at {args.cap}")
    if dead:
        print(f"warning: {dead} dead memories (coefficient 0) keep their rows; no finite multiplier revives them")
    for line in verified:
        print(line)


def _coefficients_of(named: Path | None, folder: Path) -> Path:
    """The file that --coefficients names, or the folder that contains it; without it, that of the checkpoint."""
    from analysis.results import coefficients_in, find_coefficients

    if named is None:
        found = find_coefficients(folder)
        if found.parent.resolve() != folder.resolve():
            print(f"coefficients: {found}")
        return found
    found_in = coefficients_in(named) if named.is_dir() else named
    if found_in is None:
        raise ConfigurationError(f"--coefficients {named}: no mlp_average_coefficients.safetensors in this folder")
    return found_in


def _layers(text: str) -> tuple[int, ...]:
    """Parse layers such as 0,3,8-11."""
    layers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        numbers = (first, last) if dash else (first,)
        if not all(re.fullmatch("[0-9]{1,4}", number) for number in numbers) or int(numbers[-1]) < int(first):
            raise argparse.ArgumentTypeError(f"{text!r}: expected layers such as 0,3,8-11")
        layers += range(int(first), int(numbers[-1]) + 1)
    return tuple(sorted(set(layers)))


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog="python -m analysis.change_parameters", description=__doc__)
    add_checkpoint_flags(parser, several=False)
    parser.add_argument(
        "--coefficients",
        type=local_path,
        help="file of average coefficients, or its folder; default: the one beside the checkpoint, or where "
        "analysis.entropy wrote it with --output",
    )
    parser.add_argument("--resuscitation_ratio", type=float, required=True, help="fraction of rows, p in (0, 1]")
    parser.add_argument("--amplifying_factor", type=float, required=True, help="q > 0")
    parser.add_argument("--select", choices=SELECTIONS, default="lowest", help="random and highest are controls")
    parser.add_argument("--seed", type=int, help="of --select random (default 0)")
    parser.add_argument(
        "--threshold", choices=THRESHOLDS, default="layer", help="the quantile of each layer, or of all together"
    )
    parser.add_argument("--layers", type=_layers, metavar="0,3,8-11", help="layers to edit (default all)")
    parser.add_argument("--cap", type=float, help="largest multiplier (default none)")
    parser.add_argument(
        "--format",
        choices=sorted(SUFFIXES),
        default="multipliers",
        help="full: the edited state dict; temperature: the divisors 1/u of the same coefficients, for "
        "model.temperature_MLP, which decay over the run",
    )
    parser.add_argument("--output", type=Path, help="file; default: beside the checkpoint")
    parser.add_argument("--overwrite", action="store_true", help="replace an output that has other content")
    parser.add_argument("--verify", action="store_true", help="measure the edited model on the same data")
    parser.add_argument("--batch_size", type=int, help="of --verify: instances per forward pass (default 4)")
    parser.add_argument("--device", help="of --verify: cpu, cuda, cuda:1, mps; default: a GPU if there is one")
    args = parser.parse_args(argv)
    if args.output is not None and args.output.suffix != SUFFIXES[args.format]:
        raise ConfigurationError(
            f"--output {args.output}: --format {args.format} is written as {SUFFIXES[args.format]}"
        )
    if args.verify and args.format == "temperature":
        raise ConfigurationError("--verify: needs an edit of weights; --format temperature edits none")
    for name in ("batch_size", "device"):
        if getattr(args, name) is not None and not args.verify:
            raise ConfigurationError(f"--{name}: needs --verify")
    if args.seed is not None and args.select != "random":
        print(f"warning: --seed has no effect with --select {args.select}", file=sys.stderr)
    args.seed, args.batch_size = args.seed or 0, 4 if args.batch_size is None else args.batch_size
    if args.batch_size < 1:
        raise ConfigurationError("--batch_size must be at least 1")
    return args


def _checkpoint_of(args: argparse.Namespace) -> Path:
    """The one checkpoint folder that the flags name."""
    steps, named = None if args.step is None else [args.step], [args.checkpoint] if args.checkpoint else []
    locations = checkpoint_locations(steps, args.model_size, named)
    if len(locations) > 1:
        raise ConfigurationError(f"--checkpoint {args.checkpoint}: {len(locations)} checkpoints match; name one")
    [location] = locations
    if isinstance(location, Path):
        return location
    if not args.output:
        raise ConfigurationError("--output: needed with a hub id, whose folder is the download cache")
    return resolve(location)


if __name__ == "__main__":
    exit_process(exit_status(main))
