"""The processes of a run, and what they exchange."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from ..exceptions import ConfigurationError

Result = TypeVar("Result")


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
