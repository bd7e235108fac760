"""Time and disk of a plan before it runs, against sums by hand and against what a run really writes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from olmo.config import load, load_model_config
from olmo.exceptions import exit_status
from olmo.model import OLMo
from scripts import study as command
from scripts.studies import estimate as module
from scripts.studies import run as of_study
from scripts.studies.costs import Costs, _size_of
from scripts.studies.estimate import START, estimate, in_bytes, in_time
from scripts.studies.plan import Plan, Stage
from scripts.studies.records import FINISHED, Records
from scripts.studies.schema import Study
from tests.reference import tiny_config
from tests.running import LENGTH, ROOT, train, write_world

Usage = namedtuple("Usage", "total used free")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(autouse=True)
def _speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_product", lambda _: 2e6)  # at an efficiency of a half, 1e6 operations a second


def plan_of(folder: Path, *stages: Stage) -> Plan:
    plan = Plan(Study("x"), folder, [], [], [], 0)
    plan.stages = list(stages)
    return plan


def training(world: Path, *overrides: str, name: str = "a", needs: tuple[str, ...] = (), run: str = "run") -> Stage:
    given = ("scripts.train", str(world / "config.yaml"), f"--save_folder={world / run}", "--seed=1", *overrides)
    return Stage(name, "train", given, (world / run,), needs, (str(world / "config.yaml"),), world / run)


def numel(config: object) -> int:
    return sum(weight.numel() for weight in OLMo.empty(config).parameters())  # type: ignore[arg-type]


def test_operations_of_training_and_its_evaluations(world: Path) -> None:
    weights = numel(load(world / "config.yaml").model)
    bare = ("--evaluators=[]", "--injection=null", "--inject_interval=null")
    stage = training(world, "--max_duration=20", *bare)
    cost = Costs(plan_of(world, stage)).of(stage)
    assert cost.operations == pytest.approx(6 * weights * 20 * 6 * LENGTH, rel=0.02)

    # At steps 0, 3, 6, ..., 18, and 20: 5 and 3 instances; in batches of 2, 2 batches are 4 and 3.
    heldout = {name: f"{name}: [{world}/{name}{LENGTH}.npy]" for name in ("heldout", "other")}
    walk = f"{{label: walk, data: {{datasets: {{{', '.join(heldout.values())}}}}}}}"
    stage = training(world, "--max_duration=20", *bare[1:], f"--evaluators=[{walk}]", "--eval_on_load")
    more = Costs(plan_of(world, stage)).of(stage).operations
    assert more is not None and cost.operations is not None
    assert more - cost.operations == pytest.approx(2 * weights * 8 * 8 * LENGTH, rel=0.02)

    # The probes are about 90 texts, and evaluated at every step of the windows too.
    with_probes, windows = (training(world, "--max_duration=20", *more) for more in ((), ("--probing.steps=2",)))
    numbers = [Costs(plan_of(world, s)).of(s).operations for s in (with_probes, windows)]
    assert cost.operations < numbers[0] < numbers[1]  # type: ignore[operator]


def test_bytes_of_checkpoints_are_those_that_a_run_writes(world: Path) -> None:
    flags = ("--max_duration=4", "--save_interval=2", "--save_interval_unsharded=3", "--evaluators=[]")
    flags = (*flags, "--no_pre_train_checkpoint=false")
    train(world / "config.yaml", world / "real", *flags)
    real = sum(p.stat().st_size for c in (world / "real").glob("step*") for p in c.rglob("*") if p.is_file())
    stage = training(world, *flags)
    expected = Costs(plan_of(world, stage)).of(stage).written
    assert expected is not None and expected < real < 1.5 * expected  # in so small a model, names count
    fewer = training(world, *flags, "--save_num_checkpoints_to_keep=1", "--save_unsharded_optimizer=false")
    weights = numel(load(world / "config.yaml").model)  # at steps 0, 3, 4 unsharded, and the newest one for restarts
    assert Costs(plan_of(world, fewer)).of(fewer).written == pytest.approx(weights * (3 * 4 + 12), rel=0.02)


def test_models_are_known_from_their_folders_or_names(world: Path, tmp_path: Path) -> None:
    costs = Costs(plan_of(world))
    official = load_model_config("configs/official/OLMo-1B.yaml")
    assert costs.size("allenai/OLMo-1B@step738020-tokens3095B").weights == pytest.approx(numel(official), rel=0.01)
    with pytest.raises(ValueError, match=r"nobody/none: its size is not known before it is downloaded"):
        costs.size("nobody/none")
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 8, "max_position_embeddings": 64}))
    save_file({"a": torch.zeros(48, 32)}, tmp_path / "model.safetensors")
    found = costs.size(str(tmp_path))
    assert (found.weights, found.width, found.context) == (48 * 32, 8, 64)
    for config in (tiny_config(), tiny_config(weight_tying=False, n_kv_heads=2, activation_type="gelu")):
        assert _size_of(config).weights == pytest.approx(numel(config), rel=0.01)


def test_measurements_and_scores_of_planned_checkpoints(world: Path) -> None:
    pretraining = training(world, "--max_duration=4")
    places = [str(world / f"run/step{n}-unsharded") for n in (2, 4)]
    entropy = ("analysis.entropy", "--checkpoint", *places, "--data", "t.npy", "--data_size", "10")
    flags = ("--held_out", f"x={world}/heldout{LENGTH}.npy", "--tasks", "copa", "--limit", "8")
    score = ("analysis.score", *places, *flags)
    stages = [Stage(n, n, c, (Path(n),)) for n, c in (("entropy", entropy), ("score", score))]
    costs, weights = Costs(plan_of(world, pretraining, *stages)), numel(load(world / "config.yaml").model)
    assert costs.of(stages[0]).operations == pytest.approx(2 * weights * 2 * 10 * LENGTH, rel=0.02)
    tokens = (5 * LENGTH + 7) + 16 * 60  # a batch of 16 samples at least
    assert costs.of(stages[1]).operations == pytest.approx(2 * weights * 2 * tokens, rel=0.02)


def test_time_is_the_longest_chain_or_the_work_of_all(world: Path) -> None:
    stages = [training(world, name="a", run="a"), training(world, name="b", needs=("a",), run="b")]
    stages += [training(world, name="c", run="c"), Stage("p", "prepare", ("x",), (Path("p"),))]
    records = Records(plan_of(world / "out", *stages))
    operations = Costs(records.plan).of(stages[0]).operations
    assert operations is not None
    one = START + operations / 1e6
    alone, two, many = (estimate(records, stages, jobs, 1) for jobs in (1, 2, 10))
    assert alone.alone == alone.together == pytest.approx(3 * one)
    assert two.together == many.together == pytest.approx(2 * one)  # a, then b
    assert estimate(records, stages, 1, 4).alone == pytest.approx(3 * (START + operations / 4e6))
    assert alone.unknown == ["p (prepare: not run yet)"]
    assert "time: about" in alone.lines(1)[0] and "50% of a matrix product on 1 of these cores" in alone.lines(1)[0]
    assert "with 2 stages side by side" in two.lines(2)[0]
    gpu = estimate(records, stages, 1, 1, gpus=2)
    assert gpu.alone == pytest.approx(3 * START, abs=0.1) and "35% of 2 A100" in gpu.basis


def test_time_of_earlier_stages_is_scaled_by_their_work(world: Path, tmp_path: Path) -> None:
    short, long = training(world, "--max_duration=2", name="a"), training(world, "--max_duration=8", name="b", run="b")
    prepare = Stage("p", "prepare", ("x",), (Path("p"),))
    records = Records(plan_of(tmp_path, short, long, prepare))
    for stage, seconds in ((short, 5.0), (prepare, 3.0)):
        record = records.records[stage.name]
        record.state, record.seconds = FINISHED, seconds
        record.command = ["python", "-m", "torch.distributed.run", "--standalone", "-m", *stage.command]
        records.save(stage)
    costs = Costs(records.plan)
    ratio = costs.of(long).operations / costs.of(short).operations  # type: ignore[operator]
    found = estimate(records, [long], 1, 1)
    assert found.alone == pytest.approx(5 * ratio) and found.basis == "from stages of these kinds that have finished"
    assert estimate(records, [prepare], 1, 1).alone == 3.0  # its output was deleted
    assert not estimate(records, [prepare], 1, 1).unknown


def test_a_study_for_which_there_is_no_room_does_not_begin(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (world / "study.yaml").write_text(
        f"title: Small\nconfiguration: {world}/config.yaml\npretraining: {{configuration: {world}/config.yaml, "
        "overrides: {save_steps_unsharded: [4]}}\n"
        "starts: {last: {step: 4}}\noverrides: {save_interval: 1}\n"
    )
    monkeypatch.setattr(of_study, "check_names", lambda *_: None)  # in a process of its own
    argv = [str(world / "study.yaml"), "--output", str(tmp_path / "out")]
    assert exit_status(command.main, [*argv, "--dry_run"]) == 0
    shown = capsys.readouterr().out
    assert f"are free in {tmp_path}" in shown and "time: about" in shown
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "matplotlib", None)
        assert exit_status(command.main, [*argv, "--dry_run"]) == 0
        line = "the report of a study: matplotlib is not installed: pip install 'knowledge-entropy[plot]'"
        assert capsys.readouterr().err == f"warning: {line}; names of figures and tables are not checked\n"
        assert exit_status(command.main, argv) == 1
        assert capsys.readouterr().err == f"error: {line}\n"
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 10**9, 100_000))
    assert exit_status(command.main, argv) == 1
    shown = capsys.readouterr().err
    assert shown.startswith(f"error: {tmp_path}: the study needs about ") and shown.count("\n") == 1
    assert "here, and 100 kB are free; free " in shown and shown.endswith("on another disk with --output\n")
    assert not (tmp_path / "out").exists()


def test_the_estimate_needs_no_torch(tmp_path: Path) -> None:
    """A stage counts as its own memory what the program that starts it holds."""
    program = (
        "import sys\nfrom pathlib import Path\nimport scripts.studies.run\n"
        "from scripts.studies.estimate import estimate\nfrom scripts.studies.read import read_study\n"
        "from scripts.studies.records import Records\nfrom scripts.studies.stages import make_plan\n"
        "plan = make_plan(read_study(Path('configs/studies/demo.yaml'), ['seeds=1']), Path('out'))\n"
        "assert estimate(Records(plan), plan.stages, 1, 1).alone > 10\nassert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_sizes_in_words() -> None:
    assert [in_bytes(n) for n in (1500, 2.5e6, 1.234e9, 2e13)] == ["2 kB", "2.5 MB", "1.23 GB", "20 TB"]
    assert [in_time(n) for n in (65, 3600 * 47, 3600 * 480)] == ["1:05", "47:00:00", "20 days"]
