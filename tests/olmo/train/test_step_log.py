"""What a run logs of its steps, to metrics.jsonl, the console and Weights & Biases."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from olmo.distributed import Ranks
from olmo.exceptions import ConfigurationError, MissingPackage
from olmo.train import Trainer
from tests.running import (
    BATCH,
    CPU,
    LENGTH,
    configure,
    series,
    train,
    write_world,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def world(folder: Path) -> Path:
    """The configuration with knowledge and evaluators."""
    return folder / "config.yaml"


@pytest.fixture(scope="module")
def plain(folder: Path) -> Path:
    """The configuration with neither: the least that trains."""
    return folder / "plain.yaml"


def test_metrics_are_one_object_a_line(world: Path, tmp_path: Path) -> None:
    train(world, tmp_path, "--eval_on_load", "--stop_at=3")
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    kinds = [(line["step"], "eval/K" in line) for line in lines]
    assert kinds == [(0, True), (1, False), (2, False), (3, False), (3, True)]
    assert all(isinstance(value, (int, float)) for line in lines for value in line.values())
    for line in lines[1:4]:
        step, loss = line["step"], line["train/CrossEntropyLoss"]
        assert line["train/Perplexity"] == pytest.approx(math.exp(loss))
        assert line["throughput/total_tokens"] == step * BATCH * LENGTH
        assert line["optim/total_grad_norm"] > 0
        # There is no speed before the first step has ended.
        speed = line.get("throughput/device/tokens_per_second")
        assert speed is None if step == 1 else speed > 0
        if step > 1:
            assert speed == pytest.approx(line["throughput/device/batches_per_second"] * BATCH * LENGTH)
    # Wheels from PyPI do not name the build, of which torch itself does: +cu132.
    about = json.loads((tmp_path / "environment.json").read_text())
    assert about["versions"]["torch"] in (torch.__version__, torch.__version__.partition("+")[0])
    log = (tmp_path / "train.log").read_text()
    assert "step 2/3: loss" in log and "steps 1 to 3, 1,536 tokens per step" in log
    assert "step 3/3: loss" in log and "  K: paraphrase -" in log


def test_only_steps_that_log_or_save_reduce_and_read(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reduced: list[int] = []
    monkeypatch.setattr(Ranks, "sum_tensor", lambda self, value: reduced.append(len(value)) or value)
    train(plain, tmp_path, "--stop_at=7", "--console_log_interval=3", "--save_interval=5")
    assert list(series(tmp_path)) == [3, 6, 7]
    assert reduced == [3] * 5  # cross-entropy, z-loss and auxiliary loss, when steps 3, 6 and 7 log, and 5 and 7 save


def test_injections_are_reported_whatever_the_log_interval(
    world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = train(world, tmp_path, "--evaluators=[]", "--console_log_interval=5")
    rounds = [len(texts) for texts in trainer.plan.rounds] if trainer.plan else []
    tokens = [sum(len(t.input_ids) for t in texts) for texts in trainer.plan.rounds] if trainer.plan else []
    assert series(tmp_path).keys() == {2, 4, 5, 6, 7}
    assert series(tmp_path, "injection/round") == {2: 1, 4: 2, 6: 3}
    assert series(tmp_path, "injection/texts") == dict(zip((2, 4, 6), rounds))
    assert series(tmp_path, "injection/tokens") == dict(zip((2, 4, 6), tokens))
    assert "step 4: injection round 2, 4 texts" in caplog.messages
    assert not any("step 4/7" in message for message in caplog.messages)  # the console keeps to its interval


# --- Weights & Biases ---


def test_wandb_gets_the_metrics(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[tuple[int, dict[str, float]]] = []

    class Fake:
        id, offline = "abc", True

        def init(self, **settings: Any) -> Fake:
            assert settings["project"] == "demo" and settings["name"] == "tiny" and settings["dir"] == str(tmp_path)
            json.dumps(settings["config"])
            return self

        def log(self, values: dict[str, float], step: int) -> None:
            logged.append((step, values))

        def finish(self) -> None:
            logged.append((-1, {}))

    monkeypatch.setitem(__import__("sys").modules, "wandb", Fake())
    watched = ("--wandb.project=demo", "--wandb.log_interval=2", "--optimizer.metrics_log_interval=4")
    train(plain, tmp_path, *watched, "--stop_at=4", "--console_log_interval=2")
    assert [step for step, _ in logged] == [2, 4, 4, -1]
    assert logged[0][1]["train/CrossEntropyLoss"] == series(tmp_path)[2]
    # What OLMo logs of every weight, which would make metrics.jsonl large.
    parts = ("grad", "param", "exp_avg", "exp_avg_sq")
    weights = [f"optim/{part}/transformer.wte.weight.{m}" for part in parts for m in ("min", "max", "avg", "norm")]
    assert set(weights) < set(logged[1][1]) and not set(weights) & set(logged[0][1])
    assert "optim/param/" not in (tmp_path / "metrics.jsonl").read_text()


def test_metrics_of_weights_need_something_that_shows_them(
    plain: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(plain, tmp_path, "--optimizer.metrics_log_interval=1", "--stop_at=1")
    assert (
        "optimizer.metrics_log_interval has no effect without a section wandb, or tensorboard: true" in caplog.messages
    )


def test_wandb_that_cannot_start_says_what_helps(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Fake:
        class Error(Exception):
            pass

        def init(self, **_: Any) -> None:
            raise self.Error("Timed out while retrying\nConsider this\nor that")

    monkeypatch.setitem(__import__("sys").modules, "wandb", Fake())
    said = r"^wandb: Timed out while retrying \(wandb login .* WANDB_MODE=offline .*\)$"
    with pytest.raises(ConfigurationError, match=said):
        Trainer(configure(plain, tmp_path, "--wandb.project=demo"), CPU, Ranks())


def test_wandb_that_is_not_installed_is_named(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(MissingPackage, match=r"^wandb: wandb is not installed: pip install '.*\[wandb\]'$"):
        Trainer(configure(plain, tmp_path, "--wandb.project=demo"), CPU, Ranks())


def test_wandb_offline(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="pip install wandb to run its test")
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb-home"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    train(plain, tmp_path / "run", "--wandb.project=demo", "--stop_at=2")
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
