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
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from analysis.entropy import open_model
from analysis.locations import add_checkpoint_flags, check_writable, checkpoint_folders, identity_of
from analysis.resuscitation import SELECTIONS, THRESHOLDS, resuscitate
from analysis.verification import measured_before, verify
from olmo import checkpoint
from olmo.checkpoint import is_hub_id
from olmo.distributed import leave
from olmo.exceptions import ConfigurationError, Parser, exit_status
from olmo.files.atomic import atomic_path
from olmo.files.paths import check_readable
from olmo.files.tensors import save_tensors, stream_torch_file
from olmo.memory.rescaling import Multipliers, check_shapes, rescale_model, rescaled, up_projection_name

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
            return file.get_tensor("mlp_average_coefficients").float(), about.get("checkpoint_fingerprint")
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
        if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and int(last) < int(first)):
            raise argparse.ArgumentTypeError(f"{text!r}: expected layers such as 0,3,8-11")
        layers += range(int(first), int(last or first) + 1)
    return sorted(set(layers))


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
    parser.add_argument("--seed", type=int, help="of --select random (default 0)")
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
    parser.add_argument("--batch_size", type=int, help="of --verify, instances a forward pass (default 4)")
    parser.add_argument("--device", help="of --verify: cpu, cuda, cuda:1, mps; default: a GPU where there is one")
    args = parser.parse_args(argv)
    if args.output is not None and args.output.suffix != SUFFIXES[args.format]:
        raise ConfigurationError(
            f"--output {args.output}: --format {args.format} is written as {SUFFIXES[args.format]}"
        )
    if args.verify and args.format == "temperature":
        raise ConfigurationError("--verify: goes with an edit of weights; --format temperature edits none")
    for name in ("batch_size", "device"):
        if getattr(args, name) is not None and not args.verify:
            raise ConfigurationError(f"--{name}: goes with --verify")
    if args.seed is not None and args.select != "random":
        print(f"warning: --seed has no effect with --select {args.select}", file=sys.stderr)
    args.seed, args.batch_size = args.seed or 0, 4 if args.batch_size is None else args.batch_size
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


def _checkpoint_of(args: argparse.Namespace) -> Path:
    """The one checkpoint folder that the flags name."""
    if args.checkpoint and is_hub_id(args.checkpoint) and not (args.output and args.coefficients):
        raise ConfigurationError(
            "--output and --coefficients: needed with a hub id, whose folder is the download cache"
        )
    folders = checkpoint_folders(args.step, args.model_size, [args.checkpoint] if args.checkpoint else [])
    if len(folders) > 1:
        raise ConfigurationError(f"--checkpoint {args.checkpoint}: {len(folders)} folders match; name one")
    return folders[0]


def _check_output(output: Path, folder: Path, coefficients_file: Path) -> None:
    """Raise an error where the output cannot be written, or would replace what it is made from."""
    read = {coefficients_file, *checkpoint.model_files(folder), folder / "model.safetensors", folder / "model.pt"}
    if output.resolve() in {path.resolve() for path in read}:
        raise ConfigurationError(f"--output {output}: names what the edit is made from; choose another name")
    if output.is_dir():
        raise ConfigurationError(f"--output {output}: is a folder; name a file")
    check_writable(output.parent)


class Edited:
    """The weights of a checkpoint folder with their up projections rescaled, and the identity of those on disk.

    Of OLMo's layout tensor by tensor, with memory for no more. `like` has names, shapes and dtypes. Raises ValueError
    where the multipliers (L, M) do not fit: it shows now, not when training starts.
    """

    def __init__(self, folder: Path, multipliers: Tensor):
        self.folder, self.multipliers, self.ours = folder, multipliers, checkpoint.is_olmo(folder)
        self._seen = checkpoint.Fingerprint()
        self._state: Mapping[str, Tensor]
        self.like: Mapping[str, Tensor]
        if not self.ours:
            model = open_model(folder, torch.device("cpu"), "auto")
            rescale_model(model, multipliers)
            self._state = self.like = model.state_dict()
            self.dtype = next(model.parameters()).dtype
            return
        if checkpoint.transformers_config(folder) is None:
            self._state = on_disk = checkpoint.StateOnDisk(folder)
            self.like = on_disk.like
        else:  # its tensors are put together of several
            self._state = self.like = checkpoint.read_state(folder)
        check_shapes({name: tensor.shape for name, tensor in self.like.items()}, multipliers)
        self.dtype = self.like[up_projection_name(0)].dtype

    def read(self, name: str) -> Tensor:
        """An edited tensor."""
        tensor = self._state[name]
        if not self.ours:
            return tensor
        self._seen.add(name, tensor)
        return rescaled(name, tensor, self.multipliers)

    def identity(self) -> str:
        """As `identity_of` the folder; where all tensors have been read once, they are not read again."""
        if not self.ours:
            return identity_of(self.folder)
        return str(self._seen) if self._seen.names == self.like.keys() else checkpoint.fingerprint(self._state)


def main(argv: Sequence[str]) -> None:
    args = _parse(argv)
    folder = _checkpoint_of(args)
    coefficients_file = args.coefficients or find_coefficients(folder)
    output = args.output or folder / file_name(args)
    _check_output(output, folder, coefficients_file)
    average, made_for = read_coefficients(coefficients_file)
    asked = (args.resuscitation_ratio, args.amplifying_factor, args.select, args.seed, args.threshold)
    try:
        chosen = resuscitate(average, *asked, args.layers, args.cap)
    except ValueError as error:
        raise ConfigurationError(str(error)) from error
    before = measured_before(coefficients_file, average, folder) if args.verify else None
    edited, verified = Edited(folder, chosen.multipliers), []
    if args.format == "temperature" and not edited.ours:
        raise ConfigurationError(f"--format temperature: is for the trainer, which knows OLMo models; {folder} is none")
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(output) as partial:
        if args.format == "full":
            stream_torch_file(partial, edited.like, edited.read)
        identity = edited.identity()
        if made_for not in (None, identity):
            raise ValueError(f"{coefficients_file}: measured on another checkpoint than {folder}")
        if args.format == "temperature":
            save_tensors(partial, {"temperature_MLP": 1 / chosen.multipliers}, {"checkpoint_fingerprint": identity})
        elif args.format == "multipliers":
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
            Multipliers(chosen.multipliers, chosen.selected, about).save(partial)
        if before is not None:  # what does not keep the law never gets its name
            stored = edited.dtype
            del edited  # of another family it holds a model
            verified = list(verify(before, folder, partial, stored, average, chosen, args))
    rows, dead, capped = (int(part.sum()) for part in (chosen.selected, chosen.dead, chosen.capped))
    done = "memories get a temperature" if args.format == "temperature" else "up-projection rows multiplied"
    print(f"{output}: {rows - dead} of {average.numel()} {done}")
    if capped:
        print(f"{capped} multipliers are cut to {args.cap}")
    if dead:
        print(f"warning: {dead} dead memories (coefficient 0) keep their rows; no finite multiplier revives them")
    for line in verified:
        print(line)


if __name__ == "__main__":
    leave(exit_status(main))
