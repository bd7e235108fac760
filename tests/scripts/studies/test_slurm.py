"""How the stages of a study become jobs and what becomes of them: with a queue that a test writes, without SLURM.

test_study_on_slurm.py runs a study on a real one.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from olmo.exceptions import ConfigurationError, Interrupted, MissingPackage, exit_status
from scripts import study as command
from scripts.studies import slurm
from scripts.studies.plan import Plan, Stage
from scripts.studies.records import Records, read_record, write_record
from scripts.studies.schema import Cluster, Study
from scripts.studies.slurm import Job, Slurm, check_no_jobs, queue


class World:
    """Stages a <- b, and c; `ends` maps a stage to what each of its jobs does."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch):
        self.plan = Plan(Study("x"), folder / "out", [], [], [], 0)
        self.plan.stages = [
            Stage("a", "train", ("work",), ()),
            Stage("b", "entropy", ("work",), (), ("a",)),
            Stage("c", "edit", ("work",), ()),
        ]
        self.ends: dict[str, list[str]] = {"a": ["finished"], "b": ["finished"], "c": ["finished"]}
        self.jobs: dict[str, Job] = {}
        self.parameters: dict[str, dict[str, Any]] = {}  # of each job, by its id
        self.submitted: list[str] = []
        self.most = 9  # jobs in the queue
        self.looks = 0
        module = ModuleType("submitit")
        module.AutoExecutor = lambda folder, cluster: self  # type: ignore[attr-defined]
        module.helpers = SimpleNamespace(clean_env=nullcontext)  # type: ignore[attr-defined]
        errors = ModuleType("submitit.core.utils")
        errors.FailedJobError = errors.FailedSubmissionError = RuntimeError  # type: ignore[attr-defined]
        module.core = ModuleType("submitit.core")  # type: ignore[attr-defined]
        module.core.utils = errors  # type: ignore[attr-defined]
        for name, found in (("", module), (".core", module.core), (".core.utils", errors)):  # type: ignore[attr-defined]
            patch.setitem(sys.modules, f"submitit{name}", found)
        patch.setattr(slurm.shutil, "which", lambda name: f"/usr/bin/{name}")
        patch.setattr(slurm.time, "sleep", lambda seconds: None)
        patch.setattr(slurm, "_PATIENCE", -1.0)
        patch.setattr(slurm, "queue", self.queue)

    def update_parameters(self, **parameters: Any) -> None:
        self.parameters[str(len(self.submitted) + 1)] = parameters

    def submit(self, function: Callable[..., None], stage: Stage, file: Path, log: Path) -> SimpleNamespace:
        if sum(job.is_alive for job in self.jobs.values()) >= self.most:
            raise RuntimeError("sbatch: error: AssocMaxSubmitJobLimit\nsbatch: error: Batch job submission failed")
        self.submitted.append(stage.name)
        number = str(len(self.submitted))
        self.jobs[self.parameters[number]["name"]] = Job(number, "PENDING")
        return SimpleNamespace(job_id=number)

    def queue(self) -> dict[str, Job]:
        """The jobs; the first that waits for no other ends."""
        self.looks += 1
        assert self.looks < 100
        before = dict(self.jobs)
        for name, job in self.jobs.items():
            stage = next(stage for stage in self.plan.stages if stage.name == name.partition(".")[0])
            alive = {n.partition(".")[0] for n, j in self.jobs.items() if j.is_alive}
            if job.is_alive and not alive & set(stage.needs):
                self.end(name, stage, self.ends[stage.name].pop(0))
                break
        return before

    def end(self, name: str, stage: Stage, how: str) -> None:
        file = self.plan.folder / f"stages/{stage.name}.json"
        record, number = read_record(file), self.jobs[name].number
        record.started = None if how == "never" else 1.0
        record.job = None if how == "never" else number
        if how in ("finished", "failed"):
            record.state, record.reason = how, "it went wrong" if how == "failed" else None
        record.status = {"saved": 75, "CANCELLED": 143}.get(how)
        write_record(file, record)
        state = {"finished": "COMPLETED", "failed": "FAILED", "saved": "FAILED", "never": "CANCELLED"}.get(how, how)
        self.jobs[name] = Job(number, state)
        if how == "failed":  # as --kill-on-invalid-dep
            for other, job in self.jobs.items():
                if job.is_alive and other.startswith("b."):
                    self.end(other, self.plan.stages[1], "never")

    def run(self, cluster: Cluster | None = None) -> bool:
        self.records = Records(self.plan)
        return Slurm(self.records, cluster or Cluster()).run(self.plan.stages)

    def states(self) -> list[str]:
        return [self.records.records[stage.name].state for stage in self.plan.stages]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    return World(tmp_path, monkeypatch)


def test_jobs_depend_on_those_that_they_need_and_nothing_is_submitted_twice(world: World, capsys) -> None:
    cluster = Cluster("gpu", "lab", hours=1.5, warning=60, nodes=2, gpus=4, cpus=8, memory=100.5, qos="low")
    assert world.run(cluster)
    assert world.submitted == ["a", "b", "c"] and world.states() == ["finished"] * 3
    a, b, c = (world.parameters[number] for number in "123")
    assert (a["nodes"], a["tasks_per_node"], a["gpus_per_node"], a["cpus_per_task"], a["mem_gb"]) == (2, 4, 4, 8, 100.5)
    assert (a["slurm_partition"], a["slurm_account"], a["slurm_qos"], a["timeout_min"]) == ("gpu", "lab", "low", 90)
    assert a["slurm_additional_parameters"]["signal"] == "USR1@60" and "slurm_dependency" not in a
    assert a["slurm_srun_args"] == ["--kill-on-bad-exit=1", "--cpus-per-task=8"]
    assert (b["nodes"], b["tasks_per_node"], b["gpus_per_node"], b["slurm_dependency"]) == (1, 1, 1, "afterok:1")
    assert "gpus_per_node" not in c and "slurm_dependency" not in c
    assert world.records.records["a"].command == ["srun", "--ntasks=8", "python", "-m", "work"]
    assert "3 stages to run as jobs of SLURM; training on 2 nodes of 4 processes and 4 GPUs" in capsys.readouterr().out
    assert world.run() and world.submitted == ["a", "b", "c"]


def test_control_c_leaves_the_jobs_and_a_later_command_waits_for_them(world: World, monkeypatch, capsys) -> None:
    def interrupt() -> dict[str, Job]:
        if world.submitted:
            raise KeyboardInterrupt
        return {}

    monkeypatch.setattr(slurm, "queue", interrupt)
    with pytest.raises(KeyboardInterrupt):
        world.run()
    assert world.submitted == ["a", "b", "c"]
    assert "the jobs continue; the same command waits for them again" in capsys.readouterr().out
    monkeypatch.setattr(slurm, "queue", world.queue)
    assert world.run() and world.submitted == ["a", "b", "c"] and world.states() == ["finished"] * 3


def test_a_limit_of_submitted_jobs_delays_the_others(world: World, capsys) -> None:
    world.most = 1
    assert world.run() and world.submitted == ["a", "b", "c"] and world.states() == ["finished"] * 3
    assert capsys.readouterr().out.count("sbatch: error: AssocMaxSubmitJobLimit") == 1


def test_a_job_that_sbatch_refuses_ends_the_command(world: World) -> None:
    world.most = 0
    with pytest.raises(
        ValueError, match=r"AssocMaxSubmitJobLimit.*the job of 'a', as `cluster` of the study describes"
    ):
        world.run()


@pytest.mark.parametrize("how", ["saved", "PREEMPTED", "NODE_FAIL"])
def test_a_stage_that_has_saved_or_lost_its_node_is_submitted_again(world: World, how: str) -> None:
    world.ends["a"] = [how, "finished"]
    assert world.run() and world.submitted.count("a") == 2 and world.states() == ["finished"] * 3


def test_where_a_stage_fails_the_others_go_on(world: World, capsys) -> None:
    world.ends["a"], world.ends["b"] = ["failed"], []
    assert not world.run()
    assert world.states() == ["failed", "waiting", "finished"] and world.submitted == ["a", "b", "c"]
    out = capsys.readouterr().out
    assert f"failed: a, job 1: it went wrong; its log: {world.plan.folder}/stages/a.log" in out
    assert "not run: b: it needs 'a'" in out


@pytest.mark.parametrize("how", ["TIMEOUT", "OUT_OF_MEMORY", "FAILED"])
def test_a_job_that_ends_without_a_record_has_failed(world: World, how: str) -> None:
    world.ends["a"], world.ends["b"] = [how], ["never"]
    assert not world.run()
    output = world.plan.folder / "stages/jobs/1_0_log.out"
    assert world.states()[0] == "failed"
    assert world.records.records["a"].reason == f"job 1 ended as {how} ({output})"


def test_a_job_that_is_cancelled_interrupts_the_study(world: World) -> None:
    world.ends["a"], world.ends["b"] = ["CANCELLED"], ["never"]
    with pytest.raises(Interrupted, match="the same command submits its stage again"):
        world.run()
    assert world.states() == ["interrupted", "waiting", "finished"]
    world.ends = {"a": ["finished"], "b": ["finished"]}
    assert world.run() and world.submitted == ["a", "b", "c", "a", "b"]


def test_jobs_of_an_earlier_state_of_the_study_are_cancelled(world: World, monkeypatch) -> None:
    runner = Slurm(Records(world.plan), Cluster())
    jobs = {f"gone.{slurm._mark(world.plan.folder)}.0123": Job("7", "PENDING"), "gone.other.0123": Job("8", "RUNNING")}
    called: list[list[str]] = []

    def call(arguments: list[str], **_: object) -> None:
        called.append(arguments)
        jobs.clear()

    monkeypatch.setattr(slurm, "queue", lambda: dict(jobs))
    monkeypatch.setattr(slurm.subprocess, "run", call)
    runner._cancel_older()
    assert called == [["scancel", "7"]]


def test_a_study_does_not_run_here_while_its_jobs_are_queued(world: World, monkeypatch) -> None:
    mark = slurm._mark(world.plan.folder)
    jobs = {f"a.{mark}.1": Job("12", "PENDING"), f"b.{mark}.1": Job("9", "RUNNING"), f"c.{mark}.1": Job("3", "FAILED")}
    monkeypatch.setattr(slurm, "queue", lambda: jobs)
    check_no_jobs(world.plan.folder)  # nothing was ever submitted
    (world.plan.folder / "stages/jobs").mkdir(parents=True)
    message = "2 jobs of this study are in the queue: add --cluster to wait for them, or end them: scancel 9 12"
    with pytest.raises(ConfigurationError, match=message):
        check_no_jobs(world.plan.folder)


def test_of_jobs_with_one_name_the_newest_that_lives_counts(monkeypatch) -> None:
    listed = "3 FAILED x\n5 RUNNING x\n9 CANCELLED x\n4 PENDING x\n8 FAILED y\n10 TIMEOUT y\n7_[0-3] PENDING z z\n"
    done = subprocess.CompletedProcess([], 0, listed, "")
    monkeypatch.setattr(slurm.subprocess, "run", lambda *_, **__: done)
    assert queue() == {"x": Job("5", "RUNNING"), "y": Job("10", "TIMEOUT")}
    monkeypatch.setattr(
        slurm.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 1, "", "no controller\n")
    )
    with pytest.raises(ValueError, match="squeue fails: no controller"):
        queue(patience=-1.0)


@pytest.mark.parametrize(
    ("cluster", "message"),
    [
        (Cluster(hours=0), "cluster.hours: 0, must be at least 0.01"),
        (Cluster(gpus=-1), "cluster.gpus: -1, must be at least 0"),
        (Cluster(hours=0.5, warning=1800), "cluster.warning: 1800 seconds"),
    ],
)
def test_settings_have_limits(world: World, cluster: Cluster, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Slurm(Records(world.plan), cluster)


def test_what_is_missing_is_named(world: World, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(MissingPackage, match=r"--cluster: submitit .* pip install 'knowledge-entropy\[cluster\]'"):
        Slurm(Records(world.plan), Cluster())
    monkeypatch.setattr(slurm.shutil, "which", lambda name: None)
    with pytest.raises(ConfigurationError, match="sbatch is not installed here"):
        Slurm(Records(world.plan), Cluster())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--cluster", "--jobs=2"], "--jobs: has no effect with --cluster"),
        (["--set", "cluster.hours=2"], "--set cluster.hours=2: has no effect without --cluster"),
        (["--cluster", "--set", "resources.gpus=2"], "--set resources.gpus=2: has no effect with --cluster"),
        (["--report", "x", "--cluster"], "leave out cluster"),
    ],
)
def test_flags_without_effect_are_errors(flags: list[str], message: str, capsys) -> None:
    file = [] if "--report" in flags else ["configs/studies/demo.yaml"]
    assert exit_status(command.main, [*file, *flags]) == 2
    assert message in capsys.readouterr().err
