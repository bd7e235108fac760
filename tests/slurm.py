"""A real SLURM of one node on this machine, for the tests marked `slurm`: its daemons in a temporary folder.

Nothing of the machine's own configuration is read or written, and it runs as whoever runs the tests. It has no
accounting, as many small clusters: `sacct` fails there.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.running import ROOT

# Our python3 first, as in an active environment; the daemons of Debian are in sbin.
PATH = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel")
MISSING = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
INSTALL = f"{' and '.join(MISSING)} not installed; on Debian: apt-get install slurm-wlm munge"
FINAL = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "NODE_FAIL")
# A job that is queued again waits for the lifetime of a credential, two minutes by default.
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=0
KillWait=5
MinJobAge=300
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs={processors} State=UNKNOWN
PartitionName=tests Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


@dataclass
class Slurm:
    """A running cluster: the environment in which its commands work, and its folder."""

    folder: Path
    environment: dict[str, str]

    def call(self, *command: str, cwd: Path | None = None, status: int = 0) -> str:
        """What a command prints; an AssertionError where it ends with another status."""
        done = subprocess.run(command, cwd=cwd, env=self.environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == status, f"{command}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def sbatch(self, *arguments: str, cwd: Path) -> str:
        """The id of a job."""
        found = re.search(r"\d+", self.call("sbatch", *arguments, cwd=cwd))
        assert found
        return found[0]

    def job(self, number: str) -> dict[str, str]:
        """What scontrol shows of a job, such as JobState, Reason, Restarts and ExitCode."""
        shown = self.call("scontrol", "--oneliner", "show", "job", number)
        return dict(re.findall(r"(\S+?)=(\S*)", shown))

    def states(self) -> dict[str, str]:
        """Id -> state of every job, recently ended ones included."""
        lines = self.call("squeue", "--noheader", "--states=all", "--format=%i %T").split("\n")
        return dict(line.split() for line in lines if line)

    def wait(self, condition: Callable[[], object], seconds: float = 120.0) -> None:
        """Until a condition holds."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"{self.states()}\n{self.call('scontrol', 'show', 'jobs')}"
            time.sleep(0.2)

    def ended(self, number: str, seconds: float = 180.0) -> dict[str, str]:
        """A job once it has ended for good."""
        self.wait(lambda: self.job(number)["JobState"] in FINAL, seconds)
        return self.job(number)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@contextmanager
def running(folder: Path) -> Iterator[Slurm]:
    """A cluster of this machine; its jobs and daemons have ended after the context."""
    for name in ("munge", "state", "spool"):
        (folder / name).mkdir(mode=0o700, parents=True)
    (folder / "munge/key").write_bytes(os.urandom(128))
    (folder / "munge/key").chmod(0o400)
    host = socket.gethostname().partition(".")[0]
    user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
    configuration = folder / "slurm.conf"
    values = {"folder": folder, "host": host, "user": user, "processors": os.cpu_count(), "ports": _free_ports(2)}
    configuration.write_text(CONFIGURATION.format(**values), encoding="utf-8")
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))}
    environment = {**inherited, "PATH": PATH, "SLURM_CONF": str(configuration), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(ROOT)
    munge = ["munged", "--foreground", "--force", f"--socket={folder}/munge/socket", f"--key-file={folder}/munge/key"]
    munge += [f"--{name}-file={folder}/munge/{name}" for name in ("pid", "seed", "log")]
    daemons = []
    try:
        for command in (munge, ["slurmctld", "-D"], ["slurmd", "-D", "-N", host]):
            with (folder / f"{command[0]}.out").open("wb") as out:
                daemons.append(subprocess.Popen(command, env=environment, stdout=out, stderr=out))
            if command is munge:
                _until(lambda: (folder / "munge/socket").exists(), daemons, folder)
        slurm = Slurm(folder, environment)
        _until(lambda: _idle(environment), daemons, folder)
        yield slurm
    finally:
        if len(daemons) == 3:
            subprocess.run(["scancel", f"--user={user}"], env=environment, timeout=60)
            deadline = time.monotonic() + 30
            while time.monotonic() < deadline and _output(["squeue", "--noheader"], environment):
                time.sleep(0.2)
        for daemon in reversed(daemons):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(30)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def _output(command: list[str], environment: dict[str, str]) -> str:
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60).stdout.strip()


def _idle(environment: dict[str, str]) -> bool:
    return _output(["sinfo", "--noheader", "--format=%T"], environment) == "idle"


def _until(condition: Callable[[], bool], daemons: list[subprocess.Popen[bytes]], folder: Path) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        ended = [daemon.args for daemon in daemons if daemon.poll() is not None]
        if ended or time.monotonic() > deadline:
            logs = "\n".join(path.read_text(errors="replace")[-2000:] for path in sorted(folder.glob("*.out")))
            raise AssertionError(f"SLURM did not start; ended: {ended}\n{logs}")
        time.sleep(0.1)


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """The cluster of the session; the test is skipped where SLURM is not installed."""
    if MISSING:
        pytest.skip(INSTALL)
    with running(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster
