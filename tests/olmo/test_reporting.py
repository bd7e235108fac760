"""What a run writes: metrics, tables, and what a restart drops."""

from __future__ import annotations

import json
import logging
import sys
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
from olmo.reporting import Reporter, environment, log
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
    with caplog.at_level(logging.INFO, logger="olmo"):
        reporter.evaluation(30, an_evaluation())
    reporter.close()
    assert [record.message.strip() for record in caplog.records] == [
        "step 30: evaluation",
        "eval/K = -2.5000",
        "eval/general/CrossEntropyLoss = 2.0000",
    ]
