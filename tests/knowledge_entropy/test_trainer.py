"""The callbacks in a real Trainer: what they log, that training does not notice them, and whose numbers they have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast, TrainerCallback

import knowledge_entropy
from analysis.entropy_series import main as series
from analysis.measure import measure
from analysis.result import Result
from analysis.score import main as score_command
from analysis.series import SERIES
from knowledge_entropy.trainer import KnowledgeEntropyCallback, ProbesCallback
from olmo.distributed import Ranks
from tests.knowledge_entropy.training import model, trainer
from tests.running import CPU, write_world

DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.1}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


def rows(count: int = 24, length: int = 24) -> list[dict[str, torch.Tensor]]:
    ids = torch.from_numpy(np.random.default_rng(4).integers(2, 128, (count, length)))
    return [{"input_ids": row, "labels": row} for row in ids]


def entropy(every: int | str = 2, **more: Any) -> KnowledgeEntropyCallback:
    return KnowledgeEntropyCallback([row["input_ids"].tolist() for row in rows(5)], every, batch_size=2, **more)


def probes(world: Path, every: int | str = 2, **more: Any) -> ProbesCallback:
    files = {setting: world / f"{setting}.json" for setting in ("paraphrase", "once")}
    return ProbesCallback(files, every, **{"tokenizer": world / "tokenizer.json", **more})


def losses(history: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [(line["step"], line["loss"], line["grad_norm"]) for line in history if "loss" in line]


def trained(folder: Path, callbacks: list[TrainerCallback], resume: str | None = None, **more: Any) -> tuple[Any, ...]:
    """Losses and gradient norms of each step, and the weights after the last, with dropout and accumulation."""
    torch.manual_seed(5)
    run = trainer(folder, rows(), callbacks, model=model(**DROPOUT), save_strategy="steps", save_steps=3, **more)
    run.train(resume_from_checkpoint=resume)
    return losses(run.state.log_history), {name: part.clone() for name, part in run.model.state_dict().items()}


def test_training_is_bit_for_bit_as_without_them(world: Path, tmp_path: Path) -> None:
    plain, weights = trained(tmp_path / "plain", [])
    measured, same = trained(tmp_path / "measured", [entropy(), probes(world)])
    assert measured == plain and len(plain) == 7
    assert all(torch.equal(same[name], part) for name, part in weights.items())
    unlike = trained(tmp_path / "unlike", [], seed=7)[0]
    assert unlike != plain  # dropout and order do depend on random numbers
    again = [entropy(), probes(world)]
    resumed, same = trained(tmp_path / "measured", again, str(tmp_path / "measured/checkpoint-3"))
    plain, weights = trained(tmp_path / "plain", [], str(tmp_path / "plain/checkpoint-3"))
    assert resumed == plain and all(torch.equal(same[name], part) for name, part in weights.items())
    assert list(again[0].results) == list(again[1].scores) == [4, 6, 7]  # the state has those before


def test_what_is_logged(world: Path, tmp_path: Path) -> None:
    callback, asked = entropy(3, measures=("knowledge", "next_token")), probes(world, "epoch")
    run = trainer(tmp_path, rows(), [callback, asked], report_to="tensorboard")
    before = [module.training for module in run.model.modules()]
    run.train()
    assert list(callback.results) == [0, 3, 6, 7] and list(asked.scores) == [0, 4, 7]
    assert [module.training for module in run.model.modules()] == [True] * len(before)
    lines = {line["step"]: line for line in run.state.log_history if "knowledge_entropy" in line}
    for step, result in callback.results.items():
        line = lines[step]
        assert line["knowledge_entropy"] == result.entropy and line["next_token_entropy"] > 0
        assert line["knowledge_entropy_standard_error"] == result.standard_error
        assert [line[f"knowledge_entropy/layer_{layer}"] for layer in (0, 1)] == result.layers.tolist()
        assert line["knowledge_entropy_seconds"] > 0 and line["epoch"] == step / 4
    assert len(losses(run.state.log_history)) == 7  # the Trainer's own lines are all there
    scored = {line["step"]: line for line in run.state.log_history if "K" in line}
    assert list(scored) == [0, 4, 7] and scored[4]["K_once_semantic"] == asked.scores[4].by_kind["once_semantic"]

    events = EventAccumulator(str(next(tmp_path.rglob("events.out*")).parent))
    events.Reload()
    drawn = {event.step: event.value for event in events.Scalars("train/knowledge_entropy")}
    assert drawn == {step: np.float32(result.entropy) for step, result in callback.results.items()}
    assert [event.step for event in events.Scalars("train/K")] == [0, 4, 7]
    assert len(events.Scalars("train/knowledge_entropy/layer_1")) == 4


class Stopping(TrainerCallback):
    """Ends training at a step, after the callbacks before it."""

    def on_step_end(self, args: Any, state: Any, control: Any, **of_trainer: Any) -> Any:
        control.should_training_stop = state.global_step == 5
        return control


def test_the_numbers_are_those_of_the_commands_for_the_saved_weights(world: Path, tmp_path: Path) -> None:
    """Also where another callback ends training; `output` is what analysis.entropy_series reads."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(world / "tokenizer.json"), eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )
    callback, asked = entropy(10, output=tmp_path / "series"), probes(world, 10, tokenizer=None, sequence_length=256)
    run = trainer(tmp_path / "run", rows(), [callback, asked, Stopping()], processing_class=tokenizer)
    run.train()
    assert list(callback.results) == [0, 5]
    ids = [row["input_ids"].numpy() for row in rows(5)]
    reference = measure(run.model.eval(), ids, 2, "abs", CPU, Ranks())
    result = Result.load(tmp_path / "series/step5")
    assert callback.results[5].entropy == result.entropy == reference.knowledge_entropy
    assert callback.results[5].layers.tolist() == reference.layers.tolist()
    series([*map(str, (tmp_path / "series").iterdir()), "--output", str(tmp_path / "drawn")])
    drawn = json.loads((tmp_path / "drawn" / SERIES).read_text())
    assert [row["checkpoint"]["step"] for row in drawn["rows"]] == [0, 5] and list((tmp_path / "drawn").glob("*.png"))

    run.save_model(str(tmp_path / "saved"))
    (tmp_path / "knowledge").mkdir()
    for setting in ("paraphrase", "once"):
        (tmp_path / f"knowledge/fictional_knowledge_{setting}.json").write_bytes(
            (world / f"{setting}.json").read_bytes()
        )
    how = ["--knowledge", str(tmp_path / "knowledge"), "--tokenizer", str(world / "tokenizer.json")]
    score_command([str(tmp_path / "saved"), *how, "--output", str(tmp_path / "scores")])
    assert json.loads((tmp_path / "scores/score.json").read_text())["knowledge"] == asked.scores[5].numbers


def test_mixed_precision_is_not_measured(world: Path, tmp_path: Path) -> None:
    """accelerate puts it into the forward pass of the model with its head, which next_token and probes need."""
    measures = ("knowledge", "next_token")
    callback, asked = entropy(10, measures=measures), probes(world, 10)
    run = trainer(tmp_path, rows(), [callback, asked], max_steps=1, bf16=True)
    run.train()
    plain, prepared = model(), vars(run.model)["forward"]
    plain.load_state_dict(run.model.state_dict())
    wanted = knowledge_entropy.measure(plain, [row["input_ids"] for row in rows(5)], batch_size=2, measures=measures)
    assert wanted.content["precision"] == "fp32" and prepared.__func__ is not type(plain).forward
    for name in ("knowledge_entropy", "next_token_entropy"):
        assert callback.results[1].content[name] == wanted.content[name]
    files = {setting: world / f"{setting}.json" for setting in ("paraphrase", "once")}
    assert asked.scores[1].K == knowledge_entropy.score(plain, files, tokenizer=world / "tokenizer.json").K
    assert vars(run.model)["forward"] is prepared


def test_text_is_encoded_by_the_tokenizer_of_the_trainer(world: Path, tmp_path: Path) -> None:
    text = "the model reads this text and no other text than this one\n" * 40
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(world / "tokenizer.json"), eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )
    assert tokenizer.eos_token_id is not None and isinstance(tokenizer.backend_tokenizer, Tokenizer)
    callback = KnowledgeEntropyCallback(iter([text]), 7, sequence_length=16)
    trainer(tmp_path, rows(), [callback], processing_class=tokenizer, max_steps=1).train()
    assert callback.results[1].content["number_of_tokens"] % 16 == 0 and callback.results[1].standard_error > 0
    without = trainer(tmp_path, rows(), [KnowledgeEntropyCallback([text], 7)], max_steps=1)
    with pytest.raises(ValueError, match="text needs a tokenizer; give tokenizer"):
        without.train()


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: entropy(0), "every: 0; expected a number of optimizer steps, or 'epoch'"),
        (lambda: entropy("step"), "every: 'step'; expected"),
        (lambda: entropy(coefficient="square"), "coefficient: 'square' is none of abs, relu"),
        (lambda: entropy(tolerance=0), "tolerance: 0 must be above 0"),
        (lambda: KnowledgeEntropyCallback([], 5), "data: empty"),
        (lambda: ProbesCallback("a.json", 2.5), "every: 2.5; expected"),  # type: ignore[arg-type]
    ],
)
def test_wrong_arguments_are_one_error(make: Any, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        make()


def test_a_callback_without_a_trainer_is_an_error() -> None:
    state = type("State", (), {"global_step": 2, "max_steps": 9, "log_history": []})()
    control = type("Control", (), {"should_log": False})()
    with pytest.raises(ValueError, match="this callback belongs to a Trainer"):
        entropy().on_step_end(None, state, control, model=model())
