"""The whole demo with a tiny model, in this process, and what its report holds."""

import functools
import importlib
import json
import os
import types
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from omegaconf import OmegaConf

import analysis.report
from analysis import estimates
from olmo.exceptions import ConfigurationError, exit_status
from olmo.memory.rescaling import load_multipliers
from scripts import demo, prepare_demo_text
from scripts.prepare import demo_sources, demo_text, stages
from tests.reference import table_of
from tests.run_folders import direct_k

command = functools.partial(exit_status, demo.main)
ROOT = Path(__file__).resolve().parents[2]
CONDITIONS = {"early": 90, "middle": 450, "last": 720, "last_q1": 720, "last_q2": 720, "last_control": 720}


SMALL_MODEL = ["d_model=32", "n_heads=2", "mlp_hidden_size=64", "vocab_size=600", "embedding_size=600"]
SMALL = [*(f"--model.{setting}" for setting in SMALL_MODEL), "--global_train_batch_size=8"]


class InProcess:
    """Instead of processes: the commands' own `main` here, made small by further arguments. Counts calls."""

    def __init__(self, continual: Path):
        self.called: list[str] = []
        self.status: dict[int, int] = {}
        self.continual = continual

    def __call__(self, command_line: list[str]) -> types.SimpleNamespace:
        _, _, module, *arguments = command_line
        if module == "scripts.train" and arguments[0].endswith("continual.yaml"):
            arguments = [str(self.continual), *arguments[1:], *SMALL]
            arguments += ["--max_duration=10", "--inject_interval=1", "--eval_interval=10"]
        elif module == "scripts.train":
            arguments += [*SMALL, "--max_duration=6", "--save_steps_unsharded=[2,4,6]", "--eval_interval=6"]
        elif module == "analysis.entropy":
            arguments += ["--data_size", "64"]
        self.called.append(module)
        number = len(self.called)
        self.status[number] = exit_status(importlib.import_module(module).main, arguments)
        return types.SimpleNamespace(pid=number)

    def wait4(self, number: int, options: int) -> tuple:
        return number, self.status[number] << 8, types.SimpleNamespace(ru_maxrss=1024)


@pytest.fixture(scope="module")
def miniature(tmp_path_factory):
    """(folder of a finished demo, what ran): the project's own commands, all of them, with a tiny model."""
    place = tmp_path_factory.mktemp("miniature")
    raw = OmegaConf.load(ROOT / "configs/tiny/continual.yaml")
    # Without the downstream tasks, whose tokenization alone would take a minute.
    kept = [e for e in raw.evaluators if e.get("type") != "downstream"]
    continual = {"base": str(ROOT / "configs/tiny/continual.yaml"), "evaluators": kept}
    (place / "continual.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(continual)))
    text = place / "demo" / "text"
    runner = InProcess(place / "continual.yaml")
    few = [s for s in demo_sources.SOURCES if s.name in ("piqa, the rest", "openbookqa test")]

    def prepare(argv):
        settings = demo_text.Settings(600, 256, 0, "test")
        demo_text.prepare(demo_sources.package_root(), text, settings, few)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(stages, "subprocess", types.SimpleNamespace(Popen=runner))
        fake_os = types.SimpleNamespace(wait4=runner.wait4, waitstatus_to_exitcode=os.waitstatus_to_exitcode)
        patch.setattr(stages, "os", fake_os)
        patch.setattr(demo, "EARLY", 2)
        patch.setattr(demo, "MIDDLE", 4)
        patch.setattr(demo, "LAST", 6)
        patch.setattr(demo, "LEARNED", 10)
        patch.setattr(demo, "KNOWLEDGE", {"paraphrase": 4, "once": 10})
        patch.setattr(prepare_demo_text, "main", prepare)
        patch.setattr(estimates, "RESAMPLES", 200)
        arguments = ["--output", str(place / "demo")]
        assert command(arguments) == 0
        first = list(runner.called)
        drawn = {path.stem: path for path in (place / "demo" / "figures").glob("*.png")}
        patch.setattr(analysis.report, "draw", lambda found, folder: drawn)  # once is enough
        assert command(arguments) == 0
        yield place / "demo", first, runner.called[len(first) :]
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def report(miniature) -> dict:
    return json.loads((miniature[0] / "report.json").read_text())


def test_the_whole_demo_runs_once_and_then_only_reports(miniature):
    folder, first, second = miniature
    assert first == [
        "scripts.prepare_demo_text",
        "scripts.make_fictional_knowledge",
        "scripts.train",
        "analysis.entropy",
        *["analysis.change_parameters"] * 2,
        *["scripts.train"] * 6,
        "analysis.report",
    ]
    assert second == ["analysis.report"]
    page = (folder / "report.html").read_text()
    assert "Acquisition and forgetting" in page and "Downstream" not in page  # no task was evaluated


def test_the_report_tells_of_what_the_runs_wrote(miniature, report):
    """K of every condition, from the probes' tables; and the trainer's own K is the same."""
    folder, *_ = miniature
    assert set(report["conditions"]) == set(CONDITIONS)
    for key, condition in report["conditions"].items():
        run = folder / "continual" / key
        tables = [pandas.read_parquet(run / "probes" / f"step{step}.parquet") for step in (0, 10)]
        assert [condition["K_before"], condition["K_after"]] == pytest.approx([direct_k(t) for t in tables])
        assert len(tables[0]) == 14 * 15
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        said = {line["step"]: line["eval/K"] for line in lines if "eval/K" in line}
        assert list(said) == [0, 10]
        assert said[10] == pytest.approx(condition["K_after"], rel=1e-9)
        losses = pandas.read_parquet(run / "losses" / "step10.parquet")
        first = pandas.read_parquet(run / "losses" / "step0.parquet")
        for label, rise in condition["loss_rise"].items():
            means = [t[t.label == label].loss.mean() for t in (first, losses)]
            assert rise["value"] == pytest.approx(100 * (means[1] - means[0]) / means[0])
        assert set(condition["loss_rise"]) == {"general", "science"}


def test_the_conditions_start_where_they_should(report):
    k = {key: condition["K_before"] for key, condition in report["conditions"].items()}
    assert k["last"] == k["last_control"]
    assert len({k["early"], k["middle"], k["last"], k["last_q1"], k["last_q2"]}) == 5
    steps = [r["checkpoint"]["step"] for r in report["entropy"][0]]
    assert steps == [2, 4, 6]
    entropies = dict(zip(steps, (r["knowledge_entropy"] for r in report["entropy"][0])))
    starts = {"early": 2, "middle": 4, "last": 6, "last_q1": 6, "last_q2": 6, "last_control": 6}
    for key, condition in report["conditions"].items():
        assert condition["start"] == starts[key] and condition["entropy"] == entropies[starts[key]]


def test_only_the_control_is_without_injection(report):
    for key, condition in report["conditions"].items():
        assert condition["injections"] == ([] if key == "last_control" else list(range(1, 11)))


def test_resuscitated_runs_are_also_held_against_the_original_weights(miniature, report):
    """The original weights of both are those that `last` started from."""
    folder, *_ = miniature
    for key, condition in report["conditions"].items():
        assert (condition["A_against_original"] is not None) == (key in ("last_q1", "last_q2"))
    k = report["conditions"]["last"]["K_before"]
    for key in ("last_q1", "last_q2"):
        after = report["conditions"][key]["K_after"]
        assert report["conditions"][key]["A_against_original"]["value"] == pytest.approx(100 * (after - k) / abs(k))
    step = folder / "pretrain/step6-unsharded"
    one, two = (
        table_of(load_multipliers(step / f"resuscitation_ratio0.5_amplifying{q}.safetensors").values)
        for q in ("1.0", "2.0")
    )
    changed = one != 1
    assert torch.allclose(two[changed], 2 * one[changed]) and np.isclose(changed.float().mean(), 0.5)


def test_the_manifest_of_the_miniature_says_what_was_run(miniature, report):
    folder, *_ = miniature
    manifest = json.loads((folder / "demo.json").read_text())
    assert len(manifest["stages"]) == 13 and len({s["output"] for s in manifest["stages"]}) == 13
    assert all(s["peak_memory_mib"] == 1.0 and s["seconds"] >= 0 for s in manifest["stages"])
    assert manifest["environment"] == report["environment"]


def test_published_is_refused_before_a_folder_is_named(tmp_path):
    with pytest.raises(ConfigurationError, match="--published"):
        demo.main(["--published", str(tmp_path / "absent")])
