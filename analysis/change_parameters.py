"""Resuscitate inactive memories of a checkpoint (paper, algorithm 1; method section 2).

    python -m analysis.change_parameters --step 738020 --resuscitation_ratio 0.5 --amplifying_factor 2

Reads the average coefficients that `python -m analysis.entropy` wrote and writes, beside the checkpoint, a file
`resuscitation_ratio{p}_amplifying{q}.safetensors` of multipliers (default), or with `--format full` the whole edited
state dict as the published script does (`.pt`). `model.resuscitation` in a training configuration names either.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from analysis.locations import add_checkpoint_flags, check_writable, checkpoint_folders
from analysis.resuscitation import SELECTIONS, resuscitate
from olmo import checkpoint
from olmo.exceptions import ConfigurationError, Parser, exit_status
from olmo.memory import Multipliers, fingerprint, rescale
from olmo.tensors import check_readable


def read_coefficients(path: Path) -> tuple[Tensor, str | None]:
    """Average coefficients (L, M) float32 and the identity of their checkpoint, where the file tells it.

    Reads the safetensors of analysis.entropy and the published `mlp_average_coefficients.pt`.
    """
    check_readable(path)
    if path.suffix == ".pt":
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises several types for damaged and refused files
            raise ValueError(f"{path}: cannot be read safely: {str(error).splitlines()[0]}") from error
        if not isinstance(loaded, Tensor) or loaded.ndim != 2:
            raise ValueError(f"{path}: expected one tensor, a row a layer")
        return loaded.float(), None
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            return file.get_tensor("mlp_average_coefficients"), about.get("checkpoint_fingerprint")
    except Exception as error:  # safetensors raises its own error type
        raise ValueError(f"{path}: no file of average coefficients: {error}") from error


def find_coefficients(folder: Path) -> Path:
    for suffix in (".safetensors", ".pt"):
        path = folder / f"mlp_average_coefficients{suffix}"
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"{folder}: no mlp_average_coefficients.safetensors; run python -m analysis.entropy on it first"
    )


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        prog="python -m analysis.change_parameters",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_checkpoint_flags(parser, several=False)
    parser.add_argument("--coefficients", type=Path, help="default: those beside the checkpoint")
    parser.add_argument("--resuscitation_ratio", type=float, required=True, help="share of rows, p in (0, 1]")
    parser.add_argument("--amplifying_factor", type=float, required=True, help="q > 0")
    parser.add_argument("--select", choices=SELECTIONS, default="lowest", help="random and highest are controls")
    parser.add_argument("--seed", type=int, default=0, help="of --select random")
    parser.add_argument("--format", choices=("multipliers", "full"), default="multipliers")
    parser.add_argument("--output", type=Path, help="file; default: beside the checkpoint")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> None:
    args = _parse(argv)
    suffix = ".pt" if args.format == "full" else ".safetensors"
    if args.output is not None and args.output.suffix != suffix:
        raise ConfigurationError(f"--output {args.output}: --format {args.format} is written as {suffix}")
    named = [args.checkpoint] if args.checkpoint else []
    folder = checkpoint_folders(args.step, args.model_size, named)[0]
    if not checkpoint.is_olmo(folder):
        raise ConfigurationError(f"{folder}: only OLMo checkpoints can be resuscitated yet")
    control = "" if args.select == "lowest" else f"_{args.select}"
    name = f"resuscitation_ratio{args.resuscitation_ratio}_amplifying{args.amplifying_factor}{control}"
    output = args.output or folder / (name + suffix)
    check_writable(output.parent)
    coefficients_file = args.coefficients or find_coefficients(folder)
    average, made_for = read_coefficients(coefficients_file)
    state = checkpoint.read_state(folder)
    identity = fingerprint(state)
    if made_for is not None and made_for != identity:
        raise ValueError(f"{coefficients_file}: measured on another checkpoint than {folder}")
    try:
        chosen = resuscitate(average, args.resuscitation_ratio, args.amplifying_factor, args.select, args.seed)
    except ValueError as error:
        raise ConfigurationError(str(error)) from error
    # Also for multipliers: it shows now, not when training starts, that they fit the checkpoint.
    edited = rescale(state, chosen.multipliers)
    output.parent.mkdir(parents=True, exist_ok=True)
    if args.format == "full":
        partial = output.with_name(f".{output.name}.partial")
        try:
            torch.save(edited, partial)
        except (OSError, RuntimeError) as error:  # on a full disk torch speaks of its own streams, not of the file
            partial.unlink(missing_ok=True)
            raise OSError(f"{output}: cannot be written: {str(error).splitlines()[0]}") from error
        partial.replace(output)
    else:
        about = {
            "resuscitation_ratio": args.resuscitation_ratio,
            "amplifying_factor": args.amplifying_factor,
            "select": args.select,
            "seed": args.seed,
            "checkpoint_fingerprint": identity,
            "coefficients": str(coefficients_file),
        }
        Multipliers(chosen.multipliers, about).save(output)
    rows, dead = int(chosen.selected.sum()), int(chosen.dead.sum())
    print(f"{output}: {rows - dead} of {average.numel()} up-projection rows multiplied")
    if dead:
        print(f"warning: {dead} dead memories (coefficient 0) keep their rows; no finite multiplier revives them")


if __name__ == "__main__":
    sys.exit(exit_status(main))
