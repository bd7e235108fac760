"""What a job of SLURM runs of a study: a stage's command, to which it passes the job's signals, and the stage's record.

The job asks for SIGUSR1 before its time limit. A training run then saves and ends with status 75, and the job's script
queues the job again (scripts/studies/slurm.py). SIGTERM comes from scancel, and before a preemption after which SLURM
itself queues the job again.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

from scripts.studies.plan import Stage
from scripts.studies.records import FAILED, INTERRUPTED, RUNNING, end_record, read_record, write_record

CANCELLED = 128 + signal.SIGTERM  # exit status of a stage that SLURM or a user has ended


def run_in_job(stage: Stage, file: Path, log: Path) -> None:
    """Run a stage's command as one task of a job; ends the process with its status, unless it is 0.

    file: the stage's record, which the first task keeps, and any task that fails. log: that of the first task; others
    have their number in its name.
    """
    task, began = int(os.environ.get("SLURM_PROCID", "0")), time.monotonic()
    received: list[int] = []
    process: subprocess.Popen[bytes] | None = None

    def forward(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if process is not None:
            process.send_signal(number)

    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, forward)
    record = read_record(file)
    record.job, record.state, record.started = os.environ.get("SLURM_JOB_ID"), RUNNING, time.time()
    record.status = record.reason = None
    if task == 0:
        write_record(file, record)
    else:
        log = log.with_name(f"{log.stem}.task{task}.log")
    environment = {"OMP_NUM_THREADS": os.environ.get("SLURM_CPUS_PER_TASK", "1"), **os.environ}
    with log.open("ab") as out:
        out.write(f"$ {shlex.join(record.command)}\n".encode())
        out.flush()
        process = subprocess.Popen(
            [sys.executable, "-m", *stage.command],
            env={**environment, "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
        )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    end_record(record, stage.outputs, log, process.returncode, time.monotonic() - began, usage.ru_maxrss)
    if record.state in (FAILED, INTERRUPTED) and received[:1] == [signal.SIGTERM]:
        record.state, record.status, record.reason = INTERRUPTED, CANCELLED, None
    elif record.state == FAILED and received:
        record.reason = "it had not saved when its job was near the time limit: raise cluster.hours or cluster.warning"
    # Where a task has failed, SLURM ends the others.
    if read_record(file).state != FAILED and (task == 0 or record.state == FAILED):
        write_record(file, record)
    status = record.status or int(record.state == FAILED)
    if status:
        sys.exit(status if status > 0 else 128 - status)
