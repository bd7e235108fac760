"""Run the stages of a plan on this machine: those that do not depend on each other side by side."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from olmo.console import Progress, clock
from olmo.exceptions import Interrupted, Terminated
from scripts.studies.plan import Stage
from scripts.studies.records import FAILED, FINISHED, INTERRUPTED, Records, end_record
from scripts.studies.schema import Resources

ON_DEVICES = ("train", "entropy", "score")  # kinds of stages that use a GPU
_PATIENCE = 30.0  # seconds that an interrupted stage has to end its work


@dataclass
class _Running:
    stage: Stage
    process: subprocess.Popen[bytes]
    began: float
    gpus: tuple[str, ...]


class Local:
    """Runs stages, `jobs` at a time; the cores are shared out among them, and the GPUs if there are any.

    jobs: default: one a core, or with GPUs one for each group of `resources.gpus`.
    """

    def __init__(self, records: Records, resources: Resources, jobs: int | None = None):
        self.records = records
        self.gpus = list(gpus_here())  # that no stage uses
        self.has_gpus = bool(self.gpus)
        for name in ("jobs", "processes", "gpus"):
            if (value := getattr(resources, name)) is not None and value < (name != "gpus"):
                raise ValueError(f"resources.{name}: {value} is below {int(name != 'gpus')}")
        self.gpus_a_stage = min(1, len(self.gpus)) if resources.gpus is None else resources.gpus
        if self.gpus_a_stage > len(self.gpus):
            raise ValueError(f"resources.gpus: {self.gpus_a_stage} GPUs a stage, and this machine has {len(self.gpus)}")
        self.processes = resources.processes or max(self.gpus_a_stage, 1)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        at_once = len(self.gpus) // self.gpus_a_stage if self.gpus_a_stage else max(1, cores // self.processes)
        self.jobs = jobs or resources.jobs or at_once
        self.threads = max(1, cores // (self.jobs * self.processes))
        self.running: list[_Running] = []

    def run(self, stages: Sequence[Stage]) -> bool:
        """Run stages, each once those that it needs have finished; returns whether all have.

        Where one fails, those that do not need it go on. Raises Interrupted where one was interrupted and saved.
        """
        waiting = [stage for stage in stages if not self.records.is_finished(stage)]
        done = {stage.name for stage in stages if self.records.is_finished(stage)}
        total, failed, saved = len(waiting), 0, False
        print(f"{total} stages to run, {self.jobs} at a time, {self.threads} threads a process", flush=True)
        with Progress("study", total, "stages", show=total > 1) as progress:
            try:
                while waiting or self.running:
                    ready = [stage for stage in waiting if done.issuperset(stage.needs)]
                    for stage in () if saved else ready:
                        if len(self.running) < self.jobs and len(self.gpus) >= self._gpus_of(stage):
                            waiting.remove(stage)
                            self._begin(stage)
                    if not self.running:
                        break
                    for ended in self._wait():
                        record = self.records.records[ended.stage.name]
                        progress.advance()
                        if record.state == FINISHED:
                            done.add(ended.stage.name)
                        saved |= record.state == INTERRUPTED
                        failed += record.state == FAILED
            except KeyboardInterrupt as interrupt:
                self._end(interrupt)
                raise
        if saved:
            raise Interrupted("a stage was interrupted and has saved; the same command continues the study")
        for stage in waiting:
            lacking = next(name for name in stage.needs if name not in done)
            print(f"not run: {stage.name}: it needs '{lacking}'", flush=True)
        return not failed and not waiting

    def run_alone(self, stage: Stage) -> bool:
        """Run one stage, whether it has finished before or not."""
        self._begin(stage)
        self._wait()
        return self.records.is_finished(stage)

    def _gpus_of(self, stage: Stage) -> int:
        return self.gpus_a_stage if stage.kind in ON_DEVICES else 0

    def _begin(self, stage: Stage) -> None:
        gpus = tuple(self.gpus[: self._gpus_of(stage)])
        self.gpus = self.gpus[len(gpus) :]
        command = launched(stage, self.processes)
        began = time.monotonic()
        self.records.begin(stage, command, time.time())
        environment = {"OMP_NUM_THREADS": str(self.threads), **os.environ, "PYTHONUNBUFFERED": "1"}
        if self.has_gpus:  # without any, those of a stage that is to use the CPU must not be found either
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        with self.records.log(stage).open("ab") as log:
            log.write(f"$ {shlex.join(command)}\n".encode())
            log.flush()
            process = subprocess.Popen(
                [sys.executable, *command[1:]], env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        self.running.append(_Running(stage, process, began, gpus))

    def _wait(self) -> list[_Running]:
        """The stages that have ended, at least one; recorded and printed."""
        while True:
            ended = []
            for running in self.running:
                pid, status, usage = os.wait4(running.process.pid, os.WNOHANG)
                if pid:
                    running.process.returncode = os.waitstatus_to_exitcode(status)
                    self._record(running, usage.ru_maxrss)
                    ended.append(running)
            if ended:
                self.running = [running for running in self.running if running not in ended]
                return ended
            time.sleep(0.05)

    def _record(self, running: _Running, peak_memory: int) -> None:
        stage, took = running.stage, time.monotonic() - running.began
        record = self.records.records[stage.name]
        end_record(record, stage.outputs, self.records.log(stage), running.process.returncode, took, peak_memory)
        self.records.save(stage)
        self.gpus += running.gpus
        reason = f": {record.reason}; its log: {self.records.log(stage)}" if record.reason else ""
        print(f"{record.state}: {stage.name}, {clock(took)}, {record.peak_memory_mib:,.0f} MiB{reason}", flush=True)

    def _end(self, interrupt: KeyboardInterrupt) -> None:
        """End the running stages, which may be writing a file; a second interrupt does not wait."""
        for running in self.running:
            if isinstance(interrupt, Terminated):  # control-C has reached them as well
                running.process.send_signal(interrupt.args[0])
        until = time.monotonic() + _PATIENCE
        try:
            for running in self.running:
                running.process.wait(timeout=max(0.0, until - time.monotonic()))
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            for running in self.running:
                running.process.kill()
                running.process.wait()
        for running in self.running:
            record = self.records.records[running.stage.name]
            record.state, record.status = INTERRUPTED, running.process.returncode
            record.seconds = (record.seconds or 0.0) + time.monotonic() - running.began
            with suppress(OSError):  # what ended the study may be a full disk
                self.records.save(running.stage)


def launched(stage: Stage, processes: int) -> list[str]:
    """The command of a stage, under torchrun where it is a training run of several processes."""
    launcher: list[str] = []
    if stage.kind == "train" and processes > 1:
        launcher = ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m"]
    return ["python", "-m", *launcher, *stage.command]


def gpus_here(environment: Mapping[str, str] = os.environ) -> Sequence[str]:
    """The numbers of the GPUs that this process may use."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [number for number in visible.split(",") if number.strip()]
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True)
    return [str(number) for number in range(len(listed.stdout.splitlines()))] if listed.returncode == 0 else []
