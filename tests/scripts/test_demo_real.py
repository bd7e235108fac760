"""The demo on a real model, in this process, with a tiny Llama in its place: its stages, and what its report states."""

from __future__ import annotations

import functools
import importlib
import json
import os
import types
from pathlib import Path

import pandas
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from analysis import estimates
from olmo.exceptions import exit_status
from scripts import demo_real, prepare_demo_text
from scripts.prepare import demo_sources, demo_text, stages
from scripts.prepare.demo_text import train_tokenizer

command = functools.partial(exit_status, demo_real.main)
ROOT = Path(__file__).resolve().parents[2]
CONDITIONS = ("unedited", "q1", "q2", "control")


def write_model(folder: Path) -> None:
    """A Llama of two layers with a tokenizer of real text, whose documents end with its token 0."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=600, eos_token_id=0, pad_token_id=1, bos_token_id=0))
    model.save_pretrained(folder)
    train_tokenizer(demo_sources.household(demo_sources.package_root()), 600).save(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def miniature(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[str]], str]:
    """(folder of a finished demo, the commands that ran, what a second visit ran)."""
    place = tmp_path_factory.mktemp("miniature")
    write_model(place / "model")
    ran: list[list[str]] = []
    status: dict[int, int] = {}

    def run(line: list[str]) -> types.SimpleNamespace:
        _, _, module, *arguments = line
        ran.append([module, *arguments])
        status[len(ran)] = exit_status(importlib.import_module(module).main, arguments)
        return types.SimpleNamespace(pid=len(ran))

    def prepare(argv: list[str]) -> None:
        settings = demo_text.Settings(None, 256, 0, "test", tokenizer=str(place / "model"))
        few = [s for s in demo_sources.SOURCES if s.name in ("piqa, the rest", "openbookqa test")]
        demo_text.prepare(demo_sources.package_root(), place / "demo" / "text", settings, few)

    def wait4(number: int, options: int) -> tuple[int, int, types.SimpleNamespace]:
        return number, status[number] << 8, types.SimpleNamespace(ru_maxrss=2**20)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(stages, "subprocess", types.SimpleNamespace(Popen=run))
        code = os.waitstatus_to_exitcode
        patch.setattr(stages, "os", types.SimpleNamespace(wait4=wait4, waitstatus_to_exitcode=code))
        patch.setattr(demo_real, "KNOWLEDGE", {"paraphrase": 2, "once": 10})
        patch.setattr(demo_real, "LONGEST", 230)
        patch.setattr(demo_real, "INSTANCES", 8)
        patch.setattr(prepare_demo_text, "main", prepare)
        patch.setattr(demo_sources, "evaluation_texts", lambda root: [])  # of downstream tasks, which this demo lacks
        patch.setattr(estimates, "RESAMPLES", 200)
        patch.setattr("analysis.figures.acquisition.save_acquisition", lambda result, folder: None)
        arguments = ["--output", str(place / "demo"), "--model", str(place / "model"), "--seed", "1"]
        assert command(arguments) == 0
        first = len(ran)
        assert command(arguments) == 0
    assert len(ran) == first, "finished stages are not repeated"
    return place / "demo", ran, (place / "demo/report/report.md").read_text("utf-8")


def test_the_stages_are_those_of_the_study(miniature: tuple[Path, list[list[str]], str]) -> None:
    _, ran, _ = miniature
    assert [line[0] for line in ran] == [
        "scripts.prepare_demo_text",
        "scripts.make_fictional_knowledge",
        "analysis.entropy",
        *["analysis.change_parameters"] * 2,
        *["scripts.train"] * 4,
        "analysis.acquisition",
    ]


def test_every_condition_has_its_start_its_data_and_its_injections(
    miniature: tuple[Path, list[list[str]], str],
) -> None:
    folder, *_ = miniature
    starts = {}
    for name in CONDITIONS:
        lines = [json.loads(line) for line in (folder / "learning" / name / "metrics.jsonl").open()]
        evaluated = [line for line in lines if "eval/K" in line]
        assert [line["step"] for line in evaluated] == [0, demo_real.STEPS]
        starts[name] = evaluated[0]["eval/K"]
        injected = folder / "learning" / name / "injections.jsonl"
        rounds = {json.loads(line)["step"] for line in injected.open()} if injected.is_file() else set()
        assert len(rounds) == (0 if name == "control" else 10)
    assert starts["unedited"] == starts["control"] and len(set(starts.values())) == 3


def test_the_report_states_what_the_runs_measured(miniature: tuple[Path, list[list[str]], str]) -> None:
    folder, _, report = miniature
    found = json.loads((folder / "entropy/knowledge_entropy.json").read_text())
    assert f"H = {found['knowledge_entropy']:.3f}, standard error {found['standard_error']:.3f}" in report
    ends = []
    for name in CONDITIONS:
        table = pandas.read_parquet(folder / "learning" / name / "probes" / f"step{demo_real.STEPS}.parquet")
        of_kind = table[(table.setting == "once") & (table.kind == "semantic")]
        ends.append(f"{of_kind.mean_log_prob.mean():.3f}")
    [row] = [line for line in report.splitlines() if line.startswith("| once_semantic |")]
    assert row.split(" | ")[2:] == [*ends[:-1], f"{ends[-1]} |"]
    assert f"| {' | '.join(['', 'before', *CONDITIONS])} |" in report
    last = report.splitlines()[-1]
    assert last.startswith("| all | ") and last.endswith(" | 1.00 |")  # the peak of every stage here
    acquired = json.loads((folder / "report/acquisition.json").read_text())
    assert [run["run"] for run in acquired["runs"]] == list(CONDITIONS)


@pytest.mark.parametrize("arguments", [["--seed", "-1"], ["--published", "absent"]])
def test_what_is_wrong_is_one_line_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command(arguments) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and arguments[0] in said
    assert list(tmp_path.iterdir()) == []
