"""What a run reports: files, evaluations, log lines."""

from __future__ import annotations

import json
import logging
import os
import shlex
import socket
import sys
import time
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

import pyarrow.parquet
import pytest
import torch

from olmo.config import TrainConfig, load
from olmo.console import log
from olmo.exceptions import ConfigurationError
from olmo.knowledge.plan import Text
from olmo.report.environment import environment
from olmo.report.reporter import Reporter
from tests.reporting import an_evaluation, metrics


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


def test_an_evaluation_is_a_few_short_lines_on_the_console(
    config: TrainConfig, caplog: pytest.LogCaptureFixture
) -> None:
    """Of the paper's 10 tasks and 8 kinds of probe 5 lines; metrics.jsonl has all."""
    reporter = Reporter(config, active=True, resume_step=None)
    found = an_evaluation()
    tasks = ("piqa", "hellaswag", "winogrande", "openbook_qa", "sciq", "arc_easy", "copa", "rte", "sst2")
    labels = [f"{setting}_{kind}" for setting in ("paraphrase", "once") for kind in ("memorization", "paragraph")]
    probes = {f"{label}/{name}": -2.5 for label in labels for name in ("log_probability", "CrossEntropyLoss")}
    found.metrics = {
        **{f"eval/{name}": value for name, value in probes.items()},
        **{"eval/K_paraphrase": -2.25, "eval/K_once": -2.75, "eval/K": -2.5, "eval/memories/knowledge_entropy": 211.8},
        **{"eval/general/CrossEntropyLoss": 3.25, "eval/general/Perplexity": 25.8, "eval/memories/layer_1": 7.0},
        **{f"eval/downstream/{task}_{name}": 0.5 for task in tasks for name in ("acc", "chance")},
    }
    with caplog.at_level(logging.INFO, logger="olmo"):
        reporter.evaluation(30, found)
    lines = [record.message for record in caplog.records]
    assert lines == [
        "step 30: evaluation",
        "  K: paraphrase -2.2500, once -2.7500, all -2.5000",
        "  loss: general 3.2500",
        "  accuracy: piqa_acc 0.5000, hellaswag_acc 0.5000, winogrande_acc 0.5000, openbook_qa_acc 0.5000,",
        "    sciq_acc 0.5000, arc_easy_acc 0.5000, copa_acc 0.5000, rte_acc 0.5000, sst2_acc 0.5000",
        "  knowledge entropy: memories 211.8000",
    ]
    assert metrics(Path(config.save_folder))[-1] == {"step": 30, **found.metrics}
    found.metrics = {"eval/once_paragraph/log_probability": -3.5, "eval/once_paragraph/CrossEntropyLoss": 3.5}
    with caplog.at_level(logging.INFO, logger="olmo"):
        reporter.evaluation(0, found, prefix="original")
    assert [record.message for record in caplog.records[-1:]] == ["  log-probability: once_paragraph -3.5000"]
    reporter.close()


CHANGES: list[tuple[list[str], list[str]]] = [
    ([], []),
    (["save_interval=3", "eval_interval=7", "run_name=b", "save_overwrite=true", "stop_at=5"], []),
    (["data.num_workers=3", "data.pin_memory=true", "model.flash_attention=true", "time_limit=60"], []),
    (["load_path=elsewhere", "model.resuscitation=edit.safetensors"], ["model.resuscitation", "load_path"]),
    (["optimizer.learning_rate=0.5", "scheduler.t_warmup=7"], ["optimizer.learning_rate", "scheduler.t_warmup"]),
    (["data.paths=[a.npy,c.npy]", "seed=8"], ["seed", "data.paths"]),
    (["injection={once: a.json}", "inject_interval=2"], ["inject_interval", "injection"]),
    (["tokenizer.identifier=other", "max_duration=9"], ["tokenizer.identifier", "max_duration"]),
]


@pytest.mark.parametrize(("overrides", "named"), CHANGES)
def test_a_run_that_continues_with_other_settings_must_be_allowed_to(
    config: TrainConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture, overrides: list[str], named: list[str]
) -> None:
    """The error and the warning name each with both values; what the run has written stays."""
    config.save(tmp_path / "before.yaml")
    folder = [f"--save_folder={config.save_folder}", "--data.paths=[a.npy,b.npy]"]
    Reporter(load(tmp_path / "before.yaml", folder), active=True, resume_step=None).close()
    assert not caplog.messages
    now, saved = [*folder, *(f"--{o}" for o in overrides)], (Path(config.save_folder) / "config.yaml").read_text()
    for finished in (False, True) if named else ():
        with pytest.raises(ConfigurationError) as raised:
            Reporter(load(tmp_path / "before.yaml", now), True, resume_step=4, has_steps_left=not finished)
        said = f"save_folder: {config.save_folder} holds a {'finished ' * finished}run of other settings: {named[0]} "
        assert str(raised.value).startswith(said) and all(f"{key} " in str(raised.value) for key in named)
        assert str(raised.value).endswith("or add --allow_changed_settings to continue that run with the new values")
        assert (Path(config.save_folder) / "config.yaml").read_text() == saved
    Reporter(load(tmp_path / "before.yaml", [*now, "--allow_changed_settings"]), True, resume_step=4).close()
    warnings = [message for message in caplog.messages if "given more than once" not in message]
    assert bool(warnings) == bool(named)
    assert all(message in (Path(config.save_folder) / "train.log").read_text() for message in warnings)


def test_both_values_are_named(config: TrainConfig, tmp_path: Path) -> None:
    Reporter(config, active=True, resume_step=None).close()
    config.seed, config.data.paths = 8, ["x" * 99]
    with pytest.raises(ConfigurationError, match=rf"seed 6198 -> 8, data\.paths null -> \[{'x' * 79}\.\.\.; choose"):
        Reporter(config, active=True, resume_step=4)


def test_a_run_may_be_prolonged_unless_it_has_done_more(config: TrainConfig, caplog: pytest.LogCaptureFixture) -> None:
    Reporter(config, active=True, resume_step=None).close()
    before, config.max_duration = config.max_duration, 99
    Reporter(config, active=True, resume_step=4).close()
    said = f"continues from step 4 with the new values: max_duration {before} -> 99; choose another save_folder"
    assert len(caplog.messages) == 1 and said in caplog.messages[0]
    config.max_duration = 3
    with pytest.raises(ConfigurationError, match="finished run of other settings: max_duration 99 -> 3; choose"):
        Reporter(config, active=True, resume_step=4, has_steps_left=False)


def test_settings_of_a_new_run_are_not_compared_and_unreadable_ones_are_a_warning(
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
    said = (
        f"save_folder: the settings cannot be compared with those of its last start: {config.save_folder}/config.yaml: "
    )
    assert len(caplog.messages) == 2 and all(message.startswith(said) for message in caplog.messages)
    assert "unknown key 'a_key_of_another_version'" in caplog.messages[1]
