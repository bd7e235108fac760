"""What a run writes: metrics, tables, and what a restart drops."""

from __future__ import annotations

import json
import logging
import os
import shlex
import signal
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch

from olmo.config import OptimizerConfig, OptimizerType, TrainConfig, WandbConfig, load
from olmo.eval.evaluators import Evaluation
from olmo.eval.probes import ProbeTable
from olmo.exceptions import ConfigurationError
from olmo.knowledge.entries import Probe
from olmo.knowledge.plan import Text
from olmo.report import run_folder as reporting
from olmo.report.run_folder import Reporter, environment, log
from tests.olmo.train.test_restart import in_a_fork
from tests.reference import tiny_config
from tests.running import train, write_world


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
    config.data.seed = 17
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
    assert now.items() <= about.items()
    assert set(about["versions"]) >= {"torch", "numpy", "transformers"}
    assert about["host"] == socket.gethostname() and about["gpus"] == [] and about["cuda"] == torch.version.cuda
    assert (about["seed"], about["data_seed"]) == (6198, 17) and about["world_size"] == 1
    assert about["resumed_from"] is None and about["earlier"] == []
    assert about["working_directory"] == os.getcwd() and shlex.split(about["command"]) == sys.orig_argv
    assert abs(datetime.fromisoformat(about["started"]).timestamp() - time.time()) < 60


def test_every_start_of_a_run_stays_on_record(config: TrainConfig) -> None:
    for step, seed in ((None, 1), (5, 2), (7, 3)):
        Reporter(replace(config, seed=seed), active=True, resume_step=step).close()
    path = Path(config.save_folder) / "environment.json"
    last = json.loads(path.read_text())
    starts = [*last.pop("earlier"), last]
    assert [(start["resumed_from"], start["seed"]) for start in starts] == [(None, 1), (5, 2), (7, 3)]
    assert len({frozenset(start) for start in starts}) == 1  # the same keys
    Reporter(config, active=True, resume_step=None).close()  # a run that replaces it
    assert json.loads(path.read_text())["earlier"] == []


def test_a_record_of_an_older_version_is_kept_where_it_is_whole(config: TrainConfig) -> None:
    Path(config.save_folder).mkdir()
    path = Path(config.save_folder) / "environment.json"
    for record, kept in (('{"python": "3.10.1"}', [{"python": "3.10.1"}]), ('{"python": "3.1', [])):
        path.write_text(record)
        Reporter(config, active=True, resume_step=5).close()
        assert json.loads(path.read_text())["earlier"] == kept


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
    (["save_interval=3", "eval_interval=7", "run_name=b", "save_overwrite=true", "stop_at=5"], []),
    (["data.num_workers=3", "data.pin_memory=true", "model.flash_attention=true", "time_limit=60"], []),
    (["load_path=elsewhere", "model.resuscitation=edit.safetensors"], ["load_path", "model.resuscitation"]),
    (["optimizer.learning_rate=0.5", "scheduler.t_warmup=7"], ["optimizer.learning_rate", "scheduler.t_warmup"]),
    (["data.paths=[a.npy,c.npy]", "seed=8"], ["seed", "data.paths"]),
    (["injection={once: a.json}", "inject_interval=2"], ["inject_interval", "injection"]),
    (["tokenizer.identifier=other", "max_duration=9"], ["tokenizer.identifier", "max_duration"]),
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


# --- TensorBoard ---


def events(folder: Path) -> list[tuple[str, int, float]]:
    """Name, step and value of all that TensorBoard shows, as its own reader has it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    names = reader.Tags()["scalars"]
    return sorted((name, event.step, event.value) for name in names for event in reader.Scalars(name))


def as_events(folder: Path) -> list[tuple[str, int, float]]:
    """The same from metrics.jsonl, in float32 as TensorBoard has it."""
    lines = metrics(folder)
    return sorted(
        (k, int(line["step"]), float(np.float32(v))) for line in lines for k, v in line.items() if k != "step"
    )


@pytest.fixture
def board(config: TrainConfig) -> TrainConfig:
    return replace(config, tensorboard=True)


def test_tensorboard_shows_what_metrics_has(board: TrainConfig) -> None:
    run_to(board, [1, 2, 3])
    folder = Path(board.save_folder)
    assert events(folder) == as_events(folder) and len(events(folder)) == 9
    run_to(board, [7])  # a run that replaces it
    assert events(folder) == as_events(folder) and {step for _, step, _ in events(folder)} == {7}


def test_tensorboard_shows_no_step_twice_after_a_kill(board: TrainConfig) -> None:
    def work() -> None:
        reporter = Reporter(board, active=True, resume_step=None)
        for step in range(1, 9):
            reporter.metrics(step, {"train/CrossEntropyLoss": float(step), "learning rate": 0.1})
            if step == 4:
                reporter.on_disk()
        time.sleep(0.1)  # while events are being written, or not
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_a_fork(work) == -signal.SIGKILL
    folder = Path(board.save_folder)
    (file,) = (folder / "tensorboard").iterdir()
    assert [e for e in events(folder) if e[1] <= 4] == [e for e in as_events(folder) if e[1] <= 4] != []
    # It stands last by its name, as if the clock of the first machine were ahead.
    file = file.rename(file.with_name("events.out.tfevents.9999999999.far.1.0"))
    for torn in (b"\x20\0\0", b"\x20\0\0\0\0\0\0\0\1\2\3\4torn", bytes(20)):
        with file.open("ab") as end:
            end.write(torn)
        run_to(board, [5, 6], resume_step=4)
        assert events(folder) == as_events(folder) and {step for _, step, _ in events(folder)} == set(range(1, 7))


def test_a_run_shows_the_same_in_tensorboard_and_goes_on_in_it(board: TrainConfig, tmp_path: Path) -> None:
    world = write_world(tmp_path / "world")
    settings = ("--tensorboard", "--save_interval=2", "--eval_interval=2")
    run = tmp_path / "own"
    train(world / "config.yaml", run, *settings, "--stop_after=3")
    train(world / "config.yaml", run, *settings, "--try_load_latest_save", "--console_log_interval=3")
    assert events(run) == as_events(run)
    assert {step for name, step, _ in events(run) if name == "eval/K"} == {2, 3, 4, 6, 7}
    train(world / "config.yaml", run, "--dry_run", "--save_overwrite", *settings)
    assert events(run) == as_events(run)


@pytest.mark.parametrize(("active", "dry_run"), [(False, False), (True, True)])
def test_other_ranks_and_a_dry_run_write_no_events(board: TrainConfig, active: bool, dry_run: bool) -> None:
    reporter = Reporter(replace(board, dry_run=dry_run), active=active, resume_step=None)
    reporter.close()
    assert not Path(board.save_folder).exists()


def test_tensorboard_that_is_not_installed_is_a_configuration_error(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    run_to(config, [1])
    with pytest.raises(
        ConfigurationError, match="tensorboard: is asked for but not installed; pip install tensorboard"
    ):
        Reporter(replace(config, tensorboard=True), active=True, resume_step=None)
    assert metrics(Path(config.save_folder))  # the older run is still there
