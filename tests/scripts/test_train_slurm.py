"""scripts/train.slurm with stand-ins for SLURM's commands and for Python, which tell what they were asked."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.running import ROOT

STAND_INS = {
    "scontrol": 'echo "scontrol $*" >>"$LOG"\n',
    "scancel": 'echo "scancel $*" >>"$LOG"\nkill -USR1 $(cat "$LOG".*.pid)\n',
    # Two processes; as of srun its status is the highest of theirs.
    "srun": """
echo "srun $1 with $SRUN_CPUS_PER_TASK processors a task" >>"$LOG"
shift
SLURM_PROCID=0 SLURM_LOCALID=0 "$@" & first=$!
SLURM_PROCID=5 SLURM_LOCALID=1 "$@" & second=$!
status=0
wait $first || status=$?
wait $second || status=$?
exit $status
""",
    "python3": """
trap 'exit 75' USR1
echo "python $* of rank $SLURM_PROCID, $SLURM_LOCALID here" >>"$LOG"
echo $$ >"$LOG.$SLURM_PROCID.pid"
[ "$ENDS_WITH" = waits ] || exit "$ENDS_WITH"
while true; do sleep 0.01; done
""",
}


@pytest.fixture
def job(tmp_path: Path) -> dict[str, str]:
    """The environment of a job; LOG names the file that the stand-ins write to."""
    for name, text in STAND_INS.items():
        (tmp_path / name).write_text("#!/usr/bin/env bash\n" + text)
        (tmp_path / name).chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "LOG": str(tmp_path / "log"),
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_ID": "123456",
        "SLURM_CPUS_PER_TASK": "8",
    }


def start(job: dict[str, str], ends_with: str, *arguments: str) -> subprocess.Popen[str]:
    command = ["bash", str(ROOT / "scripts/train.slurm"), *arguments]
    return subprocess.Popen(command, env={**job, "ENDS_WITH": ends_with}, stderr=subprocess.PIPE, text=True)


def told(job: dict[str, str]) -> list[str]:
    return Path(job["LOG"]).read_text().splitlines()


@pytest.mark.parametrize("status", [0, 1, 75])  # 75 without a warning: time_limit, or scancel
def test_a_job_that_ends_by_itself_does_not_queue_again(job: dict[str, str], status: int) -> None:
    process = start(job, str(status), "a.yaml", "--run_name=two words")
    assert process.wait(20) == status
    assert sorted(told(job)) == sorted(
        [
            "srun --kill-on-bad-exit=1 with 8 processors a task",
            "python -m scripts.train a.yaml --run_name=two words --try_load_latest_save of rank 0, 0 here",
            "python -m scripts.train a.yaml --run_name=two words --try_load_latest_save of rank 5, 1 here",
        ]
    )


def test_a_job_that_is_warned_saves_and_queues_again(job: dict[str, str], tmp_path: Path) -> None:
    process = start(job, "waits", "a.yaml")
    deadline = time.monotonic() + 20
    while len([path for path in tmp_path.glob("log.*.pid") if path.read_text()]) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGUSR1)
    assert process.wait(20) == 0
    assert told(job)[-2:] == ["scancel --signal=USR1 123456", "scontrol requeue 123456"]


def test_a_job_without_configuration_says_how(job: dict[str, str]) -> None:
    process = start(job, "0")
    assert process.wait(20) == 2 and process.stderr is not None
    assert process.stderr.read().startswith("usage: sbatch [--nodes=N] scripts/train.slurm CONFIG")
    assert not Path(job["LOG"]).exists()


def test_the_header_asks_for_the_warning_and_to_be_queued_again() -> None:
    lines = (ROOT / "scripts/train.slurm").read_text().splitlines()
    header = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")]
    assert lines[1] == f"#SBATCH {header[0]}"  # SLURM reads no further than the first command
    assert {"--requeue", "--signal=B:USR1@300", "--ntasks-per-node=4", "--gpus-per-node=4"} <= set(header)
