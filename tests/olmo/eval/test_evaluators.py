"""All evaluators of a run behind one call: what is built, what is due, what is asked, and what comes out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from olmo.config import DataConfig, EvaluatorConfig, TokenizerConfig, TrainConfig, load
from olmo.distributed import Ranks
from olmo.eval.evaluators import Evaluators
from olmo.eval.probes import score_probes
from olmo.exceptions import ConfigurationError
from olmo.model import OLMo
from olmo.tokenizer import load_tokenizer
from tests.running import CPU, LENGTH, metrics, series, train, write_world


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def config(folder: Path) -> TrainConfig:
    return load(folder / "config.yaml")


@pytest.fixture(scope="module")
def model(config: TrainConfig) -> OLMo:
    torch.manual_seed(1)
    return OLMo(config.model)


def build(config: TrainConfig) -> Evaluators:
    return Evaluators(config, load_tokenizer(config.tokenizer.identifier), CPU, Ranks())


def lm(label: str, **data: object) -> EvaluatorConfig:
    return EvaluatorConfig(label, "lm", DataConfig(**data))  # type: ignore[arg-type]


def loss_by_hand(model: OLMo, path: Path, count: int) -> list[float]:
    """The mean loss of each of the first instances of a token file, one at a time."""
    rows = torch.from_numpy(np.fromfile(path, "<u2").astype(np.int64)[: count * LENGTH]).view(count, LENGTH)
    with torch.no_grad():
        return [F.cross_entropy(model.eval()(row[None])[0, :-1], row[1:]).item() for row in rows]


def test_every_kind_of_evaluator_under_its_label(folder: Path, config: TrainConfig, model: OLMo) -> None:
    found = build(config).run(model, config.evaluators)
    labels = {e.label for e in config.evaluators} - {"walk"} | {"walk/heldout", "walk/other"}
    assert labels == {
        name.split("/CrossEntropyLoss")[0].removeprefix("eval/") for name in found.metrics if "Cross" in name
    }
    assert {"eval/K", "eval/K_paraphrase", "eval/K_once"} < found.metrics.keys()
    assert found.probes is not None and len(found.probes.probes) == 6 * 15 + 6
    assert {label: len(losses) for label, losses in found.losses.items()} == {"walk/heldout": 5, "walk/other": 3}
    for name, count in (("heldout", 5), ("other", 3)):
        expected = loss_by_hand(model, folder / f"{name}{LENGTH}.npy", count)
        # The same float32 terms summed in batches of another size.
        assert found.losses[f"walk/{name}"].tolist() == pytest.approx(expected, rel=1e-6)
        mean = sum(expected) / count
        assert found.metrics[f"eval/walk/{name}/CrossEntropyLoss"] == pytest.approx(mean, rel=1e-6)
        assert found.metrics[f"eval/walk/{name}/Perplexity"] == pytest.approx(np.exp(mean), rel=1e-5)


def test_paths_are_one_label(folder: Path, config: TrainConfig, model: OLMo) -> None:
    paths = [str(folder / f"{name}{LENGTH}.npy") for name in ("heldout", "other")]
    found = build(replace(config, evaluators=[lm("both", paths=paths)])).run(model, [lm("both", paths=paths)])
    assert found.losses.keys() == {"both"} and len(found.losses["both"]) == 8
    assert found.probes is None and found.metrics.keys() == {"eval/both/CrossEntropyLoss", "eval/both/Perplexity"}


@pytest.mark.parametrize(
    ("label", "name", "expected"),
    [
        ("once_semantic", "eval/once_semantic/log_probability", "evaluating: {name} is nan; the weights, or the data"),
        ("held", "eval/held/CrossEntropyLoss", "evaluating: {name} is nan; the weights, or the data"),
        ("copa", "eval/downstream/copa_acc", "evaluating: {name} is nan; the weights, or the data"),
        ("entropy", "eval/entropy/knowledge_entropy", "{name}: average coefficients must be finite"),
    ],
)
def test_a_metric_that_is_not_finite_is_an_error(
    folder: Path, config: TrainConfig, label: str, name: str, expected: str
) -> None:
    """Accuracies too: among log-probabilities that are NaN one choice would be the most probable all the same."""
    evaluator = {
        "once_semantic": lm(label, dataset_path=str(folder / "once.json")),
        "held": lm(label, paths=[str(folder / f"heldout{LENGTH}.npy")]),
        "copa": EvaluatorConfig(label, "downstream", subset_num_batches=1),
        "entropy": EvaluatorConfig(label, "knowledge_entropy"),
    }[label]
    if label == "copa":
        pytest.importorskip("olmo_eval")
    torch.manual_seed(1)
    model = OLMo(config.model)
    evaluators = build(replace(config, evaluators=[evaluator]))
    assert evaluators.run(model, [evaluator]).metrics.keys() >= {name}
    with torch.no_grad():
        model.blocks[1].ff_proj.weight[3, 4] = float("nan")
    with pytest.raises(ValueError, match=f"^{expected.format(name=name)}"):
        evaluators.run(model, [evaluator])


def test_a_perplexity_beyond_all_numbers_is_left_out(
    folder: Path, config: TrainConfig, caplog: pytest.LogCaptureFixture
) -> None:
    evaluator = lm("held", paths=[str(folder / f"heldout{LENGTH}.npy")])
    torch.manual_seed(1)
    model = OLMo(config.model)
    with torch.no_grad():
        model.transformer["wte"].weight.mul_(1e4)
    found = build(replace(config, evaluators=[evaluator])).run(model, [evaluator])
    assert found.metrics.keys() == {"eval/held/CrossEntropyLoss"} and found.metrics["eval/held/CrossEntropyLoss"] > 710
    assert "eval/held/Perplexity is left out" in caplog.text


@pytest.mark.parametrize(
    ("own", "run_wide", "expected"),
    [(None, -1, 5), (1, -1, 2), (2, -1, 4), (9, -1, 5), (None, 1, 2), (2, 1, 4), (-1, 1, 5)],
)
def test_subset_of_token_files(
    folder: Path, config: TrainConfig, model: OLMo, own: int | None, run_wide: int, expected: int
) -> None:
    evaluator = lm("held", paths=[str(folder / f"heldout{LENGTH}.npy")])
    evaluator.subset_num_batches, evaluator.device_eval_batch_size = own, 2
    found = build(replace(config, evaluators=[evaluator], eval_subset_num_batches=run_wide)).run(model, [evaluator])
    assert len(found.losses["held"]) == expected
    assert found.losses["held"].tolist() == pytest.approx(
        loss_by_hand(model, folder / f"heldout{LENGTH}.npy", expected), rel=1e-6
    )


def test_no_evaluator_builds_a_graph(config: TrainConfig, model: OLMo, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []

    def evaluate(*_: object) -> dict[str, float]:
        seen.append(torch.is_grad_enabled())
        return {}

    monkeypatch.setattr("olmo.eval.entropy.EntropyBatch.evaluate", evaluate)
    evaluator = EvaluatorConfig("first_batch", "knowledge_entropy")
    build(replace(config, evaluators=[evaluator])).run(model, [evaluator])
    assert seen == [False]


def test_subset_of_probes(config: TrainConfig, model: OLMo) -> None:
    chosen = [replace(e, subset_num_batches=2) for e in config.evaluators if e.label == "once_semantic"]
    whole = build(config)
    found = build(replace(config, evaluators=chosen)).run(model, chosen)
    assert found.probes is not None
    everything = next(asked for e, asked in whole.probes if e.label == "once_semantic")
    assert list(found.probes.probes) == everything[:8]  # two batches of four, in the order of the file


@pytest.mark.parametrize("label", ["copa", "rte"])
def test_subset_of_a_task(config: TrainConfig, model: OLMo, label: str) -> None:
    pytest.importorskip("olmo_eval", reason="pip install ai2-olmo-eval to run the downstream tests")
    evaluator = EvaluatorConfig(label, "downstream", subset_num_batches=2, device_eval_batch_size=5)
    evaluators = build(replace(config, evaluators=[evaluator]))
    assert [len(task) for _, task in evaluators.tasks] == [10]
    found = evaluators.run(model, [evaluator])
    assert found.metrics[f"eval/downstream/{label}_chance"] == 0.5
    (name,) = found.metrics.keys() - {f"eval/downstream/{label}_chance"}
    assert name in (f"eval/downstream/{label}_acc", f"eval/downstream/{label}_len_norm")
    assert 5 * found.metrics[name] == pytest.approx(round(5 * found.metrics[name]))  # of five documents


def test_diluted_losses_of_batches_of_the_evaluators_own_size(config: TrainConfig, model: OLMo) -> None:
    (chosen,) = (e for e in config.evaluators if e.label == "once_semantic")
    found = {}
    for own, run_wide in ((None, 4), (2, 4), (None, 2), (15, 4)):
        mine = replace(chosen, device_eval_batch_size=own)
        evaluators = build(replace(config, evaluators=[mine], device_eval_batch_size=run_wide))
        found[own, run_wide] = evaluators.run(model, [mine]).metrics["eval/once_semantic/CrossEntropyLoss"]
    assert found[2, 4] == pytest.approx(found[None, 2], rel=1e-6)
    assert found[15, 4] < found[None, 4] < found[2, 4]  # the longer the batch, the more padding dilutes


def test_only_the_chosen_are_asked(config: TrainConfig, model: OLMo) -> None:
    evaluators = build(config)
    whole = evaluators.run(model, config.evaluators).metrics
    chosen = [e for e in config.evaluators if e.label in ("once_memorization", "walk")]
    found = evaluators.run(model, chosen)
    assert found.probes is not None and {p.kind for p in found.probes.probes} == {"memorization"}
    assert {k: v for k, v in found.metrics.items() if k not in ("eval/K", "eval/K_once")} == pytest.approx(
        {k: v for k, v in whole.items() if k.startswith(("eval/once_memorization/", "eval/walk/"))}, rel=1e-6
    )
    assert evaluators.run(model, []).metrics == {}


def test_probes_of_several_evaluators_are_scored_in_one_pass(
    config: TrainConfig, model: OLMo, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr("olmo.eval.evaluators.score_probes", lambda *a: calls.append(len(a[1])) or score_probes(*a))
    build(config).run(model, config.evaluators)
    assert calls == [96]


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_off_and_the_mode_comes_back(config: TrainConfig, training: bool) -> None:
    shape = replace(config.model, residual_dropout=0.5)
    torch.manual_seed(1)
    model = OLMo(shape).train(training)
    chosen = [e for e in config.evaluators if e.label == "walk"]
    evaluators = build(replace(config, model=shape, evaluators=chosen))
    first, second = (evaluators.run(model, chosen).metrics for _ in range(2))
    assert first == second and model.training is training
    assert all(module.training is training for module in model.modules())


def test_precision_of_the_run(config: TrainConfig, model: OLMo) -> None:
    chosen = [e for e in config.evaluators if e.label in ("once_semantic", "walk")]
    full, half = (
        build(replace(config, evaluators=chosen, precision=precision)).run(model, chosen).metrics
        for precision in ("fp32", "amp_bf16")
    )
    assert full != half
    assert half["eval/K"] == pytest.approx(full["eval/K"], rel=2**-7)  # bfloat16 has 8 significant bits


# --- when ---


def test_due_by_the_interval_of_each_or_of_the_run(config: TrainConfig, folder: Path) -> None:
    paths = {"paths": [str(folder / f"heldout{LENGTH}.npy")]}
    a, b, c = lm("a", **paths), lm("b", **paths), lm("c", **paths)
    a.eval_interval, b.eval_interval = 2, 3
    evaluators = build(replace(config, evaluators=[a, b, c], eval_interval=4))
    due = {step: "".join(e.label for e in evaluators.due(step)) for step in range(1, 13)}
    assert due == {
        **dict.fromkeys((1, 5, 7, 11), ""),
        **dict.fromkeys((2, 10), "a"),
        **dict.fromkeys((3, 9), "b"),
        **dict.fromkeys((4, 8), "ac"),
        6: "ab",
        12: "abc",
    }


def test_a_run_evaluates_what_is_due_and_all_at_its_last_step(folder: Path, tmp_path: Path) -> None:
    overrides = [f"--evaluators=[{{label: walk, data: {{paths: [{folder}/heldout32.npy]}}, eval_interval: 2}},"
                 f"{{label: rare, data: {{paths: [{folder}/other32.npy]}}}}]", "--eval_interval=100"]  # fmt: skip
    train(folder / "plain.yaml", tmp_path / "a", *overrides, "--max_duration=5")
    assert series(tmp_path / "a", "eval/walk/CrossEntropyLoss").keys() == {2, 4, 5}
    assert series(tmp_path / "a", "eval/rare/CrossEntropyLoss").keys() == {5}
    assert {p.name for p in (tmp_path / "a" / "losses").iterdir()} == {f"step{s}.parquet" for s in (2, 4, 5)}
    assert not (tmp_path / "a" / "probes").exists()
    # Also where a run is told to stop, and at its start with eval_on_load.
    train(folder / "plain.yaml", tmp_path / "b", *overrides, "--stop_after=1", "--eval_on_load")
    assert series(tmp_path / "b", "eval/rare/CrossEntropyLoss").keys() == {0, 1}
    assert [line["step"] for line in metrics(tmp_path / "b")] == [0, 1, 1]


# --- what cannot be evaluated ---


def test_wrong_evaluators_are_named_before_training(config: TrainConfig, folder: Path) -> None:
    entries = {"dataset_path": str(folder / "once.json")}
    with pytest.raises(
        ConfigurationError, match=r"evaluators\.once_upon: the label of a probe evaluator must be \{para"
    ):
        build(replace(config, evaluators=[lm("once_upon", **entries)]))
    with pytest.raises(FileNotFoundError, match=r"nowhere\.npy: no such token file \(evaluators\.\w+\.data\)$"):
        build(replace(config, evaluators=[lm("walk", paths=[str(folder / "nowhere.npy")])]))
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json: no such file of fictional knowledge"):
        build(replace(config, evaluators=[lm("once_semantic", dataset_path=str(folder / "nowhere.json"))]))
    pytest.importorskip("olmo_eval", reason="pip install ai2-olmo-eval to run the downstream tests")
    task = EvaluatorConfig("pique", "downstream")
    with pytest.raises(ConfigurationError, match=r"evaluators\.pique: olmo_eval has no such task, did you mean 'piqa"):
        build(replace(config, evaluators=[task], tokenizer=TokenizerConfig(config.tokenizer.identifier)))
