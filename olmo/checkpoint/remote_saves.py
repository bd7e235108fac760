"""Checkpoints and reports of a run, copied to S3 (`remote_save_folder`) and fetched on another machine.

A checkpoint's `manifest.json` is uploaded last and deleted first: without it, no checkpoint counts. `config.yaml`,
by which OLMo recognises complete ones, is next to it in both orders, so that a folder with neither is what a killed
upload or deletion left, and is deleted. Reports are uploaded before the manifest: beside the checkpoint of step s are
the metrics of all steps up to s.

While an upload is missing, nothing is deleted on S3 (docs/checkpoints.md: what a run does if S3 is unreachable).

OLMo 0.6.0 differs in two points: its `try_load_latest_save` looks into one of the two folders only, and it deletes no
checkpoints on S3.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path, PurePosixPath

from ..console import log
from ..exceptions import ConfigurationError
from ..files.atomic import fsync
from ..files.paths import parse_step
from . import manifest, saves
from .s3 import Refused, RemoteFolder

REPORTS = (
    "config.yaml",
    "environment.json",
    "train.log",
    "wandb-id.txt",
    "metrics.jsonl",
    "injections.jsonl",
    "data-indices/*.tsv",
)
TABLES = ("probes/*.parquet", "losses/*.parquet")  # each written once


def _is_half(files: Collection[str]) -> bool:
    """Whether these files are what a killed upload or deletion left of a checkpoint."""
    return manifest.NAME not in files and "config.yaml" not in files


class RemoteSaves:
    """The copy at `remote` of one run's checkpoints and reports in `save_folder`.

    For the first process of the run only. A thread uploads and deletes while training continues.
    """

    def __init__(self, remote: str, save_folder: Path):
        self.folder, self.place = save_folder, RemoteFolder(remote)
        self._thread = ThreadPoolExecutor(1, "remote saves")
        self._begun: list[Future[None]] = []
        self._missing: list[str] = []  # checkpoints to upload, oldest first
        self._doomed: list[str] = []  # checkpoints to delete on S3
        self._tables: dict[str, int] = {}  # sizes of tables that this process has uploaded

    # --- at the start ---

    def check(self) -> None:
        """Raise ConfigurationError unless S3 allows listing, writing, reading and deleting, tried with an empty object;
        OSError if it is unreachable."""
        name = ".can-be-written"
        try:
            self.place.sizes(name)
            self.place.write(name, b"")
            self.place.read(name)
            self.place.delete([name])
        except Refused as error:
            raise ConfigurationError(
                f"remote_save_folder: {error}; it takes an existing bucket, and s3:ListBucket, s3:GetObject, "
                "s3:PutObject and s3:DeleteObject in it"
            ) from error
        except OSError as error:
            raise OSError(f"remote_save_folder: {error}") from error

    def steps(self) -> list[tuple[int, str]]:
        """Step and kind of the complete checkpoints on S3, as `saves.in_order`."""
        return saves.in_order(name for name, files in self._found().items() if manifest.NAME in files)

    def is_ephemeral(self, name: str) -> bool:
        """Whether a checkpoint on S3 is marked as one to delete once a newer one is complete."""
        try:
            return bool(json.loads(self.place.read(f"{name}/{manifest.NAME}")).get("ephemeral"))
        except (ValueError, AttributeError):
            return False

    def holds_run(self) -> bool:
        """Whether S3 has checkpoints, also of OLMo's own trainer, that a new run would replace."""
        return not all(map(_is_half, self._found().values()))

    def latest(self) -> Path | None:
        """The newest complete checkpoint, as `saves.latest`; fetched if S3 has a newer one.

        Raises ValueError if all checkpoints are damaged, OSError if S3 is unreachable.
        """
        newest, damaged = None, None
        try:
            newest = saves.latest(self.folder)
        except ValueError as error:
            damaged = error
        ((step_here, _),) = saves.in_order([newest.name]) if newest else [(-1, "")]
        for step, kind in reversed(self.steps()):
            if step <= step_here:
                break
            if kind and not self._restarts(f"step{step}{kind}"):
                continue  # weights alone
            try:
                return self.fetch(f"step{step}{kind}")
            except ValueError as error:
                log.warning("damaged checkpoint: %s", error)
                damaged = damaged or ValueError(
                    f"{error}; no checkpoint in {self.place.url} is complete, delete them to start anew"
                )
        if newest is None and damaged is not None:
            raise damaged
        return newest

    def _restarts(self, name: str) -> bool:
        """`saves.restarts` of an unsharded copy; also where its manifest cannot be read, which fetching it reports."""
        try:
            return saves.has_trainer_state(json.loads(self.place.read(f"{name}/{manifest.NAME}"))["files"])
        except (OSError, ValueError, KeyError, TypeError):
            return True

    def fetch(self, name: str) -> Path:
        """Fetch a checkpoint into the save folder atomically, with the reports up to it; returns its folder.

        Local reports are replaced: those on S3 are complete up to this checkpoint, local ones may end before it.
        Raises ValueError that names what is damaged, OSError if something cannot be downloaded or written.
        """
        folder, url = self.folder / name, f"{self.place.url}/{name}"
        partial = folder.with_name(f".{name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            self.place.download({f"{name}/{manifest.NAME}": partial / manifest.NAME})
            expected = manifest.sizes(partial)
            there = self.place.sizes(f"{name}/")
            for file, size in expected.items():
                if (found := there.get(f"{name}/{file}")) != size:
                    raise ValueError(f"{url}/{file}: " + ("missing" if found is None else f"{found} bytes of {size}"))
            log.info("fetching %s, %.1f GB", url, sum(expected.values()) / 1e9)
            self.place.download({f"{name}/{file}": partial / file for file in expected})
            if (problem := manifest.problem(partial)) is not None:
                raise ValueError(problem)
            self._fetch_reports(partial / ".reports")
            saves.delete(folder, successor=partial)
        except BaseException as error:
            shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, ValueError):
                raise ValueError(str(error).replace(str(partial), url)) from error
            raise
        return folder

    def _fetch_reports(self, partial: Path) -> None:
        """Fetch the reports into the save folder, before the checkpoint that makes the folder a run to resume."""
        names = self._reports()
        self.place.download({name: partial / name for name in names})
        for name in names:
            fsync(partial / name)
            (self.folder / name).parent.mkdir(exist_ok=True)
            (partial / name).replace(self.folder / name)
        shutil.rmtree(partial, ignore_errors=True)

    def begin(self, step: int | None) -> None:
        """Continue from the checkpoint of `step`; with None begin a new run and delete what an older one has on S3.

        What killed processes left there is deleted. Missing local checkpoints are uploaded with the next one.
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
        with suppress(OSError):  # some stores lack it, or forbid it
            self.place.abort_uploads("step")

    # --- while it runs ---

    def saved(self, folder: Path) -> None:
        """Upload a complete checkpoint, the reports, and checkpoints that are missing on S3, in the thread.

        Checkpoints that have been deleted locally when their turn comes are skipped. A failed upload is logged, and
        the next call tries again.
        """
        self._begun.append(self._thread.submit(self._saved, folder))

    def removed(self, name: str) -> None:
        """Delete a checkpoint on S3, in the thread; while a newer one is not uploaded, later."""
        self._begun.append(self._thread.submit(self._removed, name))

    def wait(self) -> None:
        """Wait until all that was requested has been done or has failed."""
        while self._begun:
            self._begun.pop(0).result()

    def finish(self) -> None:
        """Upload what is still missing, and the last reports; OSError if that fails."""
        self.wait()
        try:
            self._thread.submit(self._catch_up).result()
        except OSError as error:
            missing = ", ".join(self._missing) or "the last reports"
            raise OSError(
                f"remote_save_folder: not uploaded: {missing} ({error}); the checkpoints in {self.folder} are intact"
            ) from error

    # --- what the thread does ---

    def _saved(self, folder: Path) -> None:
        self._missing = [name for name in self._missing if name != folder.name] + [folder.name]
        try:
            self._catch_up()
        except OSError as error:
            missing = ", ".join(self._missing)
            log.warning("not uploaded: %s (%s); to be tried again with the next checkpoint", missing, error)

    def _removed(self, name: str) -> None:
        self._missing = [missing for missing in self._missing if missing != name]
        self._doomed.append(name)
        if not self._missing:
            self._remove_doomed()

    def _catch_up(self) -> None:
        """Upload reports and missing checkpoints, the newest first, then delete. Raises OSError if an upload fails."""
        self._upload_reports()
        for name in reversed(self._missing.copy()):
            folder = self.folder / name
            try:
                if (problem := manifest.problem(folder)) is None:
                    self._upload(folder)
                elif folder.is_dir():
                    log.warning("damaged checkpoint, not uploaded: %s", problem)
            except OSError:
                if folder.is_dir():  # else it was deleted meanwhile
                    raise
            self._missing.remove(name)
        self._remove_doomed()

    def _upload(self, folder: Path) -> None:
        name, files = folder.name, list(manifest.sizes(folder))
        self._remove(name)
        last = [file for file in files if file == "config.yaml"]
        for together in ([file for file in files if file not in last], last, [manifest.NAME]):
            self.place.upload({f"{name}/{file}": folder / file for file in together})
        log.info("uploaded %s to %s", folder, self.place.url)

    def _upload_reports(self) -> None:
        paths = {
            path.relative_to(self.folder).as_posix(): path
            for pattern in (*REPORTS, *TABLES)
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
                log.warning("not removed: %s (%s); to be tried again with the next checkpoint", self._doomed[0], error)
                return
            del self._doomed[0]

    def _remove(self, name: str) -> None:
        """Delete a checkpoint on S3, or what is left of it, in the order that `_is_half` relies on."""
        first = [f"{name}/{file}" for file in (manifest.NAME, "config.yaml")]
        found = self.place.sizes(f"{name}/")
        for together in ([first[0]], [first[1]], found.keys() - set(first)):
            self.place.delete(there for there in together if there in found)

    # --- what S3 has ---

    def _found(self) -> dict[str, list[str]]:
        """The files of each checkpoint on S3, complete or not."""
        found: dict[str, list[str]] = {}
        for path in self.place.sizes("step"):
            name, _, file = path.partition("/")
            if file and parse_step(name):
                found.setdefault(name, []).append(file)
        return found

    def _reports(self) -> list[str]:
        """The names of the reports on S3."""
        return [
            name
            for pattern in (*REPORTS, *TABLES)
            for name in self.place.sizes(pattern.partition("*")[0])
            if PurePosixPath(name).match(pattern) and name.count("/") == pattern.count("/")
        ]
