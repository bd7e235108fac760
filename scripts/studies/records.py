"""Which stages of a study have finished: a record and a log of each, in the study's folder `stages/`."""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import json
import re
import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from olmo.config.load import with_base
from olmo.files.atomic import write_text
from olmo.files.paths import read_json
from olmo.report.environment import environment
from scripts.studies.plan import Plan, Stage
from scripts.studies.read import as_plain

WAITING, RUNNING, FINISHED, FAILED, INTERRUPTED = "waiting", "running", "finished", "failed", "interrupted"
SAVED = 75  # exit status of a command that was interrupted and can be continued
_UNIT = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes


@dataclass
class Record:
    """What is kept of a stage. `key` stands for its command, the configurations that it reads, and the keys of all
    stages that it needs: a stage that finished with the same key is not run again."""

    name: str
    kind: str
    key: str
    command: list[str]  # as it was run, launcher included
    state: str = WAITING
    started: float | None = None  # seconds since the epoch
    seconds: float | None = None  # of all attempts with this key
    peak_memory_mib: float | None = None
    status: int | None = None  # exit status
    reason: str | None = None  # of a failure
    log: str = ""
    job: str | None = None  # of SLURM, its id


class Records:
    """The records of a plan's stages, and plan.json, which is made of both.

    Raises ValueError where a record is damaged.
    """

    def __init__(self, plan: Plan):
        self.plan, self.folder = plan, plan.folder / "stages"
        self.keys: dict[str, str] = {}
        for stage in plan.stages:
            self.keys[stage.name] = self._key(stage)
        self.replaced: set[str] = set()  # stages whose outputs are those of another key
        self.kept: set[str] = set()  # and of these, those whose outputs other studies use as well: they are kept
        self.records = {stage.name: self._read(stage) for stage in plan.stages}
        self.environment = environment()

    @cached_property
    def _study(self) -> str:
        """The text of study.yaml, which each change of a record writes again."""
        return OmegaConf.to_yaml(OmegaConf.create(as_plain(self.plan.study)))

    def _key(self, stage: Stage) -> str:
        parts = [list(stage.command), [_content(file) for file in stage.configurations]]
        needed = [self.keys[name] for name in stage.needs]
        return hashlib.sha256(json.dumps([*parts, needed]).encode()).hexdigest()[:16]

    def path(self, stage: Stage) -> Path:
        return self.folder / f"{stage.label}.json"

    def log(self, stage: Stage) -> Path:
        return self.folder / f"{stage.label}.log"

    def _read(self, stage: Stage) -> Record:
        path, new = self.path(stage), self._new(stage)
        if stage.shared and all(output.exists() for output in stage.outputs):
            new.state = FINISHED
        if not path.is_file():
            return new
        found = dataclasses.replace(read_record(path), name=stage.name)
        if found.key == new.key:
            return found if found.state == FINISHED or new.state != FINISHED else new
        self.replaced.add(stage.name)
        if new.state == FINISHED and found.command[-len(stage.command) :] != list(stage.command):
            self.kept.add(stage.name)
        return new

    def reload(self, stage: Stage) -> Record:
        """The record of a stage as it is now, which a job may have changed."""
        self.records[stage.name] = self._read(stage)
        return self.records[stage.name]

    def _new(self, stage: Stage) -> Record:
        command = ["python", "-m", *stage.command]
        log = self.log(stage).relative_to(self.plan.folder).as_posix()
        return Record(stage.name, stage.kind, self.keys[stage.name], command, log=log)

    def is_finished(self, stage: Stage) -> bool:
        return self.records[stage.name].state == FINISHED and all(path.exists() for path in stage.outputs)

    def begin(self, stage: Stage, command: Sequence[str], started: float) -> Record:
        """Record that a stage has begun, after `clear`."""
        record = self.clear(stage)
        record.command, record.state, record.started = list(command), RUNNING, started
        record.reason = record.status = record.job = None
        self.save(stage)
        return record

    def clear(self, stage: Stage) -> Record:
        """The record of a stage that will run. Deletes what a stage of another key has left: its logs, and the folder
        of a run. A run that the same command began is continued; one without a record is left to the trainer."""
        record = self.records[stage.name]
        if record.state == FINISHED:  # its outputs were deleted
            record = self.records[stage.name] = self._new(stage)
        if record.state == WAITING:
            log = self.log(stage)
            for path in (log, *log.parent.glob(f"{glob.escape(log.stem)}.task*.log")):
                path.unlink(missing_ok=True)
        if stage.name in self.replaced and stage.run is not None and stage.run.is_dir():
            shutil.rmtree(stage.run)
        self.replaced.discard(stage.name)
        return record

    def save(self, stage: Stage) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_record(self.path(stage), self.records[stage.name])
        self.write_plan()

    def write_plan(self, folder: Path | None = None) -> None:
        """Write plan.json, from which the report is made, and study.yaml, the study with all its defaults."""
        folder = folder or self.plan.folder
        folder.mkdir(parents=True, exist_ok=True)
        stages = [dataclasses.asdict(self.records[stage.name]) for stage in self.plan.stages]
        content = {**self.plan.as_json(), "stages": stages, "environment": self.environment}
        write_text(folder / "plan.json", json.dumps(content, indent=1) + "\n")
        write_text(folder / "study.yaml", self._study)


def read_record(path: Path) -> Record:
    """Raises ValueError where a record is damaged."""
    try:
        return Record(**read_json(path))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: damaged: {error}; delete it, and its stage runs again") from error


def write_record(path: Path, record: Record) -> None:
    write_text(path, json.dumps(dataclasses.asdict(record), indent=1) + "\n")


def end_record(
    record: Record, outputs: Iterable[Path], log: Path, status: int, seconds: float, peak_memory: int
) -> None:
    """Note in a record how its stage has ended. status: minus the signal; peak_memory: ru_maxrss of its process."""
    record.seconds = (record.seconds or 0.0) + seconds
    record.peak_memory_mib = max(record.peak_memory_mib or 0.0, peak_memory * _UNIT / 2**20)
    record.status, record.reason = status, None
    missing = next((path for path in outputs if not path.exists()), None)
    if status == SAVED:
        record.state = INTERRUPTED
    elif status == 0 and missing is None:
        record.state = FINISHED
    else:
        record.state = FAILED
        how = f"ended by signal {-status}" if status < 0 else f"exit status {status}"
        record.reason = f"finished without {missing}" if status == 0 else reason_of(log, how)


@cache
def _content(configuration: str) -> Any:
    """The settings of a configuration and its base files; comments do not count."""
    return OmegaConf.to_container(with_base(Path(configuration)))


def reason_of(log: Path, how: str) -> str:
    """Why a stage failed: the last error line of its log, or how it ended with the log's last line."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    errors = re.findall(r"^error: (.*)", text, flags=re.MULTILINE)
    lines = [line for line in text.splitlines() if line.strip()]
    if errors:
        return errors[-1]
    return f"{how}: {lines[-1].strip()}" if lines else how
