"""This process among those that torchrun, srun or mpirun started, from its variables alone: without torch."""

from __future__ import annotations

import ctypes
import os
import re
import sys
import threading
import zlib
from typing import NoReturn

from ..console import log
from ..exceptions import ConfigurationError

ABANDONABLE = "reads ahead"  # prefix of the names of threads that a process may leave running at its exit

# The variables by which a launcher describes a process: rank, number of processes, both of this machine, and the job.
# Where several are set, the first launcher has started this process: mpirun uses srun on other machines.
_LAUNCHERS = {
    "mpirun": (
        *("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
        *("OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE", "PMIX_NAMESPACE"),
    ),
    "mpiexec": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS", ""),  # MPICH, Intel MPI
    "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE", "SLURM_JOB_ID"),
}


def adopt_launcher() -> None:
    """Set torchrun's variables (RANK, WORLD_SIZE, ..., MASTER_PORT) in a process that srun or mpirun started.

    To be called first in every command that joins processes. Nothing changes under torchrun, whose variables come
    first even inside srun, and in a process alone. In a SLURM job of several tasks, a process that srun did not start
    warns that it is alone. Raises ConfigurationError where what the launcher set is not enough.
    """
    given = os.environ
    if "RANK" in given and "WORLD_SIZE" in given:
        return
    for launcher, (*names, job) in _LAUNCHERS.items():
        # SLURM writes the numbers of tasks of all machines: 4(x2),3
        found = {name: number[0] for name in names if (number := re.match(r"\d+", given.get(name, "")))}
        rank, size, _, local_size = map(found.get, names)
        if rank is None or size is None:
            continue
        if int(size) == 1:
            return
        missing = [name for name in names if name not in found]
        if missing and launcher == "mpiexec" and given.get("SLURM_STEP_NUM_TASKS") == size:
            continue  # srun --mpi=pmi2 sets PMI_RANK and PMI_SIZE
        first = "127.0.0.1"
        if not missing and local_size != size:
            first = given.get("SLURM_STEP_NODELIST", "") if launcher == "srun" else ""
            missing = [] if first or "MASTER_ADDR" in given else ["MASTER_ADDR (the host of the first process)"]
        if missing:
            raise ConfigurationError(
                f"{launcher} started {size} processes, but {' and '.join(missing)} is not set; "
                "set it, or start the processes with torchrun"
            )
        port = 15000 + zlib.crc32(f"{given.get(job)}.{given.get('SLURM_STEP_ID')}".encode()) % 15000
        given.setdefault("MASTER_ADDR", _first_host(first))
        given.setdefault("MASTER_PORT", str(port))
        given.update(RANK=rank, WORLD_SIZE=size, LOCAL_RANK=found[names[2]], LOCAL_WORLD_SIZE=found[names[3]])
        return
    if (tasks := given.get("SLURM_NTASKS", "1")) != "1":
        log.warning(  # no error: with --ntasks, many ask for the processors of one process
            "SLURM gave this job %s tasks (SLURM_NTASKS), but srun did not start this process: it runs alone; for one "
            "process per task, write srun before python",
            tasks,
        )


def _first_host(nodes: str) -> str:
    """The first host of a list as SLURM writes it: rack1-node[007,009-012],login -> rack1-node007."""
    first = re.match(r"(?:\[[^]]*\]|[^,\[])*", nodes)
    return re.sub(r"\[(\w+)[^]]*\]", r"\1", first[0] if first else nodes)


def disable_malloc_trim() -> None:
    """Set glibc to keep freed blocks of any size instead of returning them to the system (CPU training).

    Without it every activation is mapped and zeroed anew in every step (method section 6).
    """
    if sys.platform.startswith("linux"):
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:  # musl has none
            mallopt(-3, 2**31 - 1)  # M_MMAP_THRESHOLD
            mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def exit_process(status: int) -> NoReturn:
    """End the process with this status.

    One of several processes ends without the interpreter's shutdown. DDP keeps the process group for good (seen in
    torch 2.13), and a gloo thread that frees a tensor during the shutdown aborts the process: one finished run
    in fourteen. So does one in which a thread is still reading, and would be inside torch during shutdown.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 or any(t.name.startswith(ABANDONABLE) for t in threading.enumerate()):
        for stream in filter(None, (sys.stdout, sys.stderr)):  # None if closed
            stream.flush()
        os._exit(status)
    sys.exit(status)
