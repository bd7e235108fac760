"""The files that a run writes into its `save_folder`, beside checkpoints.

docs/results.md describes them. metrics.jsonl marks a folder that holds a run: no other file is proof of one.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from ..checkpoint import saves
from ..exceptions import ConfigurationError
from ..files.atomic import atomic_path, fsync
from ..files.lock import Lock, Locked
from ..files.paths import as_json


class RunFolder:
    """The folder of one run, on rank 0, locked against other runs until `close`.

    Raises ConfigurationError where another process holds the lock.
    """

    def __init__(self, path: Path):
        self.path = path
        self.injections, self.tensorboard = path / "injections.jsonl", path / "tensorboard"
        path.mkdir(parents=True, exist_ok=True)
        try:
            self._lock = Lock(path / ".lock")
        except Locked as error:
            raise ConfigurationError(f"save_folder: another run is writing to {path}") from error
        self._metrics: TextIO | None = None
        saves.delete_leftovers(path)

    def clear(self) -> None:
        """Delete what an older run wrote and saved, for a new run."""
        for name in ("probes", "losses", "data-indices", "tensorboard"):
            shutil.rmtree(self.path / name, ignore_errors=True)
        self.injections.unlink(missing_ok=True)
        if (self.path / "metrics.jsonl").is_file():
            for name in ("latest", "latest-unsharded"):
                (self.path / name).unlink(missing_ok=True)
            for step, kind in saves.saved_steps(self.path):
                saves.delete(self.path / f"step{step}{kind}")
            (self.path / "metrics.jsonl").unlink()

    def drop_beyond(self, step: int) -> None:
        """Drop lines and tables of later steps, for a run that resumes from this one.

        TensorBoard's events stay: a reader drops them at the mark that the new file begins with (`purge_step`).
        """
        for path in (self.path / "metrics.jsonl", self.injections):
            _drop_lines(path, lambda line: json.loads(line)["step"] > step)
        for path in self.path.glob("data-indices/rank*.tsv"):
            _drop_lines(path, lambda line: int(line.split("\t")[0]) > step)
        for table in (*self.path.glob("probes/step*.parquet"), *self.path.glob("losses/step*.parquet")):
            if int(table.stem.removeprefix("step")) > step:
                table.unlink()
        for partial in self.path.glob("*/.step*.partial.parquet"):  # a process was killed while writing it
            partial.unlink()

    def begin(self) -> None:
        """Create metrics.jsonl: from now on the folder holds a run."""
        if self._metrics is None:
            self._metrics = (self.path / "metrics.jsonl").open("a", encoding="utf-8", buffering=1)

    def add_metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Append a line to metrics.jsonl; readers see it at once."""
        self.begin()
        assert self._metrics is not None
        with naming(self.path / "metrics.jsonl"):
            self._metrics.write(as_json({"step": step, **values}, self.path / "metrics.jsonl"))

    def add_injection(self, record: Mapping[str, Any]) -> None:
        """Append a line to injections.jsonl."""
        with naming(self.injections), self.injections.open("a", encoding="utf-8") as file:
            file.write(as_json(record, self.injections))

    def write_table(self, name: str, columns: Mapping[str, Any]) -> None:
        """Write a Parquet table atomically. A column that is one integer is repeated in every row."""
        import pyarrow
        import pyarrow.parquet

        path, rows = self.path / name, max(len(v) for v in columns.values() if not isinstance(v, int))
        full = {k: [v] * rows if isinstance(v, int) else v for k, v in columns.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path, durable=True) as partial, naming(path):
            pyarrow.parquet.write_table(pyarrow.table(full), partial)

    def sync(self) -> None:
        """Wait until every line and table is on the disk."""
        files = (self.path / "metrics.jsonl", self.injections)
        appended = ("data-indices/rank*.tsv", "tensorboard/events*")
        # Syncing a folder keeps the names of new files.
        folders = [self.path / name for name in ("probes", "losses", "data-indices", "tensorboard", ".")]
        for path in (*files, *(path for pattern in appended for path in self.path.glob(pattern)), *folders):
            if path.exists():
                fsync(path)

    def close(self) -> None:
        """Close metrics.jsonl and release the lock."""
        try:
            if self._metrics is not None:
                with naming(self.path / "metrics.jsonl"):
                    self._metrics.close()
        finally:
            self._lock.release()


def append_indices(folder: Path, rank: int, step: int, instances: Iterable[int]) -> None:
    """Append a step and the numbers of its instances on this rank to data-indices/rank{rank}.tsv, as OLMo does."""
    folder = folder / "data-indices"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"rank{rank}.tsv").open("a", encoding="utf-8") as file:
        file.write(f"{step}\t" + "\t".join(map(str, instances)) + "\n")


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name `path` in an OSError of writing to an open file, as Python does in that of opening one."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{path}: cannot be written ({error.strerror}); checkpoints are intact") from error


def _drop_lines(path: Path, drop: Callable[[str], bool]) -> None:
    """Keep the complete lines of a file for which `drop` is false."""
    if path.is_file():
        # Line by line: metrics of a long run are gigabytes.
        with path.open(encoding="utf-8") as lines, atomic_path(path) as partial, naming(path):
            kept = (line for line in lines if line.endswith("\n") and not drop(line))
            with partial.open("w", encoding="utf-8") as file:
                file.writelines(kept)
