"""Run a study from its file to its report."""

from __future__ import annotations

import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from olmo.console import clock
from olmo.exceptions import ConfigurationError, did_you_mean, missing_package
from olmo.files.lock import Lock, Locked
from scripts.studies.checks import check_runs
from scripts.studies.estimate import check_space, estimate
from scripts.studies.local import Local
from scripts.studies.plan import KINDS, Plan, Stage
from scripts.studies.read import read_study, with_folder
from scripts.studies.records import Records
from scripts.studies.schema import Cluster, Resources
from scripts.studies.slurm import Slurm, check_no_jobs
from scripts.studies.stages import make_plan


def run_study(
    file: Path,
    output: Path | None = None,
    changes: Sequence[str] = (),
    only: str | None = None,
    jobs: int | None = None,
    dry_run: bool = False,
    cluster: bool = False,
) -> Path:
    """Run what is missing of a study; returns its folder. Raises ValueError where a stage failed, after the others and
    the report."""
    folder = output or Path("runs") / file.stem
    study = with_folder(read_study(file, changes), folder)
    plan = make_plan(study, folder)
    check_folder(plan)
    check_runs(plan)
    records = Records(plan)
    check_report(records, file, dry_run)
    *stages, report = needed_for(plan.stages, only)
    runner = Slurm(records, study.cluster or Cluster()) if cluster else Local(records, study.resources, jobs)
    print_plan(records, [*stages, report], every=dry_run)
    found = estimate(records, [*stages, report], runner.jobs, runner.threads, runner.gpus_a_stage)
    print("\n".join(found.lines(runner.jobs)))
    if dry_run:
        return folder
    check_space(found)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = Lock(folder / ".study.lock")
    except Locked:
        raise Locked(f"{folder}: another process runs this study") from None
    with lock:
        if not cluster:
            check_no_jobs(folder)
        records.write_plan()
        complete = runner.run(stages)
        complete &= Local(records, Resources(gpus=0), 1).run_alone(report)
    if not complete:
        raise ValueError(f"{folder}: a stage has failed; the same command runs what is missing")
    seconds = sum(records.records[stage.name].seconds or 0.0 for stage in stages)
    print(f"done: {folder}/report.html ({clock(seconds)} in all stages together)")
    return folder


def check_folder(plan: Plan) -> None:
    """Raise ConfigurationError where the output folder contains files of something else than a study."""
    if not plan.folder.exists() or (plan.folder / "plan.json").is_file():
        return
    if not plan.folder.is_dir():
        raise ConfigurationError(f"--output {plan.folder}: not a folder")
    made = (path for stage in plan.stages for path in (*stage.outputs, *([stage.run] if stage.run else [])))
    inside = [path.relative_to(plan.folder).parts for path in made if path.is_relative_to(plan.folder)]
    ours = {"stages", ".study.lock", *(parts[0] for parts in inside if parts)}
    for entry in sorted(plan.folder.iterdir()):
        if entry.name not in ours:
            raise ConfigurationError(
                f"--output {plan.folder}: not the output of a study (it contains {entry.name}, and no plan.json); "
                "name a new or empty folder"
            )


def check_report(records: Records, file: Path, dry_run: bool) -> None:
    """Raise MissingPackage where the report cannot be drawn; a dry run only warns that names are not checked."""
    if find_spec("matplotlib") is not None:  # not imported: a stage would count it as its own memory
        check_names(records, file)
        return
    error = missing_package("matplotlib", "plot", "the report of a study")
    if not dry_run:
        raise error
    print(f"warning: {error}; names of figures and tables are not checked", file=sys.stderr)


def check_names(records: Records, file: Path) -> None:
    """Raise ConfigurationError where a study names a figure, table or measure that no report has.

    In a process of its own: these names are in modules that import torch.
    """
    with tempfile.TemporaryDirectory() as folder:
        records.write_plan(Path(folder))
        command = [sys.executable, "-m", "analysis.report", folder, "--check"]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = done.stderr.strip().rpartition("\n")[2].removeprefix("error: ")
        raise ConfigurationError(f"{file}: {reason}")


def needed_for(stages: Sequence[Stage], only: str | None) -> list[Stage]:
    """The stages of one kind, those that they need, and the report; all stages without a kind."""
    if only is None:
        return list(stages)
    if only not in KINDS:
        raise ConfigurationError(
            f"--only {only}: no such stage{did_you_mean(only, KINDS) or '; known are ' + ', '.join(KINDS)}"
        )
    by_name = {stage.name: stage for stage in stages}
    wanted = {stage.name for stage in stages if stage.kind in (only, "report")}
    for stage in reversed(stages):  # what a stage needs is before it
        if stage.name in wanted:
            wanted |= set(stage.needs)
    if not any(by_name[name].kind == only for name in wanted):
        raise ConfigurationError(f"--only {only}: the study has no such stage")
    return [stage for stage in stages if stage.name in wanted]


def print_plan(records: Records, stages: Sequence[Stage], every: bool) -> None:
    """Print what a study consists of; with `every`, each stage with its command."""
    plan = records.plan
    print(
        f"{plan.study.title}: {len(plan.starts)} starts, {len(plan.conditions)} conditions, "
        f"{len(plan.repetitions)} repetitions, {len(stages)} stages; output: {plan.folder}"
    )
    for stage in [stage for stage in stages if stage.name in records.kept]:
        print(
            f"warning: {stage.name}: its command has changed, but {stage.outputs[0]} is outside of the output folder "
            "and is not replaced; delete it to make it again",
            file=sys.stderr,
        )
    for stage in stages if every else ():
        record = records.records[stage.name]
        took = f", in {clock(record.seconds)}" if records.is_finished(stage) and record.seconds is not None else ""
        print(f"[{record.state}{took}] {stage.name}: {shlex.join(record.command)}")
