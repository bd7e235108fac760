"""How long training waits for a checkpoint: `step{N}/`, which a thread writes, and `step{N}-unsharded/`, which is
complete before training continues. Four layers of OLMo-1B's shape, so that slow disks are no obstacle; waiting grows
with the bytes.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from olmo.checkpoint.saver import SHARDED, UNSHARDED
from olmo.train import Trainer
from scripts.gpu.place import Place
from scripts.gpu.rows import Row
from scripts.gpu.runs import open_trainer

SAVES, BESIDE = 3, 4  # measured saves of a kind, and steps timed beside the thread


def measure(place: Place) -> Iterator[Row]:
    """Seconds of every kind, of the first save and of later ones, and how much longer steps take beside the thread."""
    rows = 4 if place.small else 32
    layers = {} if place.small else {"model.n_layers": 4}
    keep = {"save_num_checkpoints_to_keep": 1, "save_num_unsharded_checkpoints_to_keep": 1}
    trainer = open_trainer(place, rows, rows, **layers, **keep)
    step = _stepper(trainer)
    usual = place.seconds(step, repeats=BESIDE, warmups=3)
    size = 12 * sum(weight.numel() for weight in trainer.model.parameters())  # float32 weights and both moments
    medians: dict[str, float] = {}
    beside: list[float] = []
    for name, kind in {"asynchronous": SHARDED, "blocking": UNSHARDED}.items():
        waits = []
        for _ in range(1 + SAVES):
            step()
            waits += place.seconds(partial(_save, trainer, kind), repeats=1, warmups=0)
            if kind == SHARDED:
                beside += place.seconds(step, repeats=BESIDE, warmups=0)
            trainer.saver.wait()
        first, *later = waits
        medians[name] = statistics.median(later)
        note = f"{size / 1e9:.2f} GB; the first save {first:.2f} s"
        yield Row(f"{name}: training waits", medians[name], "s", note=note, samples=tuple(waits))
    ratio = medians["asynchronous"] / medians["blocking"]
    yield Row("asynchronous / blocking", ratio, "x")
    slower = statistics.median(beside) / statistics.median(usual)
    yield Row("a step beside the thread / without", slower, "x", samples=tuple(beside))
    trainer.reporter.close()


def _stepper(trainer: Trainer) -> Callable[[], Any]:
    """Trains on the next batch, and advances the run's state."""
    state, schedule = trainer.state, trainer.schedule
    trainer.model.train()
    batches = trainer.loader.batches()

    def step() -> None:
        trainer.train_step.run(next(batches), state.step + 1, schedule.at(state.step + 1))
        state.advance(schedule.tokens_per_batch, trainer.loader.batches_per_epoch)

    return step


def _save(trainer: Trainer, kind: str) -> None:
    state = trainer.state.as_saved(trainer.config, 1)
    trainer.saver.save([kind], state, trainer.schedule.at(trainer.state.step).temperatures)
