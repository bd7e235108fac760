"""Held-out loss against transformers' own loss, an instance at a time; and the evaluators around it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from olmo.config import DataConfig, EvaluatorConfig, TrainConfig
from olmo.data.sources import TokenFiles
from olmo.distributed import Ranks
from olmo.eval.evaluators import Evaluators
from olmo.eval.perplexity import instance_losses
from olmo.model import OLMo
from tests.reference import tiny_config, to_transformers

CPU = torch.device("cpu")
LENGTH, INSTANCES = 16, 11


@pytest.fixture(scope="module")
def model() -> OLMo:
    torch.manual_seed(5)
    return OLMo(tiny_config(max_sequence_length=LENGTH)).eval()


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokens") / "heldout.npy"
    ids = np.random.default_rng(1).integers(0, 128, (INSTANCES, LENGTH)).astype("<u2")
    path.write_bytes(ids.tobytes())
    return path


@pytest.fixture(scope="module")
def direct(model: OLMo, tokens: Path) -> np.ndarray:
    reference = to_transformers(model).double()
    rows = np.fromfile(tokens, "<u2").reshape(INSTANCES, LENGTH).astype(np.int64)
    with torch.no_grad():
        ids = [torch.from_numpy(row)[None] for row in rows]
        return np.array([reference(row, labels=row).loss.item() for row in ids])


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_losses_are_transformers_own(model: OLMo, tokens: Path, direct: np.ndarray, batch_size: int) -> None:
    done: list[int] = []
    losses = instance_losses(model, TokenFiles([tokens], LENGTH), batch_size, CPU, Ranks(), progress=done.append)
    assert losses.dtype == np.float64 and sum(done) == INSTANCES
    np.testing.assert_allclose(losses, direct, rtol=0, atol=1e-5)


@pytest.mark.parametrize("limit", [1, 5, INSTANCES, 1000])
def test_a_limit_takes_the_first_instances(model: OLMo, tokens: Path, direct: np.ndarray, limit: int) -> None:
    losses = instance_losses(model, TokenFiles([tokens], LENGTH), 4, CPU, Ranks(), limit)
    assert len(losses) == min(limit, INSTANCES)
    np.testing.assert_allclose(losses, direct[:limit], rtol=0, atol=1e-5)


@pytest.mark.parametrize("world_size", [2, 3, 20])
def test_ranks_share_the_instances_out(model: OLMo, tokens: Path, direct: np.ndarray, world_size: int) -> None:
    class Alone(Ranks):
        """A rank that adds up nothing: its own part of the result."""

        def sum(self, values: np.ndarray) -> np.ndarray:
            return values

    parts = [
        instance_losses(model, TokenFiles([tokens], LENGTH), 2, CPU, Alone(rank, world_size))
        for rank in range(world_size)
    ]
    assert ((np.array(parts) != 0).sum(0) == 1).all(), "every instance is scored exactly once"
    np.testing.assert_allclose(np.sum(parts, axis=0), direct, rtol=0, atol=1e-5)


def config(tokens: Path, **overrides: int) -> TrainConfig:
    evaluator = EvaluatorConfig(label="heldout", data=DataConfig(paths=[str(tokens)]), **overrides)
    return TrainConfig(model=tiny_config(max_sequence_length=LENGTH), evaluators=[evaluator], device_eval_batch_size=2)


@pytest.mark.parametrize(
    ("settings", "counted"),
    [
        ({}, INSTANCES),
        ({"subset_num_batches": 2}, 4),
        ({"subset_num_batches": 2, "device_eval_batch_size": 3}, 6),
        ({"subset_num_batches": 50}, INSTANCES),
        ({"subset_num_batches": -1}, INSTANCES),
    ],
)
def test_an_evaluator_reports_mean_and_perplexity(
    model: OLMo, tokens: Path, direct: np.ndarray, settings: dict[str, int], counted: int
) -> None:
    run = config(tokens, **settings)
    result = Evaluators(run, None, CPU, Ranks()).run(model, run.evaluators)
    loss = direct[:counted].mean()
    assert len(result.losses["heldout"]) == counted and result.probes is None
    assert result.metrics["eval/heldout/CrossEntropyLoss"] == pytest.approx(loss, abs=1e-5)
    assert result.metrics["eval/heldout/Perplexity"] == pytest.approx(np.exp(loss), rel=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_is_without_dropout_and_restores_the_mode(tokens: Path, training: bool) -> None:
    torch.manual_seed(5)
    shape = tiny_config(max_sequence_length=LENGTH, residual_dropout=0.5, embedding_dropout=0.5, attention_dropout=0.5)
    model = OLMo(shape).train(training)
    run = config(tokens)
    evaluators = Evaluators(run, None, CPU, Ranks())
    first, second = evaluators.run(model, run.evaluators), evaluators.run(model, run.evaluators)
    assert first.metrics == second.metrics
    assert model.training is training


def test_only_the_chosen_evaluators_run(model: OLMo, tokens: Path, direct: np.ndarray) -> None:
    run = config(tokens)
    run.evaluators.append(EvaluatorConfig(label="often", data=DataConfig(paths=[str(tokens)]), eval_interval=10))
    run.eval_interval = 30
    evaluators = Evaluators(run, None, CPU, Ranks())
    assert [[e.label for e in evaluators.due(step)] for step in (10, 15, 30)] == [["often"], [], ["heldout", "often"]]
    result = evaluators.run(model, evaluators.due(10))
    assert set(result.metrics) == {"eval/often/CrossEntropyLoss", "eval/often/Perplexity"}
    assert list(result.losses) == ["often"]


def test_named_token_files_have_a_label_each(model: OLMo, tokens: Path, direct: np.ndarray) -> None:
    run = config(tokens)
    run.evaluators[0].data = DataConfig(datasets={"one": [str(tokens)], "two": [str(tokens), str(tokens)]})
    result = Evaluators(run, None, CPU, Ranks()).run(model, run.evaluators)
    assert {label: len(losses) for label, losses in result.losses.items()} == {
        "heldout/one": INSTANCES,
        "heldout/two": 2 * INSTANCES,
    }
    np.testing.assert_allclose(result.losses["heldout/two"], np.tile(direct, 2), rtol=0, atol=1e-5)
