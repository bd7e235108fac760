"""Measure knowledge entropy of checkpoints (paper, section 3.1), with standard errors.

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
from collections.abc import Sequence
from pathlib import Path

from analysis.choices import CONFIGURATIONS, EDITS, FORM, MEASURES, PRECISIONS
from analysis.device_map import read_device_map
from analysis.edit_flags import add_edit_flags, check_edit_flags, check_one_checkpoint
from analysis.locations import Location, add_checkpoint_flags, checkpoint_locations
from olmo.config.model import COEFFICIENTS
from olmo.distributed import adopt_launcher, exit_process
from olmo.exceptions import ConfigurationError, Parser, exit_status


def main(argv: Sequence[str]) -> None:
    adopt_launcher()
    args = _parse(argv)
    locations = checkpoint_locations(args.step, args.model_size, args.checkpoint or [], args.every)
    _check_output(args, locations)
    from analysis.entropy_loop import measure_all  # torch, which no check so far needs

    measure_all(args, locations)


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
