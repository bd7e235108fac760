"""Stages run side by side in processes of their own; records of them make the same command continue."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from olmo.exceptions import Interrupted
from scripts.studies import local
from scripts.studies.local import Local, gpus_here, launched
from scripts.studies.plan import Plan, Stage
from scripts.studies.records import FAILED, FINISHED, INTERRUPTED, Records
from scripts.studies.run import print_plan
from scripts.studies.schema import Resources, Study

ROOT = Path(__file__).resolve().parents[3]

# python -m work OUT [SECONDS] [STATUS]: appends when it began and ended.
WORK = """
import os, sys, time
out, seconds, status = sys.argv[1], float((sys.argv + [0, 0])[2]), int((sys.argv + [0, 0])[3])
began = time.time()
time.sleep(seconds)
if status:
    print("error: it went wrong", file=sys.stderr)
    sys.exit(status)
with open(out, "a") as file:
    file.write(f"{began} {time.time()} {os.environ['OMP_NUM_THREADS']} {os.environ.get('CUDA_VISIBLE_DEVICES')}\\n")
"""


@pytest.fixture
def world(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "work.py").write_text(WORK)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{tmp_path}")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return tmp_path


def stage(name: str, *arguments: object, needs=(), kind="entropy", **options) -> Stage:
    return Stage(name, kind, ("work", name, *map(str, arguments)), (Path(name),), needs, **options)


def study(*stages: Stage) -> Plan:
    plan = Plan(Study("x"), Path("out"), [], [], [], 0)
    plan.stages = list(stages)
    return plan


def run(*stages: Stage, jobs: int = 2) -> tuple[bool, Records]:
    records = Records(study(*stages))
    return Local(records, Resources(), jobs).run(stages), records


def ends(name: str) -> list[float]:
    return [float(part) for part in Path(name).read_text().splitlines()[-1].split()[:2]]


def test_stages_run_side_by_side_and_after_those_that_they_need(world):
    complete, records = run(stage("a", 0.6), stage("b", 0.6), stage("c", needs=("a", "b")))
    assert complete
    (a_began, a_ended), (b_began, b_ended), (c_began, _) = map(ends, "abc")
    assert max(a_began, b_began) < min(a_ended, b_ended), "not side by side"
    assert c_began >= max(a_ended, b_ended)
    found = records.records["a"]
    assert found.state == FINISHED and found.seconds >= 0.6 and found.peak_memory_mib > 1
    assert (world / "out" / found.log).read_text().startswith("$ python -m work a 0.6\n")
    [first, *_] = json.loads((world / "out/plan.json").read_text())["stages"]
    assert (first["name"], first["state"], first["command"]) == ("a", "finished", ["python", "-m", "work", "a", "0.6"])


def test_no_more_stages_than_jobs_and_the_cores_are_shared_out(world, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    names = ["a", "b", "c"]
    assert run(*(stage(name, 0.3) for name in names), jobs=2)[0]
    began = sorted(ends(name)[0] for name in names)
    assert began[2] >= min(ends(name)[1] for name in names)
    assert Path("a").read_text().split()[2] == "4"


def test_a_study_states_how_many_stages_run_at_a_time(world):
    records = Records(study(stage("a")))
    assert Local(records, Resources(jobs=1)).jobs == 1
    assert Local(records, Resources(jobs=1), 3).jobs == 3


def test_an_output_of_all_studies_is_not_made_again(world):
    assert run(stage("a", shared=True), stage("b", needs=("a",)))[0]
    Path("out/stages/a.json").unlink()  # as in the folder of another study
    Path("c").touch()
    complete, records = run(stage("a", shared=True), stage("b", needs=("a",)), stage("c", 0, 1, shared=True))
    assert complete and records.records["a"].state == records.records["c"].state == FINISHED
    assert len(Path("a").read_text().splitlines()) == len(Path("b").read_text().splitlines()) == 1


def test_an_output_of_all_studies_is_kept_with_a_warning_where_its_command_changes(world, capsys):
    assert run(stage("a", shared=True))[0]
    for made, warned in ((stage("a", shared=True), False), (stage("a", 0.1, shared=True), True)):
        records = Records(study(made))
        assert records.is_finished(made)
        print_plan(records, [made], every=False)
        assert ("a: its command has changed, but a is outside" in capsys.readouterr().err) == warned


def test_a_finished_stage_is_not_repeated_and_a_changed_one_reruns_what_depends_on_it(world):
    def everything(change=0):
        return stage("a", change), stage("b"), stage("c", needs=("a",)), stage("d", needs=("c",))

    for change, lines in ((0, "1111"), (0, "1111"), (0.01, "2122"), (0.01, "2122")):
        assert run(*everything(change))[0]
        assert [str(len(Path(name).read_text().splitlines())) for name in "abcd"] == list(lines)
    Path("b").unlink()  # a deleted output is made again
    assert run(*everything(0.01))[0]
    assert Path("b").exists() and len(Path("c").read_text().splitlines()) == 2


def test_settings_of_a_configuration_count_but_its_comments_do_not(world):
    from scripts.studies import records

    keys = []
    for text in ("x: 1\n", "# why\nx: 1\n", "x: 2\n"):
        records._content.cache_clear()
        Path("c.yaml").write_text(text)
        keys.append(Records(study(stage("a", configurations=("c.yaml",)))).keys["a"])
    assert keys[0] == keys[1] != keys[2]


def test_where_a_stage_fails_the_others_go_on(world, capsys):
    complete, records = run(stage("a", 0, 3), stage("b", 0.2), stage("c", needs=("a",)), stage("d", needs=("b",)))
    assert not complete
    states = {name: record.state for name, record in records.records.items()}
    assert states == {"a": FAILED, "b": FINISHED, "c": "waiting", "d": FINISHED}
    assert (records.records["a"].status, records.records["a"].reason) == (3, "it went wrong")
    said = capsys.readouterr().out
    assert "failed: a, " in said and "it went wrong; its log: out/stages/a.log" in said
    assert "not run: c: it needs 'a'" in said


def test_a_stage_without_its_output_has_failed(world):
    complete, records = run(Stage("a", "train", ("work", "other"), (Path("missing"),)))
    assert not complete and records.records["a"].reason == "finished without missing"


def test_a_run_of_another_setting_is_deleted_and_one_of_the_same_or_without_a_record_is_not(world):
    folder = Path("run")
    folder.mkdir()
    (folder / "foreign").touch()
    for status in (5, 6, 6):
        (folder / "begun").touch() if status == 6 else None
        assert not run(stage("a", 0, status, run=folder))[0]
        assert (folder / "foreign").exists() == (status == 5)
        folder.mkdir(exist_ok=True)
    assert (folder / "begun").exists()


def test_a_stage_that_saved_and_was_interrupted_interrupts_the_study(world):
    with pytest.raises(Interrupted, match="the same command continues"):
        run(stage("a", 0, 75), stage("b", needs=("a",)))
    assert Records(study(stage("a", 0, 75))).records["a"].state == INTERRUPTED


@pytest.mark.parametrize("end", [os.killpg, os.kill])
def test_an_interrupted_study_ends_after_its_stages(world, end):
    """Control-C reaches all processes of a terminal's foreground, SIGTERM only the study. The stage ends its work."""
    sent, status = (signal.SIGINT, 130) if end is os.killpg else (signal.SIGTERM, 143)
    (world / "slow.py").write_text(
        "import signal, time\nsignal.signal(signal.SIGTERM, signal.default_int_handler)\n"
        "try:\n    open('began', 'w').close()\n    time.sleep(60)\n"
        "except KeyboardInterrupt:\n    time.sleep(0.5)\n    open('ended', 'w').close()\n"
    )
    (world / "main.py").write_text(
        "import sys\nfrom pathlib import Path\nfrom olmo.exceptions import exit_status\n"
        "from scripts.studies.local import Local\nfrom scripts.studies.plan import Plan, Stage\n"
        "from scripts.studies.records import Records\nfrom scripts.studies.schema import Resources, Study\n"
        "plan = Plan(Study('x'), Path('out'), [], [], [], 0)\n"
        "plan.stages = [Stage('slow', 'train', ('slow',), (Path('ended'),))]\n"
        "sys.exit(exit_status(lambda argv: print(Local(Records(plan), Resources(), 1).run(plan.stages))))\n"
    )
    process = subprocess.Popen([sys.executable, "main.py"], start_new_session=True, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while not Path("began").exists() and time.monotonic() < until:
        time.sleep(0.05)
    end(process.pid, sent)
    assert process.wait(timeout=60) == status
    assert Path("ended").exists()
    assert json.loads(Path("out/stages/slow.json").read_text())["state"] == "interrupted"


def test_gpus_are_shared_out(world, monkeypatch):
    monkeypatch.setattr(local, "gpus_here", lambda: ["0", "3", "5"])
    records = Records(study(*(made := [stage("a", 0.3), stage("b", 0.3), stage("c", kind="edit")])))
    runner = Local(records, Resources())
    assert (runner.jobs, runner.gpus_a_stage, runner.processes) == (3, 1, 1)
    assert runner.run(made)
    assert {Path(name).read_text().split()[3] for name in "ab"} == {"0", "3"}
    assert len(Path("c").read_text().split()) == 3, "an edit needs no GPU"
    two = Local(records, Resources(gpus=2))
    assert (two.jobs, two.processes) == (1, 2)
    with pytest.raises(ValueError, match=r"resources\.gpus: 4 GPUs a stage, and this machine has 3"):
        Local(records, Resources(gpus=4))


def test_a_stage_waits_for_its_gpus_and_one_for_the_cpu_finds_none(world, monkeypatch):
    monkeypatch.setattr(local, "gpus_here", lambda: ["0", "3", "5"])
    records = Records(study(*(made := [stage("a", 0.3), stage("b", 0.3)])))
    assert Local(records, Resources(gpus=2), jobs=3).run(made)
    assert [Path(name).read_text().split()[3] for name in "ab"] == ["0,3", "5,0"]
    assert ends("b")[0] >= ends("a")[1]
    records = Records(study(on_cpu := stage("c")))
    assert Local(records, Resources(gpus=0)).run([on_cpu])
    assert len(Path("c").read_text().split()) == 3


@pytest.mark.parametrize("change", [{"jobs": 0}, {"processes": -1}, {"gpus": -1}])
def test_numbers_below_the_least_are_refused(world, change):
    [(name, value)] = change.items()
    with pytest.raises(ValueError, match=rf"resources\.{name}: {value} is below {int(name != 'gpus')}"):
        Local(Records(study(stage("a"))), Resources(**change))


def test_training_of_several_processes_is_launched_by_torchrun():
    assert launched(stage("a", kind="train"), 2)[:6] == [
        "python",
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "-m",
    ]
    assert launched(stage("a", kind="entropy"), 2) == ["python", "-m", "work", "a"]
    assert gpus_here({"CUDA_VISIBLE_DEVICES": "2,3"}) == ["2", "3"] and gpus_here({"CUDA_VISIBLE_DEVICES": ""}) == []


@pytest.mark.parametrize("content", ["", "{", "[]", '{"state": 3}'])
def test_a_damaged_record_is_named(world, content):
    records = Records(study(stage("a")))
    records.folder.mkdir(parents=True)
    records.path(stage("a")).write_text(content)
    with pytest.raises(ValueError, match=r"a\.json: damaged: .*; delete it, and its stage runs again"):
        Records(study(stage("a")))


def test_time_and_memory_of_a_stage_are_its_own(world):
    """Not the largest of all children so far, and not this program's: a process counts what its parent held when it
    began, so this program must stay small, without torch."""
    (world / "large.py").write_text(
        "import time\nx = bytearray(300 * 2**20)\nx[::4096] = b'1' * len(x[::4096])\ntime.sleep(0.2)\n"
        "open('large', 'w').close()\n"
    )
    (world / "main.py").write_text(
        "import sys\nfrom pathlib import Path\nimport scripts.studies.run\nfrom scripts.studies.local import Local\n"
        "from scripts.studies.plan import Plan, Stage\nfrom scripts.studies.records import Records\n"
        "from scripts.studies.schema import Resources, Study\nplan = Plan(Study('x'), Path('out'), [], [], [], 0)\n"
        "plan.stages = [Stage('large', 'edit', ('large',), (Path('large'),)),\n"
        "               Stage('small', 'edit', ('work', 'small'), (Path('small'),))]\n"
        "assert Local(Records(plan), Resources(), 1).run(plan.stages)\nassert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "main.py"], check=True)
    large, small = json.loads(Path("out/plan.json").read_text())["stages"]
    assert large["seconds"] >= 0.2
    assert 300 < large["peak_memory_mib"] < 400 and small["peak_memory_mib"] < 100
