"""Checkpoints that a command downloads from the hub: kept in the hub's cache, or deleted after use."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from analysis.locations import Location
from analysis.prefetch import is_first_of_machine
from olmo import checkpoint
from olmo.exceptions import FAILURES


@dataclass(frozen=True)
class Downloads:
    """Downloads into `folder`, which is deleted after use, or into the hub's cache (None)."""

    folder: Path | None

    def fetch(self, location: Location, weights: bool) -> Path:
        """The folder of a checkpoint, downloaded unless the hub's cache has it; without `weights` its configuration is
        enough. The base model of an adapter is kept in the hub's cache. Raises FileNotFoundError."""
        if isinstance(location, Path):
            return checkpoint.fetch_base(location)
        return checkpoint.fetch_base(self._fetch(location, weights), weights)

    def _fetch(self, location: str, weights: bool) -> Path:
        if self.folder is None:
            return checkpoint.download(location, weights=weights)
        try:
            configuration = checkpoint.download(location, self.folder, weights=False)
        except FileNotFoundError:
            if (cached := checkpoint.downloaded(location)) is None:
                raise
            return cached
        cached = checkpoint.downloaded(_at_commit(location, configuration))
        if cached is not None or not weights:
            return cached or configuration
        return checkpoint.download(location, self.folder)

    def fetched(self, location: Location) -> Path:
        """The folder that `fetch` of the first process of this machine has returned. Raises FileNotFoundError."""
        if isinstance(location, Path):
            return location
        configuration = checkpoint.downloaded(location, self.folder, weights=False)
        name = location if configuration is None else _at_commit(location, configuration)
        folder = checkpoint.downloaded(name, self.folder) or checkpoint.downloaded(name)
        if folder is None:
            raise FileNotFoundError(f"{location}: the first process of this machine has not downloaded it")
        return folder

    @contextmanager
    def deleted_after_use(self) -> Iterator[None]:
        """Delete the folder after the `with` block, unless that was interrupted: the same command then finds it."""
        try:
            yield
        except FAILURES:
            self._delete()
            raise
        self._delete()

    def _delete(self) -> None:
        if self.folder is not None and is_first_of_machine():
            shutil.rmtree(self.folder, ignore_errors=True)


def _at_commit(hub_id: str, folder: Path) -> str:
    """The hub id with the commit that names the folder of a download as its revision."""
    return f"{hub_id.partition('@')[0]}@{folder.name}"
