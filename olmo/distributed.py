"""Processes and devices: this process, the others that a launcher started, and what they exchange."""

from __future__ import annotations

import ctypes
import os
import re
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from .console import log
from .exceptions import ConfigurationError

Result = TypeVar("Result")
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


@dataclass(frozen=True)
class Ranks:
    """This process among all; collectives are the identity where there is only one."""

    rank: int = 0
    world_size: int = 1
    host: dist.ProcessGroup | None = None  # gloo group for CPU integers; None: the default group
    saving: dist.ProcessGroup | None = None  # gloo group of the saving thread; None: there is one process

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """The element-wise sum over all ranks, float64, on every rank."""
        if self.world_size == 1:
            return values
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        return self.sum_tensor(torch.tensor(values, dtype=torch.float64, device=device)).cpu().numpy()

    def sum_tensor(self, value: Tensor) -> Tensor:
        """The sum over all ranks, in place, without waiting for the device."""
        if self.world_size > 1:
            dist.all_reduce(value)
        return value

    def largest(self, value: int, group: dist.ProcessGroup | None = None) -> int:
        """The largest of the values of all ranks, on every rank; waits for the other processes, not for a device.

        group: `saving` in the thread that saves; `host` by default.
        """
        if self.world_size == 1:
            return value
        highest = torch.tensor(value, dtype=torch.int64)
        dist.all_reduce(highest, dist.ReduceOp.MAX, group or self.host)
        return int(highest)

    def broadcast_int(self, value: int) -> int:
        """The value of the first rank, at least 0, on every rank."""
        return self.largest(value if self.is_first else 0)

    def run_on_first(self, work: Callable[[], Result], *, saving: bool = False) -> Result | None:
        """What `work` returns on the first rank, None on the others, which wait for it. A collective.

        If it raises, the others raise ConfigurationError (OSError with `saving`, for the thread that saves): the first
        rank reports the error, and all end.
        """
        result, failure = None, None
        if self.is_first:
            try:
                result = work()
            except Exception as error:  # of any type, as the others wait
                failure = error
        failed = self.largest(failure is not None, self.saving if saving else None)
        if failure is not None:
            raise failure
        if failed:
            if saving:
                raise OSError("the first process could not write")
            raise ConfigurationError("the first process could not begin; its last lines give the reason")
        return result

    def share_from_first(self, work: Callable[[], Result], heartbeat: float) -> Result:
        """What `work` returns on the first rank, on every rank; errors as in `run_on_first`. A collective.

        The others never wait for longer than `heartbeat` seconds at a time, however long the work takes.
        """
        if self.is_first:
            with ThreadPoolExecutor(1) as pool:
                future = pool.submit(work)
                while wait([future], heartbeat).not_done:
                    self.broadcast_int(False)
            self.broadcast_int(True)
            work = future.result
        else:
            while not self.broadcast_int(False):
                pass
        shared: list[Any] = [self.run_on_first(work)]
        if self.world_size > 1:
            dist.broadcast_object_list(shared, src=0, group=self.host)
        return shared[0]

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()


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
    """Tell glibc to keep freed blocks of any size instead of returning them to the system (CPU training).

    Without it every activation is mapped and zeroed anew in every step (method section 6).
    """
    if sys.platform.startswith("linux"):
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:  # musl has none
            mallopt(-3, 2**31 - 1)  # M_MMAP_THRESHOLD
            mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def pick_device(name: str | None = None) -> torch.device:
    """The device by name, or else this process's CUDA device, or Apple's GPU (mps) for a process alone, or the CPU.

    From here on CUDA multiplies float32 as float32. That is torch's default, on which OLMo's trainer relies; but some
    containers turn TF32 on (TORCH_ALLOW_TF32_CUBLAS_OVERRIDE). Sums inside bfloat16 products stay as torch has them.
    """
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    default = "mps" if alone and torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name if name is not None else "cuda" if torch.cuda.is_available() else default)
    except RuntimeError as error:
        raise ConfigurationError(f"no such device: {name}; use cpu, cuda, cuda:1 or mps") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError(f"{name}: torch sees no CUDA device here")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigurationError(f"{name}: torch sees no GPU of Apple's here")
    if device.type == "mps" and not alone:
        raise ConfigurationError(f"{name}: one process only; start one, or add --device=cpu")
    if device.type == "cuda":
        torch.set_float32_matmul_precision("highest")
        if device.index is None:
            one_visible = torch.cuda.device_count() == 1  # srun --gpus-per-task=1 shows each process its own as 0
            return torch.device("cuda", 0 if one_visible else int(os.environ.get("LOCAL_RANK", "0")))
    return device


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on the device; CUDA copies it while this process continues."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return (tensor if tensor.is_pinned() else tensor.pin_memory()).to(device, non_blocking=True)


def full_tensor(tensor: Tensor) -> Tensor:
    """A DTensor that FSDP has sharded, gathered on every process (a collective); any other tensor as it is."""
    gather = getattr(tensor, "full_tensor", None)  # by name: importing DTensor takes longer than reading a checkpoint
    return tensor if gather is None else gather()


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's shard of a tensor that every process holds in full, sharded as `like` is; all of it where `like`
    is not sharded."""
    if not hasattr(like, "full_tensor"):
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, DTensor) or isinstance(tensor, DTensor):
        return tensor
    tensor = tensor.to(like.to_local().device)
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def current_ranks() -> Ranks:
    """This process among those of a group that another program has formed; alone without one."""
    if not (dist.is_available() and dist.is_initialized()):
        return Ranks()
    return Ranks(dist.get_rank(), dist.get_world_size())


@contextmanager
def process_group(device: torch.device, timeout: float = 1800.0) -> Iterator[Ranks]:
    """Join the other processes (nccl on GPUs, gloo on CPUs), or be alone; leaves the group at the end.

    `timeout`: seconds after which a process that waits for the others gives up. Raises RuntimeError where another
    process has ended or hangs.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world_size == 1:
        yield Ranks()
        return
    limit = timedelta(seconds=timeout)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=limit)
    host = dist.new_group(backend="gloo", timeout=limit) if device.type == "cuda" else None
    saving = dist.new_group(backend="gloo", timeout=limit)
    try:
        yield Ranks(dist.get_rank(), world_size, host, saving)
    except RuntimeError as error:
        # The group is not destroyed: that needs the other processes.
        if is_collective_error(error):
            raise RuntimeError(
                f"{_describe_collective_error(str(error), timeout)}; its own last lines may give the reason; "
                "--try_load_latest_save continues from the newest checkpoint"
            ) from error
        raise
    dist.destroy_process_group()


def is_collective_error(error: BaseException) -> bool:
    """Whether an error is about the other processes: one has ended, or hangs; also one of those
    that torch gathers from several (`failures`)."""
    gathered = [failure for failure, _ in (getattr(error, "failures", None) or {}).values()]
    collective = isinstance(error, RuntimeError) and re.search("gloo|nccl", str(error), re.IGNORECASE)
    return isinstance(error, dist.DistError) or bool(collective) or any(map(is_collective_error, gathered))


def _describe_collective_error(message: str, timeout: float) -> str:
    """What a failed collective means for the other processes, in few words."""
    if re.search(r"timed? ?out", message, re.IGNORECASE):
        return f"another process did not answer for {timeout:g} seconds (collective_timeout)"
    if re.search(r"connection (closed|reset)|broken pipe|connection refused", message, re.IGNORECASE):
        return "another process has ended"
    return f"another process failed ({message.splitlines()[0]})"


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
