"""A data order rebuilt from a configuration: OLMo's rule, applied to the token files as they are now."""

from __future__ import annotations

from pathlib import Path

from olmo.config import TrainConfig
from olmo.data.order import order_length, write_order
from olmo.data.sources import TokenFiles
from olmo.exceptions import ConfigurationError

SHOWN_FROM = 10**8  # instances; fewer are shuffled within seconds


def open_files(config: TrainConfig) -> TokenFiles:
    """The token files of a run. Raises ConfigurationError where it has none, and the errors of TokenFiles."""
    if not config.data.paths:
        raise ConfigurationError("data.paths: empty; a data order is of token files")
    return TokenFiles(config.data.paths, config.model.max_sequence_length, config.data.memmap_dtype, fresh=True)


def rebuild(
    config: TrainConfig, output: Path, first: int | None = None, epoch: int | None = None, world_size: int = 1
) -> None:
    """Write the order of an epoch, or its first places, and print what it is and what cannot be known about it."""
    source = open_files(config)
    instances, drop_last = len(source), config.data.drop_last
    epoch = (config.epoch or 0) if epoch is None else epoch
    length = order_length(instances, world_size, drop_last)
    if not length:
        raise ConfigurationError(f"--world_size {world_size}: more ranks than instances ({source.extent()})")
    if first is not None and first > length:
        raise ConfigurationError(f"--first {first}: the order has {length} places ({source.extent()})")
    if instances >= SHOWN_FROM:
        print(f"shuffling {instances:,} instances ({source.extent()}): a minute or more", flush=True)
    shuffle = config.data_shuffling
    write_order(output, instances, config.data_seed, epoch, world_size, drop_last, shuffle, first)
    steps = f"an epoch is {length // config.global_train_batch_size:,} steps of {config.global_train_batch_size:,}"
    how = f"shuffled with seed {config.data_seed} + epoch {epoch}" if shuffle else "in the order of the files"
    print(f"{output}: {'all' if first is None else f'the first {first:,} of'} {length:,} places, {how}; {steps}")
    print(
        "This order is rebuilt: OLMo's rule, applied to the files as they are now. Whether the run that the "
        "configuration describes had the same one cannot be checked without its own file."
    )
