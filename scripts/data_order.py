"""Rebuild, cut and check the order in which a run sees its data: OLMo's `global_indices.npy`.

    python -m scripts.data_order rebuild configs/official/OLMo-1B.yaml --output FILE [--first K] [--epoch E]
    python -m scripts.data_order slice CONFIG --order FILE_OR_URL --first K --output FILE
    python -m scripts.data_order verify CONFIG --order FILE_OR_URL [--world_size W] [--first K]

A file holds little-endian uint32 without a header: place k of the run is instance file[k] of `data.paths`, of which
only the sizes are asked for. `rebuild` shuffles as OLMo does, with the configuration's seed: 4 bytes an instance, in
memory or, where that is short, on disk; up to 16,384 first places need neither. `slice` reads the first K places and no
more; `verify` requires every instance once, shuffled, or with --first, that no instance is repeated in the first K
places.
`--key.sub=value` changes the configuration.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from olmo.checkpoint import complete
from olmo.config import TrainConfig, load
from olmo.console import Progress
from olmo.data.order import PIECE, OrderFile, check_places, verify_order
from olmo.data.sources import TokenFiles
from olmo.exceptions import ConfigurationError, Parser, check_new, exit_status
from olmo.files.atomic import atomic_path
from scripts.prepare.order import open_files, rebuild


def cut(order: OrderFile, source: TokenFiles, first: int, output: Path) -> None:
    """Write the first places of an order to a file. Raises ValueError where the files do not have such an instance."""
    if first > len(order):
        raise ConfigurationError(f"--first {first}: {order.place} has {len(order)} places")
    output.parent.mkdir(parents=True, exist_ok=True)
    with (
        atomic_path(output) as partial,
        partial.open("wb") as file,
        Progress("slice", first, "places") as progress,
    ):
        for start in range(0, first, PIECE):
            places = order.read(start, min(start + PIECE, first), keep=False)
            check_places(order, start, places, source)
            places.tofile(file)
            progress.advance(len(places))
    print(f"{output}: the first {first:,} of {len(order):,} places of {order.place}")


def verify(
    order: OrderFile, source: TokenFiles, config: TrainConfig, world_size: int | None, first: int | None
) -> None:
    """Check an order; where it is wrong, list the files, so that their sizes can be compared with others'."""
    try:
        verify_order(order, source, config.data.drop_last, world_size, config.data_shuffling, first)
    except ValueError:
        for path, size, begin, end in zip(source.paths, source.sizes, source.offsets, source.offsets[1:]):
            print(f"{path}: {size} bytes, instances {begin} to {end - 1}" if begin < end else f"{path}: {size} bytes")
        raise
    if first is not None:
        print(f"{order.place}: the first {first:,} places hold as many instances of the files; {source.extent()}")
        return
    print(
        f"{order.place}: {len(order):,} places hold every instance of the files once"
        f"{'' if len(order) == len(source) else f', but for the end ({len(source):,} instances)'}; {source.extent()}"
    )


def main(argv: Sequence[str]) -> None:
    parser = Parser(prog="python -m scripts.data_order", description=__doc__, allow_abbrev=False)
    modes = parser.add_subparsers(dest="mode", required=True, metavar="{rebuild,slice,verify}")
    for mode in ("rebuild", "slice", "verify"):
        flags = modes.add_parser(mode, description=__doc__, allow_abbrev=False)
        flags.add_argument("config", metavar="CONFIG")
        if mode != "verify":
            flags.add_argument("--output", type=Path, required=True, metavar="FILE")
        flags.add_argument("--first", type=int, metavar="K", required=mode == "slice", help="places from the start")
        if mode != "rebuild":
            flags.add_argument("--order", required=True, metavar="FILE_OR_URL")
        if mode != "slice":
            flags.add_argument("--world_size", type=int, metavar="W", help="ranks: the length is a multiple of it")
        if mode == "rebuild":
            flags.add_argument("--epoch", type=int, metavar="E", help="from 0; default: the configuration's")
    args, overrides = parser.parse_known_args(argv)
    for name, least in (("first", 1), ("world_size", 1), ("epoch", 0)):
        if (value := getattr(args, name, None)) is not None and value < least:
            raise ConfigurationError(f"--{name} must be at least {least}")
    config = load(args.config, overrides, complete)
    if args.mode != "verify":
        check_new(args.output)
    if args.mode == "rebuild":
        rebuild(config, args.output, args.first, args.epoch, args.world_size or 1)
    elif args.mode == "slice":
        cut(OrderFile(args.order), open_files(config), args.first, args.output)
    else:
        verify(OrderFile(args.order), open_files(config), config, args.world_size, args.first)


if __name__ == "__main__":
    sys.exit(exit_status(main))
