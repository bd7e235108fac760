"""A study as jobs of a real SLURM: complete after its command and some of its jobs were killed, with the numbers of the
same study run without SLURM."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.running import metrics, series, write_world
from tests.slurm import Slurm

pytest.importorskip("submitit", reason="make test-slurm installs it")
pytestmark = pytest.mark.slurm


def write_study(world: Path) -> Path:
    """Two starts and an edit of the later one; two seeds from pretraining on."""
    config = str(world / "config.yaml")
    study = {
        "title": "A small study",
        "about": "model",
        "seeds": 2,
        "pretraining": {
            "configuration": config,
            "overrides": {"max_duration": 4, "save_steps_unsharded": [2, 4], "injection": None, "evaluators": []},
        },
        "configuration": config,
        "overrides": {"reset_optimizer_state": True, "reset_trainer_state": True, "eval_on_load": True},
        "starts": {"early": {"step": 2}, "last": {"step": 4}},
        "interventions": {"none": {}, "q": {"ratio": 0.5, "factor": 2.0}},
        "conditions": [{"starts": ["early", "last"], "interventions": ["none"]}, {"starts": ["last"]}],
        "entropy": {"text": {"data": str(world / "heldout256.npy"), "data_size": 4, "batch_size": 2}},
    }
    (world / "study.yaml").write_text(yaml.safe_dump(study), encoding="utf-8")
    return world / "study.yaml"


class Command:
    """`python -m scripts.study` in a process of its own."""

    def __init__(self, slurm: Slurm, file: Path, output: Path, *flags: str):
        self.arguments = [sys.executable, "-m", "scripts.study", str(file), f"--output={output}", *flags]
        self.slurm, self.cwd, self.log = slurm, file.parent, output.with_suffix(".out")

    def start(self) -> subprocess.Popen[bytes]:
        with self.log.open("wb") as out:
            return subprocess.Popen(
                self.arguments, cwd=self.cwd, env=self.slurm.environment, stdout=out, stderr=out, start_new_session=True
            )

    def run(self) -> tuple[int, str]:
        """(exit status, output)."""
        process = self.start()
        try:
            status = process.wait(600)
        finally:
            process.kill()
        return status, self.log.read_text()


def numbers(folder: Path) -> dict[str, object]:
    """Everything that a study has measured, by file."""
    found: dict[str, object] = {
        str(path.parent.relative_to(folder)): metrics(path.parent) for path in folder.rglob("metrics.jsonl")
    }
    for path in folder.rglob("knowledge_entropy.json"):
        found[str(path.relative_to(folder))] = json.loads(path.read_text())["layers"]
    for path in folder.glob("acquisition/**/acquisition.json"):
        text = path.read_text().replace(str(folder), "")
        found[str(path.relative_to(folder))] = json.loads(text)
    return found


def states(folder: Path) -> dict[str, str]:
    """Slug of a stage -> its state; the report is made here."""
    records = {path.stem: json.loads(path.read_text())["state"] for path in (folder / "stages").glob("*.json")}
    return {name: state for name, state in records.items() if name != "report"}


def test_a_study_is_complete_after_it_was_killed(slurm: Slurm, tmp_path: Path) -> None:
    file, output = write_study(write_world(tmp_path / "world")), tmp_path / "study"
    first = Command(slurm, file, output, "--cluster")
    process = first.start()
    slurm.wait(lambda: len([state for state in slurm.states().values() if state == "COMPLETED"]) >= 2)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    status, text = Command(slurm, file, output).run()
    assert status == 2 and "add --cluster to wait for them" in text
    running = [job for job, state in slurm.states().items() if state == "RUNNING"]
    slurm.call("scancel", *running)
    slurm.wait(lambda: not {"RUNNING", "COMPLETING"} & set(slurm.states().values()))
    assert "finished" in states(output).values() and set(states(output).values()) != {"finished"}

    status, text = first.run()
    found = states(output)
    assert len(found) == 13 and set(found.values()) == {"finished"}, text
    count = len(slurm.states())
    status, text = first.run()
    assert "0 stages to run as jobs of SLURM" in text and len(slurm.states()) == count
    assert status == 0 and (output / "report.html").is_file()

    here = tmp_path / "here"
    assert Command(slurm, file, here, "--jobs=2").run()[0] == 0
    assert numbers(output) == numbers(here)
    assert len(numbers(here)) == 8 + 4 + 1
    status, text = Command(slurm, file, output).run()  # what a cluster has begun continues here
    assert status == 0 and "0 stages to run" in text


def test_two_processes_are_warned_and_queued_again_and_what_fails_is_named(slurm: Slurm, tmp_path: Path) -> None:
    world, output = write_world(tmp_path / "world"), tmp_path / "study"
    run, config = output / "pretraining/seed0", str(world / "plain.yaml")
    study = {
        "title": "Interrupted",
        "seed": 11,
        "pretraining": {"configuration": config, "overrides": {"max_duration": 300, "save_steps_unsharded": [300]}},
        "starts": {"last": {"step": 300}},
        "entropy": {
            "text": {"data": str(world / "heldout32.npy"), "data_size": 4, "batch_size": 2},
            "nothing": {"data": str(world / "absent.npy"), "data_size": 4, "batch_size": 2},
        },
    }
    (world / "study.yaml").write_text(yaml.safe_dump(study), encoding="utf-8")
    command = Command(slurm, world / "study.yaml", output, "--cluster", "--set=cluster.processes=2")
    process = command.start()

    def step() -> int:
        path = run / "metrics.jsonl"
        return max(series(run)) if path.is_file() and path.stat().st_size else 0

    try:
        slurm.wait(lambda: step() > 20)
        [job] = [job for job, state in slurm.states().items() if state == "RUNNING"]
        slurm.call("scancel", "--signal=USR1", job)  # which SLURM sends before the time limit
        slurm.wait(lambda: slurm.job(job)["Restarts"] == "1")
        saved = step()
        assert saved < 300
        assert process.wait(300) == 1
    finally:
        process.kill()
    text = command.log.read_text()
    assert f"running: pretraining, seed 0, job {job}, after " in text
    assert "failed: entropy on nothing, abs, seed 0, job" in text and "absent.npy" in text
    expected = {"pretraining_seed_0": "finished", "entropy_on_text_abs_seed_0": "finished"}
    assert states(output) == {**expected, "entropy_on_nothing_abs_seed_0": "failed"}
    assert f"resuming from {run}/step{saved}" in (output / "stages/pretraining_seed_0.log").read_text()
    train = ["srun", "--ntasks=2", "python3", "-m", "scripts.train", config, f"--save_folder={tmp_path}/unbroken"]
    slurm.call(*train, "--max_duration=300", "--save_steps_unsharded=[300]", cwd=world)
    assert metrics(run) == metrics(tmp_path / "unbroken")
