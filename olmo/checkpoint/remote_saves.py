"""Checkpoints of a run and what it tells, copied to S3 (`remote_save_folder`), and brought back on another machine.

    remote = RemoteSaves("s3://bucket/run", Path("runs/run"))
    remote.check()                       # can it be listed, read, written and deleted there?
    newest = remote.latest()             # the newest whole checkpoint of both places, fetched where it is not here
    remote.begin(step)                   # of the checkpoint that the run goes on from, None for a new run
    remote.saved(Path("runs/run/step10"))   # these two are done by a thread, in this order
    remote.removed("step5")
    remote.finish()                      # waits; OSError where a checkpoint could not be uploaded

A checkpoint's `manifest.json` is uploaded last and deleted first: one without it is none. `config.yaml`, by which OLMo
tells whole ones, goes just before it, so that what has neither is the half of an upload or a removal, and may go.
What the run tells comes before the manifest: with the checkpoint of step s there are the metrics of all steps up to s.

A run outlives a place that is out of reach for a while: what could not be uploaded is named in the log and uploaded
with the next checkpoint, and until then nothing is removed there.

As in OLMo 0.6.0, but for `try_load_latest_save`, which there looks in one of the two folders, and the numbers to keep,
which there are of the local folder alone.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path, PurePosixPath
from queue import Empty, Queue

from ..exceptions import ConfigurationError
from ..files.atomic import fsync
from . import folder as saves
from . import manifest
from .s3 import Refused, RemoteFolder

TOLD = (
    "config.yaml",
    "environment.json",
    "train.log",
    "wandb-id.txt",
    "metrics.jsonl",
    "injections.jsonl",
    "data-indices/*.tsv",
)
TABLES = ("probes/*.parquet", "losses/*.parquet")  # written once each

_log = logging.getLogger("olmo")


def _is_half(files: Collection[str]) -> bool:
    """Whether these are not all files of a checkpoint: what an upload or a removal that was killed has left."""
    return manifest.NAME not in files and "config.yaml" not in files


class RemoteSaves:
    """The checkpoints and reports of one run at `remote`, which go with those in its `save_folder`.

    For one process of the run, the first one. One thread uploads and removes, so that training goes on meanwhile.
    """

    def __init__(self, remote: str, save_folder: Path):
        self.folder, self.place = save_folder, RemoteFolder(remote)
        self._thread = ThreadPoolExecutor(1, "remote saves")
        self._begun: Queue[Future[None]] = Queue()
        self._missing: list[str] = []  # checkpoints that are here and should be there, oldest first
        self._doomed: list[str] = []  # those that should no longer be there
        self._tables: dict[str, int] = {}  # sizes of tables that this process has uploaded

    # --- at the start ---

    def check(self) -> None:
        """Raise ConfigurationError where the place cannot be listed, written, read and deleted from; OSError where it
        cannot be reached. A tiny object comes and goes."""
        name = ".can-be-written"
        try:
            self.place.sizes(name)
            self.place.write(name, b"")
            self.place.read(name)
            self.place.delete([name])
        except Refused as error:
            raise ConfigurationError(
                f"remote_save_folder: {error}; it takes a bucket that is there, and s3:ListBucket, s3:GetObject, "
                "s3:PutObject and s3:DeleteObject in it"
            ) from error
        except OSError as error:
            raise OSError(f"remote_save_folder: {error}") from error

    def steps(self) -> list[tuple[int, str]]:
        """The whole checkpoints there, oldest first: pairs of step and kind, as `saves.saved_steps`."""
        whole = (name for name, files in self._found().items() if manifest.NAME in files)
        return sorted((saves.step_and_kind(Path(name)) for name in whole), key=lambda s: (s[0], s[1] == ""))

    def is_ephemeral(self, name: str) -> bool:
        """Whether a whole checkpoint there is marked as one that goes when a newer one is whole."""
        try:
            return bool(json.loads(self.place.read(f"{name}/{manifest.NAME}")).get("ephemeral"))
        except (ValueError, AttributeError):
            return False

    def holds_run(self) -> bool:
        """Whether there are checkpoints, also of OLMo's own trainer, that a new run would replace."""
        return not all(map(_is_half, self._found().values()))

    def latest(self) -> Path | None:
        """The newest whole checkpoint of both places, as `saves.latest`; one that is not here is fetched.

        Raises ValueError where there are some and all are damaged, OSError where the place does not answer.
        """
        newest, damaged = None, None
        try:
            newest = saves.latest(self.folder)
        except ValueError as error:
            damaged = error
        step_here = -1 if newest is None else saves.step_and_kind(newest)[0]
        for step, kind in reversed(self.steps()):
            if step <= step_here:
                break
            try:
                return self.fetch(f"step{step}{kind}")
            except ValueError as error:
                _log.warning("damaged checkpoint: %s", error)
                damaged = damaged or ValueError(
                    f"{error}; no checkpoint in {self.place.url} is whole, remove them to start anew"
                )
        if newest is None and damaged is not None:
            raise damaged
        return newest

    def fetch(self, name: str) -> Path:
        """Bring a checkpoint into the save folder, whole or not at all, with what the run told up to it; its folder.

        Local reports are replaced: those there are complete up to this checkpoint, those here may end before it.
        Raises ValueError that names what is damaged, OSError where something cannot be had or written.
        """
        folder, url = self.folder / name, f"{self.place.url}/{name}"
        partial = folder.with_name(f".{name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            self.place.download({f"{name}/{manifest.NAME}": partial / manifest.NAME})
            try:
                expected = manifest.sizes(partial)
            except ValueError as error:
                raise ValueError(str(error).replace(str(partial), url)) from error
            there = self.place.sizes(f"{name}/")
            for file, size in expected.items():
                if PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts:
                    raise ValueError(f"{url}/{manifest.NAME}: names {file}, which would lie outside of the checkpoint")
                if (found := there.get(f"{name}/{file}")) != size:
                    raise ValueError(f"{url}/{file}: " + ("missing" if found is None else f"{found} bytes of {size}"))
            _log.info("fetching %s, %.1f GB", url, sum(expected.values()) / 1e9)
            self.place.download({f"{name}/{file}": partial / file for file in expected})
            if (problem := manifest.problem(partial)) is not None:
                raise ValueError(problem.replace(str(partial), url))
            self._fetch_reports(partial / ".reports")
            saves.remove(folder, successor=partial)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        return folder

    def _fetch_reports(self, partial: Path) -> None:
        """Bring what the run tells into the save folder, before the checkpoint: with it, it is complete."""
        names = self._reports()
        self.place.download({name: partial / name for name in names})
        for name in names:
            fsync(partial / name)
            (self.folder / name).parent.mkdir(exist_ok=True)
            (partial / name).replace(self.folder / name)
        shutil.rmtree(partial, ignore_errors=True)

    def begin(self, step: int | None) -> None:
        """Go on from the checkpoint of `step`, or with None anew: then all that an older run has there is deleted.

        What killed processes left there goes. Local checkpoints that are missing there come with the next one.
        """
        found = self._found()
        for name, files in found.items():
            if step is None or _is_half(files):
                self._remove(name)
        if step is None:
            self.place.delete(self._reports())
        else:
            here = [self.folder / f"step{s}{kind}" for s, kind in saves.saved_steps(self.folder) if s <= step]
            whole = [path.name for path in here if (path / manifest.NAME).is_file()]
            self._missing = [name for name in whole if manifest.NAME not in found.get(name, ())]
        with suppress(OSError):  # not every store has it, nor lets everyone do it
            self.place.abort_uploads("step")

    # --- while it runs ---

    def saved(self, folder: Path) -> None:
        """Have a checkpoint that is whole here uploaded, with what the run tells, and those that are missing there.

        Where uploads take longer than the time between two checkpoints, those that are no longer kept here when
        their turn comes are left out. Where the place does not take one, the log says so, and the next call tries
        again.
        """
        self._begun.put(self._thread.submit(self._saved, folder))

    def removed(self, name: str) -> None:
        """Have a checkpoint deleted that is no longer kept; while a newer one is not there yet, later."""
        self._begun.put(self._thread.submit(self._removed, name))

    def wait(self) -> None:
        """Until all that was to be done has been done, or has failed."""
        with suppress(Empty):
            while True:
                self._begun.get_nowait().result()

    def finish(self) -> None:
        """Upload what is still missing, and the last reports; OSError where that cannot be done."""
        self.wait()
        error = self._thread.submit(self._catch_up).result()
        if error is not None:
            missing = ", ".join(self._missing) or "the last of what the run tells"
            raise OSError(
                f"remote_save_folder: not uploaded: {missing} ({error}); the checkpoints in {self.folder} are intact"
            ) from error

    # --- what the thread does ---

    def _saved(self, folder: Path) -> None:
        self._missing = [name for name in self._missing if name != folder.name] + [folder.name]
        error = self._catch_up()
        if error is not None:
            missing = ", ".join(self._missing)
            _log.warning("not uploaded: %s (%s); to be tried again with the next checkpoint", missing, error)

    def _removed(self, name: str) -> None:
        self._missing = [missing for missing in self._missing if missing != name]
        self._doomed.append(name)
        if not self._missing:
            self._remove_doomed()

    def _catch_up(self) -> OSError | None:
        """Upload reports and what is missing, the newest checkpoint first, then remove what is to go; the error that
        stopped an upload."""
        try:
            self._upload_reports()
            for name in reversed(self._missing.copy()):
                folder, problem = self.folder / name, None
                try:
                    if (problem := manifest.problem(folder)) is None:
                        self._upload(folder)
                except OSError:
                    if folder.is_dir():  # not removed here since
                        raise
                if problem is not None and folder.is_dir():
                    _log.warning("damaged checkpoint, not uploaded: %s", problem)
                self._missing.remove(name)
        except OSError as error:
            return error
        self._remove_doomed()
        return None

    def _upload(self, folder: Path) -> None:
        name, files = folder.name, list(manifest.sizes(folder))
        self._remove(name)
        last = [file for file in files if file == "config.yaml"]
        for together in ([file for file in files if file not in last], last, [manifest.NAME]):
            self.place.upload({f"{name}/{file}": folder / file for file in together})
        _log.info("uploaded %s to %s", folder, self.place.url)

    def _upload_reports(self) -> None:
        paths = {
            path.relative_to(self.folder).as_posix(): path
            for pattern in (*TOLD, *TABLES)
            for path in self.folder.glob(pattern)
            if not path.name.startswith(".")  # a table that is being written
        }
        sizes = {name: path.stat().st_size for name, path in paths.items() if path.suffix == ".parquet"}
        known = [name for name, size in sizes.items() if self._tables.get(name) == size]
        self.place.upload({name: path for name, path in paths.items() if name not in known})
        self._tables.update(sizes)

    def _remove_doomed(self) -> None:
        while self._doomed:
            try:
                self._remove(self._doomed[0])
            except OSError as error:
                _log.warning("not removed: %s (%s); to be tried again with the next checkpoint", self._doomed[0], error)
                return
            del self._doomed[0]

    def _remove(self, name: str) -> None:
        """Delete a checkpoint there, or what there is of it, in the order that `_is_half` knows."""
        first = [f"{name}/{file}" for file in (manifest.NAME, "config.yaml")]
        found = self.place.sizes(f"{name}/")
        for together in ([first[0]], [first[1]], found.keys() - set(first)):
            self.place.delete(there for there in together if there in found)

    # --- what there is ---

    def _found(self) -> dict[str, list[str]]:
        """The checkpoints there, whole or half: the files of each."""
        found: dict[str, list[str]] = {}
        for path in self.place.sizes("step"):
            name, _, file = path.partition("/")
            if file and re.fullmatch(r"step\d+(-unsharded)?", name):
                found.setdefault(name, []).append(file)
        return found

    def _reports(self) -> list[str]:
        """What a run has told there."""
        return [
            name
            for pattern in (*TOLD, *TABLES)
            for name in self.place.sizes(pattern.partition("*")[0])
            if PurePosixPath(name).match(pattern) and name.count("/") == pattern.count("/")
        ]
