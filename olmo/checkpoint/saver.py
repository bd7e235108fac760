"""The checkpoints of a run: when one is due, writing it, which ones are kept, and their copies on S3.

A save goes in this order, so that a process killed at any moment leaves a run that can be resumed:

1. The thread finishes the checkpoint before, whose `latest` link is older.
2. The checkpoint is written under a temporary name, and renamed when it is complete on the disk.
3. The links are set, and the upload begins.
4. Checkpoints beyond the numbers to keep are deleted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch.optim import Optimizer

from ..config.schema import TrainConfig
from ..console import log
from ..distributed.ranks import Ranks
from ..memory.temperature import Temperatures
from ..model.causal_lm import Model
from . import saves, sharded, writing
from .background import BackgroundTask
from .manifest import is_ephemeral
from .optimizer import optimizer_state
from .remote_saves import RemoteSaves

# Kinds of checkpoint: the first two by the end of their names. An ephemeral one is named as the first.
SHARDED, UNSHARDED, EPHEMERAL = "", "-unsharded", "ephemeral"


def open_remote(config: TrainConfig, ranks: Ranks) -> RemoteSaves | None:
    """The copy of a run at `remote_save_folder`, on the first rank; None without one and for a dry run. A collective.

    Raises ConfigurationError if it cannot be written.
    """
    url = config.remote_save_folder
    if url is None:
        return None

    def opened() -> RemoteSaves:
        remote = RemoteSaves(url, Path(config.save_folder))
        remote.check()
        return remote

    remote = ranks.run_on_first(opened)
    return None if config.dry_run else remote


class CheckpointSaver:
    """Saves a run's model and optimizer. Every method is called by all ranks, in the same order."""

    def __init__(
        self, config: TrainConfig, model: Model, optimizer: Optimizer, ranks: Ranks, remote: RemoteSaves | None = None
    ):
        self.config, self.model, self.optimizer, self.ranks, self.remote = config, model, optimizer, ranks, remote
        self.folder = Path(config.save_folder)
        # These weights have been resuscitated and trained since; loading them must not edit them again.
        self._written = replace(config, model=replace(config.model, resuscitation=None, resuscitation_force=False))
        self._task = BackgroundTask(ranks, next(model.parameters()).device)
        self._kept: dict[str, list[int]] = {SHARDED: [], UNSHARDED: [], EPHEMERAL: []}  # steps, oldest first

    def begin(self, resumed_at: int | None) -> None:
        """Count the checkpoints of a run that resumes at a step; None: the run is new, and replaces an older one."""
        if self.remote is not None:
            self.remote.begin(resumed_at)
        if resumed_at is None:
            return
        for step, kind in saves.saved_steps(self.folder):
            if step <= resumed_at:  # later ones are damaged, and will be saved again
                self._kept[EPHEMERAL if is_ephemeral(self._path(step, kind)) else kind].append(step)
        if self.remote is not None:
            for step, kind in self.remote.steps():
                path = self._path(step, kind)
                if step < resumed_at and not path.is_dir():  # deleted here only
                    self._kept[EPHEMERAL if self.remote.is_ephemeral(path.name) else kind].append(step)
        for steps in self._kept.values():
            steps.sort()

    # --- when ---

    @property
    def saves_anything(self) -> bool:
        """Whether the configuration asks for any checkpoint."""
        config = self.config
        intervals = (config.save_interval, config.save_interval_unsharded, config.save_interval_ephemeral)
        return any(i is not None for i in intervals) or bool(config.save_steps_unsharded or config.force_save_unsharded)

    @property
    def saves_only_weights(self) -> bool:
        """Whether all checkpoints of the configuration are weights alone, so that a run that is killed starts anew."""
        intervals = (self.config.save_interval, self.config.save_interval_ephemeral)
        return self.saves_anything and not self.config.save_unsharded_optimizer and intervals == (None, None)

    def due(self, step: int, *, final: bool, cancelled: bool = False) -> list[str]:
        """The kinds of checkpoint to save after a step; a cancelled run saves one that can resume it in any case."""

        def ends(interval: int | None, final: bool) -> bool:
            return interval is not None and (final or step % interval == 0)

        config, kinds = self.config, []
        forced = step in (config.save_steps_unsharded or ()) or (final and config.force_save_unsharded)
        if forced or ends(config.save_interval_unsharded, final):
            kinds.append(UNSHARDED)
        if ends(config.save_interval, final):  # last: a thread writes it while training continues
            kinds.append(SHARDED)
        restarts = SHARDED in kinds or (UNSHARDED in kinds and config.save_unsharded_optimizer)
        if not restarts and (cancelled or ends(config.save_interval_ephemeral, final=False)):
            kinds.append(EPHEMERAL)
        return kinds

    # --- saving ---

    def save(self, kinds: Sequence[str], state: dict[str, Any], temperatures: Temperatures) -> Path:
        """Save the step of `state`, the contents of train.pt; returns the folder of the last of `kinds`.

        An unsharded checkpoint is complete on return. Of any other, tensors have been copied, and a thread writes it.
        """
        path, ranks = self.folder, self.ranks
        for kind in kinds:
            self._task.wait()
            path = self._path(state["global_step"], kind)
            self._kept[kind].append(state["global_step"])
            if kind == UNSHARDED:
                optimizer = self.optimizer if self.config.save_unsharded_optimizer else None
                writing.save(path, self.model, self._written, optimizer, state, temperatures, first=ranks.is_first)
                self._completed(path, self._take_expired())
                ranks.barrier()
                continue
            moments = optimizer_state(self.optimizer)["state"]
            tensors = sharded.snapshot(self.model, moments, ranks)
            ephemeral = kind == EPHEMERAL
            write = partial(
                writing.save_sharded, path, tensors, self.model, self._written, state, temperatures, ephemeral, ranks
            )
            self._task.start(partial(self._write, write, path, self._take_expired()))
        return path

    def unfinished(self, step: int, *, final: bool) -> list[str]:
        """The kinds of checkpoint of a step that a killed process has left to save. A collective."""
        exists = {kind: self.ranks.broadcast_int(self._path(step, kind).is_dir()) for kind in (UNSHARDED, SHARDED)}
        return [kind for kind in self.due(step, final=final) if kind != EPHEMERAL and not exists[kind]]

    def link_existing(self, step: int) -> None:
        """Set the links to the checkpoints of a step, which a killed process may not have set."""
        for path in (self._path(step, UNSHARDED), self._path(step, SHARDED)):
            if self.ranks.is_first and path.is_dir():
                saves.link_latest(path)

    def prune(self) -> None:
        """Delete checkpoints that are no longer to be kept, as every save does."""
        for path in self._take_expired():
            self._delete(path)

    def raise_error(self) -> None:
        """Raise what the thread has raised, if it has ended on all ranks; does not wait for it. A collective."""
        self._task.check()

    def wait(self) -> None:
        """Wait until the thread has written its checkpoint, and uploads that have begun have ended."""
        self._task.wait()
        if self.remote is not None:
            self.remote.wait()

    def finish(self, *, completes_run: bool) -> None:
        """Wait for the thread and upload what is missing.

        Raises OSError if an upload fails and this process completes the run; else the next process tries again.
        """
        self._task.wait()
        if self.remote is not None:
            try:
                self.remote.finish()
            except OSError as error:
                if completes_run:
                    raise
                log.warning("%s", error)

    def _write(self, write: Callable[[], None], path: Path, expired: list[Path]) -> None:
        """What the thread does."""
        write()
        self._completed(path, expired)

    def _completed(self, path: Path, expired: list[Path]) -> None:
        """Link and upload a complete checkpoint; then delete others."""
        if self.ranks.is_first:
            saves.link_latest(path)
            log.info("saved %s", path)
        if self.remote is not None:
            self.remote.saved(path)
        for other in expired:
            self._delete(other)

    # --- which are kept ---

    def _path(self, step: int, kind: str) -> Path:
        return self.folder / f"step{step}{kind.removeprefix(EPHEMERAL)}"

    def _take_expired(self) -> list[Path]:
        """Checkpoints beyond the numbers to keep, and ephemeral ones older than the newest; stops counting them."""
        config, kept = self.config, self._kept
        restart = [k for k in kept if k != UNSHARDED or config.save_unsharded_optimizer]
        newest = max((step for kind in restart for step in kept[kind]), default=0)
        expired = {EPHEMERAL: [step for step in kept[EPHEMERAL] if step < newest]}
        keep = (config.save_num_checkpoints_to_keep, config.save_num_unsharded_checkpoints_to_keep)
        for kind, number in zip((SHARDED, UNSHARDED), keep):
            expired[kind] = kept[kind][: -max(number, 1)] if number >= 0 else []
        for kind, steps in expired.items():
            kept[kind] = [step for step in kept[kind] if step not in steps]
        return [self._path(step, kind) for kind, steps in expired.items() for step in steps]

    def _delete(self, path: Path) -> None:
        if self.ranks.is_first:
            saves.delete(path)
        if self.remote is not None:
            self.remote.removed(path.name)
