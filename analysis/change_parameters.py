"""Resuscitate inactive memories of a checkpoint (paper, algorithm 1; method section 2).

    python -m analysis.change_parameters --step 738020 --resuscitation_ratio 0.5 --amplifying_factor 2

Reads the average coefficients that `python -m analysis.entropy` wrote and writes, beside the checkpoint, a file
`resuscitation_ratio{p}_amplifying{q}.safetensors` of multipliers (default), or with `--format full` the whole edited
state dict as the published script does (`.pt`). `model.resuscitation` in a training configuration names either, and
so does `--resuscitation` of analysis.entropy and scripts.convert. Models of other families can be edited too.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from analysis.entropy import open_model
from analysis.locations import add_checkpoint_flags, check_writable, checkpoint_folders, identity_of
from analysis.resuscitation import SELECTIONS, THRESHOLDS, resuscitate
from analysis.verification import verify
from olmo import checkpoint
from olmo.distributed import leave
from olmo.exceptions import ConfigurationError, Parser, exit_status
from olmo.rescaling import Multipliers, check_shapes, rescale_model, rescaled
from olmo.tensors import check_readable, save_tensors, stream_torch_file

SUFFIXES = {"multipliers": ".safetensors", "full": ".pt", "temperature": ".safetensors"}


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


def parse_layers(text: str) -> list[int]:
    """Layers such as 0,3,8-11."""
    layers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not first.isdigit() or (dash and not last.isdigit()) or (dash and int(last) < int(first)):
            raise argparse.ArgumentTypeError(f"{text!r}: expected layers such as 0,3,8-11")
        layers += range(int(first), int(last or first) + 1)
    return layers


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
    parser.add_argument(
        "--threshold", choices=THRESHOLDS, default="layer", help="the quantile of each layer, or of all"
    )
    parser.add_argument("--layers", type=parse_layers, metavar="0,3,8-11", help="those to edit (default all)")
    parser.add_argument("--cap", type=float, help="largest multiplier (default none)")
    parser.add_argument(
        "--format",
        choices=sorted(SUFFIXES),
        default="multipliers",
        help="full: the whole state dict; temperature: the divisors 1/u of the same coefficients, for "
        "model.temperature_MLP, which decay over the run",
    )
    parser.add_argument("--output", type=Path, help="file; default: beside the checkpoint")
    parser.add_argument("--verify", action="store_true", help="measure again what was written, on the same data")
    parser.add_argument("--batch_size", type=int, default=4, help="of --verify, instances a forward pass (default 4)")
    parser.add_argument("--device", help="of --verify: cpu, cuda, cuda:1; default: a GPU where there is one")
    args = parser.parse_args(argv)
    if args.output is not None and args.output.suffix != SUFFIXES[args.format]:
        raise ConfigurationError(
            f"--output {args.output}: --format {args.format} is written as {SUFFIXES[args.format]}"
        )
    if args.verify and args.format == "temperature":
        raise ConfigurationError("--verify: goes with an edit of weights; --format temperature edits none")
    if args.batch_size < 1:
        raise ConfigurationError("--batch_size must be at least 1")
    return args


def file_name(args: argparse.Namespace) -> str:
    """The published name, and behind it what differs from the published setting."""
    name = f"resuscitation_ratio{args.resuscitation_ratio}_amplifying{args.amplifying_factor}"
    if args.select != "lowest":
        name += f"_{args.select}" + (f"_seed{args.seed}" if args.select == "random" and args.seed else "")
    if args.threshold != "layer":
        name += f"_{args.threshold}"
    if args.layers is not None:
        name += "_layers" + "-".join(map(str, args.layers))
    if args.cap is not None:
        name += f"_cap{args.cap}"
    return ("temperature_MLP_" if args.format == "temperature" else "") + name + SUFFIXES[args.format]


def _write_full(
    output: Path, like: Mapping[str, Tensor], read: Callable[[str], Tensor], check: Callable[[], object]
) -> None:
    """Write a state dict as `torch.save` does, tensor by tensor, whole or not at all; `check` may raise in the end."""
    partial = output.with_name(f".{output.name}.partial")
    try:
        stream_torch_file(partial, like, read)
        check()
    except OSError as error:
        raise OSError(f"{output}: cannot be written: {(error.strerror or str(error)).lower()}") from error
    finally:
        if sys.exc_info()[0] is not None:
            partial.unlink(missing_ok=True)
    partial.replace(output)


def main(argv: Sequence[str]) -> None:
    args = _parse(argv)
    named = [args.checkpoint] if args.checkpoint else []
    folder = checkpoint_folders(args.step, args.model_size, named)[0]
    output = args.output or folder / file_name(args)
    check_writable(output.parent)
    coefficients_file = args.coefficients or find_coefficients(folder)
    average, made_for = read_coefficients(coefficients_file)
    asked = (args.resuscitation_ratio, args.amplifying_factor, args.select, args.seed, args.threshold)
    try:
        chosen = resuscitate(average, *asked, args.layers, args.cap)
    except ValueError as error:
        raise ConfigurationError(str(error)) from error

    def check(identity: str) -> str:
        """The identity of the weights, which must be those that the coefficients were measured on."""
        if made_for is not None and made_for != identity:
            raise ValueError(f"{coefficients_file}: measured on another checkpoint than {folder}")
        return identity

    # Also for multipliers: it shows now, not when training starts, that they fit the checkpoint.
    state: Mapping[str, Tensor]
    like: Mapping[str, Tensor]
    identity: str | None
    if checkpoint.is_olmo(folder):
        if checkpoint.transformers_config(folder) is None:
            state = on_disk = checkpoint.StateOnDisk(folder)
            like = on_disk.like
        else:  # its tensors are put together of several
            state = like = checkpoint.read_state(folder)
        check_shapes({name: tensor.shape for name, tensor in like.items()}, chosen.multipliers)
        identity = None if args.format == "full" else check(checkpoint.fingerprint(state))
    else:
        identity = check(identity_of(folder))
        model = open_model(folder, torch.device("cpu"), "auto")
        rescale_model(model, chosen.multipliers)
        state = like = model.state_dict()  # edited; none of OLMo's names is in it
    output.parent.mkdir(parents=True, exist_ok=True)
    if args.format == "full":
        seen = checkpoint.Fingerprint()  # in the one pass over the weights

        def read(name: str) -> Tensor:
            tensor = state[name]
            seen.add(name, tensor)
            return rescaled(name, tensor, chosen.multipliers)

        _write_full(output, like, read, lambda: check(identity or str(seen)))
    elif args.format == "temperature":
        partial = output.with_name(f".{output.name}.partial")
        save_tensors(partial, {"temperature_MLP": 1 / chosen.multipliers}, {"checkpoint_fingerprint": str(identity)})
        partial.replace(output)
    else:
        about = {
            "resuscitation_ratio": args.resuscitation_ratio,
            "amplifying_factor": args.amplifying_factor,
            "select": args.select,
            "seed": args.seed,
            "threshold": args.threshold,
            "layers": args.layers,
            "cap": args.cap,
            "checkpoint_fingerprint": identity,
            "coefficients": str(coefficients_file),
            "coefficients_sha256": hashlib.sha256(average.contiguous().numpy().tobytes()).hexdigest(),
        }
        Multipliers(chosen.multipliers, chosen.selected, about).save(output)
    rows, dead, capped = (int(part.sum()) for part in (chosen.selected, chosen.dead, chosen.capped))
    print(f"{output}: {rows - dead} of {average.numel()} up-projection rows multiplied")
    if capped:
        print(f"{capped} multipliers are cut to {args.cap}")
    if dead:
        print(f"warning: {dead} dead memories (coefficient 0) keep their rows; no finite multiplier revives them")
    if args.verify:
        for line in verify(folder, output, coefficients_file, average, chosen, args):
            print(line)


if __name__ == "__main__":
    leave(exit_status(main))
