"""What a run writes: metrics, tables, what a restart drops, and progress lines."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest

from olmo import reporting
from olmo.config import OptimizerConfig, OptimizerType, TrainConfig, WandbConfig, load
from olmo.eval.evaluators import Evaluation
from olmo.eval.probes import ProbeTable
from olmo.exceptions import ConfigurationError
from olmo.knowledge.entries import Probe
from olmo.knowledge.plan import Text
from olmo.reporting import Progress, Reporter, clock, environment, log
from tests.reference import tiny_config


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        model=tiny_config(), optimizer=OptimizerConfig(OptimizerType.adamw), save_folder=str(tmp_path / "run")
    )


@pytest.fixture(autouse=True)
def no_handler_is_left() -> Iterator[None]:
    before = list(log.handlers)
    yield
    assert log.handlers == before


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def an_evaluation() -> Evaluation:
    probes = [Probe("once", "semantic", 0, 1, (5, 6, 7), 1), Probe("once", "semantic", 2, 0, (5, 6), 1)]
    table = ProbeTable(
        probes,
        tokens=np.array([2, 1]),
        sum_log_prob=np.array([-4.0, -3.0]),
        first_log_prob=np.array([-1.0, -3.0]),
        first_rank=np.array([0, 9]),
        exact_match=np.array([True, False]),
    )
    losses = {"general": np.array([1.5, 2.5]), "science": np.array([3.0])}
    return Evaluation({"eval/K": -2.5, "eval/general/CrossEntropyLoss": 2.0}, table, losses)


# --- a run's folder ----------------------------------------------------------------------------------------------


def test_a_run_leaves_config_environment_and_metrics(config: TrainConfig) -> None:
    reporter = Reporter(config, active=True, resume_step=None)
    folder = Path(config.save_folder)
    reporter.metrics(1, {"train/CrossEntropyLoss": 4.5, "optim/total_grad_norm": 0.25})
    # Readers see every line at once, not only when the run ends.
    assert metrics(folder) == [{"step": 1, "train/CrossEntropyLoss": 4.5, "optim/total_grad_norm": 0.25}]
    log.info("a line for the log file")
    reporter.close()
    assert "a line for the log file" in (folder / "train.log").read_text()
    assert asdict(load(folder / "config.yaml")) == asdict(config)
    about, now = json.loads((folder / "environment.json").read_text()), environment()
    assert about.pop("git") and now.pop("git")
    assert about == now
    assert set(about["versions"]) >= {"torch", "numpy", "transformers"}


def test_other_ranks_write_nothing(config: TrainConfig) -> None:
    reporter = Reporter(config, active=False, resume_step=None)
    reporter.metrics(1, {"a": 1.0})
    reporter.injection(1, 1, [(0, Text("a", (1, 2)))])
    reporter.evaluation(1, an_evaluation())
    reporter.close()
    assert not Path(config.save_folder).exists()


def test_an_evaluation_is_metrics_and_tables(config: TrainConfig) -> None:
    reporter = Reporter(config, active=True, resume_step=None)
    reporter.evaluation(30, an_evaluation())
    reporter.close()
    folder = Path(config.save_folder)
    assert metrics(folder) == [{"step": 30, "eval/K": -2.5, "eval/general/CrossEntropyLoss": 2.0}]
    probes = pyarrow.parquet.read_table(folder / "probes/step30.parquet").to_pydict()
    assert probes == {
        "step": [30, 30],
        "setting": ["once", "once"],
        "entry": [0, 2],
        "kind": ["semantic", "semantic"],
        "index": [1, 0],
        "tokens": [2, 1],
        "sum_log_prob": [-4.0, -3.0],
        "mean_log_prob": [-2.0, -3.0],
        "first_token_log_prob": [-1.0, -3.0],
        "first_token_rank": [0, 9],
        "exact_match": [True, False],
    }
    losses = pyarrow.parquet.read_table(folder / "losses/step30.parquet").to_pydict()
    assert losses == {
        "step": [30, 30, 30],
        "label": ["general", "general", "science"],
        "instance": [0, 1, 0],
        "loss": [1.5, 2.5, 3.0],
    }
    assert not list(folder.rglob("*.partial"))


def test_an_evaluation_of_other_weights_stands_under_its_own_name(config: TrainConfig) -> None:
    reporter = Reporter(config, active=True, resume_step=None)
    reporter.evaluation(0, an_evaluation(), prefix="original")
    reporter.evaluation(0, an_evaluation())
    reporter.close()
    folder = Path(config.save_folder)
    assert sorted(path.name for path in (folder / "probes").iterdir()) == ["original.parquet", "step0.parquet"]
    assert [sorted(line) for line in metrics(folder)] == [
        ["original/eval/K", "original/eval/general/CrossEntropyLoss", "step"],
        ["eval/K", "eval/general/CrossEntropyLoss", "step"],
    ]


def run_to(config: TrainConfig, steps: list[int], resume_step: int | None = None) -> None:
    reporter = Reporter(config, active=True, resume_step=resume_step)
    for step in steps:
        reporter.metrics(step, {"train/CrossEntropyLoss": float(step)})
        reporter.injection(step, step % 3, [(0, Text(f"once/{step}", (1, 2))), (5, Text("map/1", (3,)))])
        reporter.evaluation(step, an_evaluation())
    reporter.close()


def test_a_resumed_run_reads_like_an_unbroken_one(config: TrainConfig, tmp_path: Path) -> None:
    folder = Path(config.save_folder)
    run_to(config, [1, 2, 3, 4])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "train/Cross')  # killed while writing
    with (folder / "injections.jsonl").open("a") as file:
        file.write('{"step": 5, "rou')
    run_to(config, [3, 4, 5], resume_step=2)
    resumed = [(folder / name).read_text() for name in ("metrics.jsonl", "injections.jsonl")]
    tables = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.parquet"))

    config.save_folder = str(tmp_path / "unbroken")
    run_to(config, [1, 2, 3, 4, 5])
    unbroken = Path(config.save_folder)
    assert resumed == [(unbroken / name).read_text() for name in ("metrics.jsonl", "injections.jsonl")]
    assert tables == sorted(str(path.relative_to(unbroken)) for path in unbroken.rglob("*.parquet"))


def test_an_injection_is_one_line(config: TrainConfig) -> None:
    run_to(config, [7])
    assert (Path(config.save_folder) / "injections.jsonl").read_text() == (
        '{"step": 7, "round": 1, "tokens": 3, "texts": [{"entry": "once/7", "row": 0, "tokens": 2}, '
        '{"entry": "map/1", "row": 5, "tokens": 1}]}\n'
    )


def test_a_torn_line_of_a_kept_step_is_dropped(config: TrainConfig) -> None:
    run_to(config, [1])
    path = Path(config.save_folder) / "metrics.jsonl"
    whole = path.read_text()
    path.write_text(whole + '{"step": 2}')
    run_to(config, [], resume_step=2)
    assert path.read_text() == whole


def test_what_lies_beyond_the_restart_is_gone_before_anything_new_is_written(config: TrainConfig) -> None:
    run_to(config, [1, 2, 30])
    Reporter(config, active=True, resume_step=2).close()
    folder = Path(config.save_folder)
    assert {line["step"] for line in metrics(folder)} == {1, 2}
    assert sorted(path.name for path in (folder / "probes").iterdir()) == ["step1.parquet", "step2.parquet"]
    assert sorted(path.name for path in (folder / "losses").iterdir()) == ["step1.parquet", "step2.parquet"]


def test_a_new_run_starts_from_nothing(config: TrainConfig) -> None:
    run_to(config, [1, 2])
    run_to(config, [7])
    folder = Path(config.save_folder)
    assert {line["step"] for line in metrics(folder)} == {7}
    assert (folder / "injections.jsonl").read_text().startswith('{"step": 7, ')
    assert [path.name for path in (folder / "probes").iterdir()] == ["step7.parquet"]


def test_wandb_that_is_not_installed_is_a_configuration_error(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigurationError, match="wandb: is configured but not installed; pip install wandb"):
        reporting._start_wandb(TrainConfig(wandb=WandbConfig()), Path("wandb-id.txt"), resumed=False)


def test_the_evaluations_that_matter_are_told(config: TrainConfig, caplog: pytest.LogCaptureFixture) -> None:
    reporter = Reporter(config, active=True, resume_step=None)
    found = an_evaluation()
    told = (
        *("once_semantic/log_probability", "downstream/sciq_acc", "K_once", "memories/knowledge_entropy"),
        *("general/CrossEntropyLoss", "K"),
    )
    silent = (
        *("once_semantic/CrossEntropyLoss", "downstream/sciq_chance", "memories/standard_error", "memories/layer_1"),
        *("general/Perplexity", "once_semantic/exact_match"),
    )
    found.metrics = {f"eval/{name}": -2.5 for name in (*told, *silent)}
    with caplog.at_level(logging.INFO, logger="olmo"):
        reporter.evaluation(30, found)
    reporter.close()
    first, *values = [record.message.strip() for record in caplog.records]
    assert first == "step 30: evaluation" and values == [f"eval/{name} = -2.5000" for name in told]


CHANGES: list[tuple[list[str], list[str]]] = [
    ([], []),
    (["max_duration=9", "save_interval=3", "eval_interval=7", "run_name=b", "save_overwrite=true", "stop_at=5"], []),
    (["data.num_workers=3", "data.pin_memory=true", "model.flash_attention=true", "time_limit=60"], []),
    (["load_path=elsewhere", "model.resuscitation=edit.safetensors"], ["load_path", "model.resuscitation"]),
    (["optimizer.learning_rate=0.5", "scheduler.t_warmup=7"], ["optimizer.learning_rate", "scheduler.t_warmup"]),
    (["data.paths=[a.npy,c.npy]", "seed=8"], ["seed", "data.paths"]),
    (["injection={once: a.json}", "inject_interval=2"], ["inject_interval", "injection"]),
    (["tokenizer.identifier=other"], ["tokenizer.identifier"]),
]


@pytest.mark.parametrize(("overrides", "named"), CHANGES)
def test_a_run_that_goes_on_with_other_settings_says_which(
    config: TrainConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture, overrides: list[str], named: list[str]
) -> None:
    config.save(tmp_path / "before.yaml")
    folder = [f"--save_folder={config.save_folder}", "--data.paths=[a.npy,b.npy]"]
    Reporter(load(tmp_path / "before.yaml", folder), active=True, resume_step=None).close()
    assert not caplog.messages
    Reporter(load(tmp_path / "before.yaml", [*folder, *(f"--{o}" for o in overrides)]), True, resume_step=4).close()
    wanted = (
        f"save_folder: {config.save_folder} holds a run last started with another {', '.join(named)}; it goes on from "
        "step 4 all the same, another save_folder begins a new one"
    )
    assert caplog.messages == ([wanted] if named else [])
    told = (Path(config.save_folder) / "train.log").read_text()
    assert (wanted in told) == bool(named)


def test_nothing_is_said_of_settings_where_nothing_goes_on_or_nothing_is_known(
    config: TrainConfig, caplog: pytest.LogCaptureFixture
) -> None:
    Reporter(config, active=True, resume_step=None).close()
    config.seed += 1
    Reporter(config, active=True, resume_step=None).close()  # a new run
    config.seed += 1
    Reporter(config, active=False, resume_step=4).close()  # of another rank
    for text in ("seed: [", "a_key_of_another_version: 1"):
        (Path(config.save_folder) / "config.yaml").write_text(text)
        Reporter(config, active=True, resume_step=4).close()
    assert not caplog.messages


# --- progress ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0:00"), (9.6, "0:10"), (59.7, "1:00"), (3599, "59:59"), (3600, "1:00:00"), (90061, "25:01:01")],
)
def test_a_clock(seconds: float, shown: str) -> None:
    assert clock(seconds) == shown


@pytest.mark.parametrize("seconds", [float("inf"), float("nan")])
def test_a_clock_that_does_not_know(seconds: float) -> None:
    assert clock(seconds) == "?"


class Time:
    """A clock that the test winds."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def hands(monkeypatch: pytest.MonkeyPatch) -> Time:
    made = Time()
    monkeypatch.setattr(time, "monotonic", made.monotonic)
    return made


def work(hands: Time, seconds: float, pieces: int, show: bool = True) -> None:
    with Progress("measuring", pieces, "instances", show=show) as progress:
        for _ in range(pieces):
            hands.now += seconds / pieces
            progress.advance()


def test_progress_in_a_log_is_a_plain_line_every_ten_seconds(hands: Time, capsys: pytest.CaptureFixture[str]) -> None:
    work(hands, 40.0, 80)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "measuring: 20/80 instances, 2.0/s, 0:30 left",
        "measuring: 40/80 instances, 2.0/s, 0:20 left",
        "measuring: 60/80 instances, 2.0/s, 0:10 left",
        "measuring: 80/80 instances, 2.0/s, 0:00 left",
    ]


def test_progress_on_a_terminal_rewrites_one_line_and_clears_it(
    hands: Time, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    work(hands, 4.0, 8)
    shown = capsys.readouterr().err
    assert "\n" not in shown and shown.endswith("\r\x1b[K")
    assert shown.split("\r\x1b[K")[1] == "measuring: 2/8 instances, 2.0/s, 0:03 left"


@pytest.mark.parametrize("terminal", [True, False])
def test_short_or_hidden_work_shows_nothing(
    hands: Time, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    work(hands, 0.9, 8)
    work(hands, 90.0, 8, show=False)
    assert capsys.readouterr().err == ""
