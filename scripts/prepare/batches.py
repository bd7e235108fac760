"""The global batches of a run, without its model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from olmo.config import TrainConfig
from olmo.data.loader import Batch, run_loader
from olmo.exceptions import ConfigurationError
from olmo.train import TrainState
from olmo.train.schedule import Schedule


def batches_of_run(config: TrainConfig, steps: range, order_folder: Path | None = None) -> Callable[[int], Batch]:
    """A function that gives the global batch of one of these steps of a run (1-based), before injection.

    order_folder: as in Loader. Raises ConfigurationError where some are before the run's first step or after its last.
    """
    # With a folder, for many steps: more than should be kept on this machine.
    loader = run_loader(config, order_folder=order_folder, keep=order_folder is None)
    start = TrainState.at_start(config)
    last = Schedule(config, start, loader.batches_per_epoch).max_steps
    if steps[0] <= start.step:
        raise ConfigurationError(f"step {steps[0]}: the run begins with step {start.step + 1}")
    if steps[-1] > last:
        raise ConfigurationError(
            f"step {steps[-1]}: the run ends with step {last}; --max_duration={steps[-1]} continues beyond it"
        )

    def batch_of(step: int) -> Batch:
        place = start.epoch * loader.batches_per_epoch + start.batch + step - start.step - 1
        return loader.batch(*divmod(place, loader.batches_per_epoch))

    return batch_of
