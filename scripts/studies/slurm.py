"""Run the stages of a plan as jobs of SLURM, one a stage, each after those that it needs.

submitit writes and submits the jobs. Each runs `run_in_job` (scripts/studies/job.py), which keeps the records that the
local runner keeps; so a study that has begun on one can be continued on the other. A job has the name of its stage,
with the study's folder and the stage's key: by it a later command finds the jobs that an earlier one has submitted.

Only squeue is asked, because many clusters have no accounting (sacct). It forgets a job some minutes after its end;
what has become of its stage is in the record.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import re
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from olmo.console import Progress, clock
from olmo.exceptions import ConfigurationError, Interrupted, needs
from scripts.studies.job import CANCELLED, run_in_job
from scripts.studies.local import ON_DEVICES
from scripts.studies.plan import Stage
from scripts.studies.records import FAILED, FINISHED, INTERRUPTED, RUNNING, SAVED, WAITING, Records, reason_of
from scripts.studies.schema import Cluster

_ENDED = (
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"),
    *("REVOKED", "TIMEOUT"),
)
_NOT_ITS_FAULT = ("BOOT_FAIL", "NODE_FAIL", "PREEMPTED", "REVOKED")  # such a stage is submitted again
_LIMITS = ("DEADLINE", "OUT_OF_MEMORY", "TIMEOUT")  # SLURM has killed the job
_SHORTEST, _LONGEST = 2.0, 15.0  # seconds between two looks at the queue
_PATIENCE = 60.0  # seconds in which a shared file system shows the record that a job has written before it ended
_NOT_RUN = "not run"
_LIMIT_OF_JOBS = r"MaxSubmit|MaxJobs|job submit limit"
# A run that has saved is queued again. The status of srun is the highest of its tasks.
_TEARDOWN = [
    "status=$?",
    'if [ "$status" = 75 ] && scontrol requeue "$SLURM_JOB_ID"; then exit 0; fi',
    'exit "$status"',
]


@dataclass(frozen=True)
class Job:
    """A job as squeue lists it."""

    number: str
    state: str

    @property
    def is_alive(self) -> bool:
        return self.state not in _ENDED


class Slurm:
    """Submits stages as jobs and waits for them; control-C leaves the jobs.

    Raises ConfigurationError where settings of `cluster` have no effect or SLURM is missing, MissingPackage without
    submitit.
    """

    def __init__(self, records: Records, cluster: Cluster):
        self.records, self.cluster = records, cluster
        self.processes = cluster.processes or max(cluster.gpus, 1)
        # Of an estimate of time: as if the cluster had room for all jobs that could run side by side.
        self.jobs, self.threads = max(len(records.plan.stages), 1), cluster.cpus or 1
        self.gpus_a_stage = cluster.gpus * cluster.nodes
        for key, least in (("hours", 0.01), ("warning", 1), ("nodes", 1), ("processes", 1), ("gpus", 0), ("cpus", 1)):
            value = getattr(cluster, key)
            if value is not None and value < least:
                raise ConfigurationError(f"cluster.{key}: {value:g}, must be at least {least:g}")
        if cluster.warning >= cluster.hours * 3600:
            raise ConfigurationError(f"cluster.warning: {cluster.warning} seconds, more than cluster.hours")
        if shutil.which("sbatch") is None:
            raise ConfigurationError(
                "--cluster: sbatch is not installed here: run the command where jobs are submitted"
            )
        self.submitit = needs("submitit", "cluster", "--cluster")
        self.folder = records.folder / "jobs"
        self.numbers: dict[str, str] = {}  # stage -> id of its job, alive or just ended
        self.over: dict[str, str] = {}  # stage -> how it ended
        self.shown: dict[str, tuple[str, str, float | None]] = {}  # job, state, begin of the attempt
        self.refused = False  # SLURM takes no more jobs at the moment
        self.waited = False
        self.gone: dict[str, float] = {}  # stage -> when its job was first seen to have ended without a record

    def run(self, stages: Sequence[Stage]) -> bool:
        """Submit what is missing, wait for it, and print states as they change; returns whether all stages have
        finished. Raises Interrupted where a job was cancelled."""
        self.over = {stage.name: FINISHED for stage in stages if self.records.is_finished(stage)}
        missing = [stage for stage in stages if stage.name not in self.over]
        self._cancel_older()
        print(f"{len(missing)} stages to run as jobs of SLURM; {self.describe()}", flush=True)
        pause = _SHORTEST
        try:
            with Progress("study", len(missing), "stages", show=len(missing) > 1) as progress:
                while len(self.over) < len(stages):
                    before = (dict(self.over), dict(self.shown))
                    jobs, self.refused = queue(), False
                    for stage in missing:
                        if stage.name not in self.over:
                            self._look(stage, jobs)
                            progress.advance(int(stage.name in self.over))
                    if before == (self.over, self.shown):
                        time.sleep(pause)
                        pause = min(pause * 1.5, _LONGEST)
                    else:
                        self.records.write_plan()
                        pause = _SHORTEST
        except KeyboardInterrupt:
            print("the jobs continue; the same command waits for them again, scancel ends them", flush=True)
            raise
        if INTERRUPTED in self.over.values():
            raise Interrupted("a job was cancelled; the same command submits its stage again, which continues")
        return all(state == FINISHED for state in self.over.values())

    def describe(self) -> str:
        """What a training run is given."""
        cluster = self.cluster
        given = {"node": cluster.nodes, "process": self.processes, "GPU": cluster.gpus}
        parts = [f"{n} {name}{'' if n == 1 else 'es' if name == 'process' else 's'}" for name, n in given.items()]
        return (
            f"training on {parts[0]} of {parts[1]} and {parts[2]}, others as one process; {cluster.hours:g} hours each"
        )

    def _look(self, stage: Stage, jobs: Mapping[str, Job]) -> None:
        """Bring one stage up to date with the queue: submit it, print what has changed, or note its end."""
        job = jobs.get(self._job_name(stage))
        if job is not None and job.is_alive:
            self.numbers[stage.name] = job.number
            self.gone.pop(stage.name, None)
            self._show(stage, job.state in ("RUNNING", "COMPLETING"))
            return
        if stage.name in self.numbers:
            self._ended(stage, job.state if job is not None else "")
        elif self.records.reload(stage).state == FINISHED and self.records.is_finished(stage):
            self._over(stage, FINISHED)  # a job that an earlier command submitted, between two looks at the queue
        if stage.name in self.numbers or stage.name in self.over:
            return
        lacking = next((name for name in stage.needs if self.over.get(name, FINISHED) != FINISHED), None)
        if lacking is None:
            self._submit(stage)
        else:
            self.over[stage.name] = _NOT_RUN
            print(f"not run: {stage.name}: it needs '{lacking}'", flush=True)

    def _submit(self, stage: Stage) -> None:
        waits_for = [name for name in stage.needs if name not in self.over]
        if self.refused or any(name not in self.numbers or name in self.gone for name in waits_for):
            return
        needed = [self.numbers[name] for name in waits_for]
        nodes = self.cluster.nodes if stage.kind == "train" else 1
        processes = self.processes if stage.kind == "train" else 1
        command = ["srun", f"--ntasks={nodes * processes}"] if nodes * processes > 1 else []
        record = self.records.clear(stage)
        record.command = [*command, "python", "-m", *stage.command]
        record.state = WAITING if record.state == WAITING else INTERRUPTED
        record.started = record.status = record.reason = record.job = None
        self.records.save(stage)
        executor = self.submitit.AutoExecutor(folder=self.folder, cluster="slurm")
        executor.update_parameters(**self._parameters(stage, nodes, processes, needed))
        configuration = {name: os.environ[name] for name in ("SLURM_CONF",) if name in os.environ}
        try:
            # Variables of a job that this command may itself be part of would reach the new one. sbatch reports errors
            # twice, of which one is caught.
            with self.submitit.helpers.clean_env(), redirect_stderr(io.StringIO()):
                os.environ.update(configuration)
                job = executor.submit(
                    run_in_job, stage, self.records.path(stage).absolute(), self.records.log(stage).absolute()
                )
        except (self.submitit.core.utils.FailedJobError, self.submitit.core.utils.FailedSubmissionError) as error:
            reason = "; ".join(line.strip() for line in str(error).splitlines() if line.strip())
            if re.search(_LIMIT_OF_JOBS, reason) and any(name not in self.over for name in self.numbers):
                if not self.waited:
                    print(f"waiting until more jobs can be submitted: {reason}", flush=True)
                self.waited = self.refused = True
                return
            raise ValueError(f"{reason} (the job of '{stage.name}', as `cluster` of the study describes it)") from error
        self.numbers[stage.name] = job.job_id
        self._show(stage, False)

    def _parameters(self, stage: Stage, nodes: int, processes: int, needed: Sequence[str]) -> dict[str, Any]:
        """The parameters of a job as submitit has them."""
        cluster = self.cluster
        gpus = cluster.gpus if stage.kind == "train" else min(cluster.gpus, int(stage.kind in ON_DEVICES))
        more = {"signal": f"USR1@{cluster.warning}", "requeue": True, "kill-on-invalid-dep": "yes"}
        given = {
            "name": self._job_name(stage),
            "timeout_min": math.ceil(cluster.hours * 60),
            "nodes": nodes,
            "tasks_per_node": processes,
            "gpus_per_node": gpus or None,
            "cpus_per_task": cluster.cpus,
            "mem_gb": cluster.memory,
            "slurm_partition": cluster.partition,
            "slurm_account": cluster.account,
            "slurm_qos": cluster.qos,
            "slurm_constraint": cluster.constraint,
            "slurm_dependency": "afterok:" + ":".join(needed) if needed else None,
            "slurm_additional_parameters": more,
            # Since 22.05 srun does not take over the processors of each task.
            "slurm_srun_args": ["--kill-on-bad-exit=1", *([f"--cpus-per-task={cluster.cpus}"] if cluster.cpus else [])],
            "slurm_stderr_to_stdout": True,
            "slurm_teardown": _TEARDOWN,
        }
        return {key: value for key, value in given.items() if value is not None}

    def _ended(self, stage: Stage, state: str) -> None:
        """Note how a stage has ended whose job is not in the queue any more, or in one of the states `_ENDED`."""
        name, record = stage.name, self.records.reload(stage)
        number = self.numbers[name]
        if record.state in (FINISHED, FAILED):
            self._over(stage, record.state)
        elif state in _NOT_ITS_FAULT or (state != "CANCELLED" and record.status == SAVED):
            del self.numbers[name]  # submitted again
        elif state == "CANCELLED" or record.status == CANCELLED:
            if record.started is None and any(self.over.get(need) != FINISHED for need in stage.needs):
                del self.numbers[name]  # SLURM has cancelled it, because one that it needs did not finish
            else:
                record.state = INTERRUPTED
                self._over(stage, INTERRUPTED)
        elif state in _LIMITS or time.monotonic() - self.gone.setdefault(name, time.monotonic()) > _PATIENCE:
            output = self.folder / f"{number}_0_log.out"
            how = f"job {number} ended {f'as {state}' if state else 'without a record'} ({output})"
            record.state, record.reason = FAILED, reason_of(output, how)
            self._over(stage, FAILED)

    def _over(self, stage: Stage, state: str) -> None:
        self.over[stage.name] = state
        self.records.save(stage)
        record = self.records.records[stage.name]
        took = f", {clock(record.seconds)}" if record.seconds is not None else ""
        took += f", {record.peak_memory_mib:,.0f} MiB" if record.peak_memory_mib is not None else ""
        reason = f": {record.reason}; its log: {self.records.log(stage)}" if record.reason else ""
        print(f"{state}: {stage.name}, job {record.job or self.numbers[stage.name]}{took}{reason}", flush=True)

    def _show(self, stage: Stage, is_running: bool) -> None:
        record = self.records.reload(stage)
        state = RUNNING if is_running and record.state == RUNNING else "queued"
        shown = (self.numbers[stage.name], state, record.started if state == RUNNING else None)
        if self.shown.get(stage.name) != shown:
            self.shown[stage.name] = shown
            before = f", after {clock(record.seconds)} in earlier attempts" if record.seconds is not None else ""
            print(f"{state}: {stage.name}, job {shown[0]}{before}", flush=True)

    def _job_name(self, stage: Stage) -> str:
        return f"{stage.label}.{_mark(self.records.plan.folder)}.{self.records.keys[stage.name]}"

    def _cancel_older(self) -> None:
        """Cancel the jobs of stages that the study has changed or removed since; they write to the same folders."""
        known = {self._job_name(stage) for stage in self.records.plan.stages}
        older = {name: job for name, job in jobs_of(self.records.plan.folder).items() if name not in known}
        for name, job in older.items():
            print(f"cancelled: job {job.number}, {name.rsplit('.', 2)[0]} of an earlier state of the study", flush=True)
        if older:
            subprocess.run(["scancel", *(job.number for job in older.values())], check=True)
        while any(name not in known for name in jobs_of(self.records.plan.folder)):
            time.sleep(1.0)


def _mark(folder: Path) -> str:
    """What the names of a study's jobs have in common."""
    return hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:8]


def jobs_of(folder: Path) -> dict[str, Job]:
    """The jobs of a study that are queued or running, by name."""
    mark = _mark(folder)
    return {name: job for name, job in queue().items() if job.is_alive and name.split(".")[-2:-1] == [mark]}


def check_no_jobs(folder: Path) -> None:
    """Raise ConfigurationError if jobs of a study are queued or running, before its stages run here as well."""
    if (folder / "stages/jobs").is_dir() and shutil.which("squeue") is not None:
        jobs = sorted((job.number for job in jobs_of(folder).values()), key=int)
        if jobs:
            raise ConfigurationError(
                f"{folder}: {len(jobs)} jobs of this study are in the queue: add --cluster to wait for them, or end "
                f"them: scancel {' '.join(jobs)}"
            )


def queue(patience: float = 300.0) -> dict[str, Job]:
    """This user's jobs by name, of several the newest that has not ended; those that ended recently are included.

    Raises ValueError where squeue fails for longer than `patience` seconds.
    """
    command = ["squeue", "--noheader", "--states=all", f"--user={os.getuid()}", "--format=%i %T %j"]
    until = time.monotonic() + patience
    while True:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0:
            break
        if time.monotonic() > until:
            raise ValueError(f"squeue fails: {done.stderr.strip()}")
        time.sleep(5.0)  # the controller is restarted or busy
    found: dict[str, Job] = {}
    for line in done.stdout.splitlines():
        number, state, name = line.split(maxsplit=2)
        job = Job(number, state)
        known = found.get(name)
        if number.isdigit() and (known is None or (job.is_alive, int(number)) > (known.is_alive, int(known.number))):
            found[name] = job
    return found
