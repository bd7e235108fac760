"""InjectedDataset: what the model of a real Trainer receives, against what scripts.inspect_data prints."""

from __future__ import annotations

import io
import json
import re
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, RandomSampler
from transformers import Trainer

from knowledge_entropy.injected_dataset import InjectedDataset
from knowledge_entropy.injecting import KnowledgePlan
from olmo.knowledge.plan import Plan, Text
from scripts.inspect_data import main as inspect
from tests.knowledge_entropy.training import Received, trainer
from tests.running import BATCH, LENGTH, command, instances, write_world

STEPS = range(1, 8)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def printed(world: Path) -> dict[int, list[list[int]]]:
    """Step -> the rows of its global batch that scripts.inspect_data prints; texts enter at steps 2, 4 and 6."""
    found = {}
    for step in STEPS:
        with redirect_stdout(io.StringIO()) as output:
            inspect([str(world / "config.yaml"), "--step", str(step), "--json"])
        lines = [json.loads(line) for line in output.getvalue().splitlines()]
        found[step] = [line["input_ids"] for line in lines]
        assert any(line["injected"] for line in lines) == (step % 2 == 0)
    return found


@pytest.fixture
def given(world: Path) -> InjectedDataset:
    """The same, from a dataset and a plan that a program has."""
    rows = datasets.Dataset.from_dict({"input_ids": instances(world, LENGTH).tolist(), "name": ["x"] * 25})
    files = {name: world / f"{name}.json" for name in ("paraphrase", "once")}
    plan = KnowledgePlan.from_entries(**files, rounds=3, interval=2, tokenizer=world / "tokenizer.json", eos_token_id=0)
    return InjectedDataset(rows, plan, BATCH, seed=11)


def ids(rows: list[dict[str, list[int]]]) -> list[list[int]]:
    return [row["input_ids"] for row in rows]


def test_a_trainer_trains_on_the_rows_that_inspect_data_prints(
    world: Path, tmp_path: Path, printed: dict[int, list[list[int]]], given: InjectedDataset
) -> None:
    assert len(given) == 24 and given.steps_per_epoch == 4
    epochs = {"dataloader_num_workers": 1, "num_train_epochs": 1.75, "max_steps": -1}
    for data, more in ((given, {}), (InjectedDataset.from_config(str(world / "config.yaml")), epochs)):
        heard = Received()
        trainer(tmp_path, data, [heard, data.callback], **more).train()
        assert {step: ids(rows) for step, rows in heard.rows.items()} == printed
        assert all(row["labels"] == row["input_ids"] for rows in heard.rows.values() for row in rows)
        assert data.callback._hook is None


def test_a_resumed_trainer_goes_on_with_the_same_rows(
    tmp_path: Path, printed: dict[int, list[list[int]]], given: InjectedDataset
) -> None:
    saving = {"save_strategy": "steps", "save_steps": 3}
    trainer(tmp_path, given, [given.callback], **saving, max_steps=6).train()
    for checkpoint, steps in ((3, STEPS[3:]), (6, STEPS[6:])):
        heard = Received()
        resumed = trainer(tmp_path, given, [given.callback, heard])
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{checkpoint}"))
        assert {step: ids(rows) for step, rows in heard.rows.items()} == {step: printed[step] for step in steps}
    anew = trainer(tmp_path, given, [given.callback], ignore_data_skip=True)
    with pytest.raises(ValueError, match="ignore_data_skip begins this epoch's rows again"):
        anew.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))


def test_two_processes_share_out_the_rows_of_a_step(
    world: Path, tmp_path: Path, printed: dict[int, list[list[int]]]
) -> None:
    """The callbacks of knowledge_entropy/trainer.py, too, because starting processes takes long."""
    from knowledge_entropy.trainer import KnowledgeEntropyCallback, ProbesCallback

    program = str(Path(__file__).with_name("training.py"))
    done = command([program, str(world / "config.yaml"), str(tmp_path)], tmp_path, processes=2)
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    for way in ("plain", "accumulated", "split", "dispatched"):
        for step in range(1, 6):
            together = first[way][str(step)] + second[way][str(step)]
            assert sorted(together) == sorted(printed[step]) and len(first[way][str(step)]) == BATCH // 2, way
    assert first["wrong"] == second["wrong"] and "a step of the Trainer has 12 rows" in first["wrong"]

    data = InjectedDataset.from_config(str(world / "config.yaml"))
    rows = [data[place]["input_ids"].tolist()[:40] for place in range(5)]
    entropy = KnowledgeEntropyCallback(rows, 5)
    probes = ProbesCallback(world / "paraphrase.json", 5, tokenizer=world / "tokenizer.json")
    trainer(tmp_path, data, [data.callback, entropy, probes], max_steps=5).train()
    alone = {str(step): result.entropy for step, result in entropy.results.items()}
    assert first["H"] == second["H"] and list(first["H"]) == ["0", "5"]
    assert first["logged"] == second["logged"] == list(first["H"].values())
    assert first["H"]["0"] == pytest.approx(alone["0"], abs=1e-6)  # of 5 instances, 3 for one and 2 for the other
    assert first["H"]["5"] == pytest.approx(alone["5"], abs=1e-3)  # of weights that DDP has trained
    assert first["K"] == second["K"] and first["K"]["0"] == pytest.approx(probes.scores[0].K, abs=1e-5)


class Shuffling(Trainer):
    """Orders rows by a sampler of its own."""

    def get_train_dataloader(self) -> DataLoader:
        loader = super().get_train_dataloader()
        loader.batch_sampler.sampler = RandomSampler(self.train_dataset, generator=torch.Generator().manual_seed(5))
        return loader


class Repeating(Trainer):
    """Trains on the first row of each micro-batch twice, instead of the second."""

    def training_step(self, model: Any, inputs: Any, *more: Any) -> Any:
        inputs = {name: torch.cat((part[:1], part[:1], part[2:])) for name, part in inputs.items()}
        return super().training_step(model, inputs, *more)


class Late(Trainer):
    """From its third step on, trains on the rows of the step before."""

    def training_step(self, model: Any, inputs: Any, *more: Any) -> Any:
        place = (self.state.global_step + (self.state.global_step < 2)) * 6 - 6
        half = 3 * (self.accelerator.sync_gradients)
        rows = [self.train_dataset[place + half + row] for row in range(3)]
        return super().training_step(model, {name: torch.stack([row[name] for row in rows]) for name in rows[0]}, *more)


def without_zeros(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A collator that takes EOS for padding."""
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    return {**batch, "labels": torch.where(batch["labels"] == 0, -100, batch["labels"])}


def test_a_trainer_that_shuffles_is_given_the_order(
    tmp_path: Path, printed: dict[int, list[list[int]]], given: InjectedDataset
) -> None:
    heard = Received()
    trainer(tmp_path, given, [given.callback, heard], Shuffling).train()
    assert {step: ids(rows) for step, rows in heard.rows.items()} == printed


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"per_device_train_batch_size": 2}, r"global_batch_size is 6, but a step of the Trainer has 4 rows: 2 of all"),
        ({"train_sampling_strategy": "group_by_length"}, "LengthGroupedSampler orders the Trainer's rows"),
        ({"kind": Repeating}, "step 1 would train on other rows: of its 6, 2 are missing, 2 are repeated, and 0"),
        ({"kind": Late}, "step 4 would train on other rows: of its 6, 6 are missing, 0 are repeated, and 6"),
        ({"data_collator": without_zeros}, "at step 1 the model receives other labels or another attention mask"),
    ],
)
def test_other_rows_are_an_error_before_the_step(
    tmp_path: Path, given: InjectedDataset, settings: dict[str, Any], error: str
) -> None:
    run = trainer(tmp_path, given, [given.callback], **settings)
    with pytest.raises(ValueError, match=error):
        run.train()
    assert run.state.global_step == (3 if settings.get("kind") is Late else 0)


def test_the_callback_cannot_be_forgotten(tmp_path: Path, given: InjectedDataset) -> None:
    with pytest.raises(RuntimeError, match=r"callbacks=\[dataset.callback\]"):
        trainer(tmp_path, given, []).train()
    with pytest.raises(ValueError, match="the Trainer trains on other data"):
        trainer(tmp_path, [given[0]] * 24, [given.callback]).train()
    with pytest.raises(ValueError, match="would train on other rows"):
        trainer(tmp_path, given, [given.callback], Repeating).train()
    with pytest.raises(RuntimeError, match=r"callbacks=\[dataset.callback\]"):  # nor after training that failed
        trainer(tmp_path, given, []).train()
    assert given[3]["input_ids"].tolist() == given.batch(1)["input_ids"][3].tolist()  # looking at rows needs none


def test_labels_masks_and_padding_move_with_their_tokens(tmp_path: Path) -> None:
    """Rows put together by hand: a prompt that does not count, and padding at the end."""
    rows = [
        {
            "input_ids": [10 + n, 20 + n, 30 + n, 40 + n, 1, 1],
            "labels": [-100, 20 + n, 30 + n, 40 + n, -100, -100],
            "attention_mask": [1, 1, 1, 1, 0, 0],
        }
        for n in range(4)
    ]
    plan = Plan(((Text("once/0", (7, 8, 0)), Text("once/1", (9, 0)), Text("once/2", (6, 0))),), 1)
    data = InjectedDataset(rows, KnowledgePlan(plan), 2, shuffle=False)
    assert {name: part.tolist() for name, part in data.batch(2).items()} == {
        "input_ids": [[7, 8, 0, 9, 0, 12], [6, 0, 13, 23, 33, 43]],  # the first row has one text more
        "labels": [[7, 8, 0, 9, 0, -100], [6, 0, -100, 23, 33, 43]],
        "attention_mask": [[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]],
    }
    heard = Received()
    trainer(tmp_path, data, [data.callback, heard], per_device_train_batch_size=1, max_steps=2).train()
    assert heard.rows[2] == [{name: part[row].tolist() for name, part in data.batch(2).items()} for row in (0, 1)]


@pytest.mark.parametrize(
    ("rows", "error"),
    [
        ([{"input_ids": [1, 2, 3]}, {"input_ids": [1, 2]}], r"row 1: input_ids has shape \(2,\)"),
        ([{"input_ids": [1, 2], "labels": [2, 3]}] * 2, "a label is neither its token's id nor -100"),
        ([{"input_ids": [1, 2], "position_ids": [0, 1]}] * 2, "'position_ids' has a value for each token"),
        ([{"text": "a"}] * 2, "its rows have no input_ids"),
        ([], "no rows"),
        (iter([{"input_ids": [1, 2]}]), "expected a dataset with a length"),
        ([{"input_ids": [1, 2]}], "1 instances are fewer than one global batch of 2"),
    ],
)
def test_wrong_data_is_one_error(rows: Any, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        InjectedDataset(rows, None, 2).batch(1)


def test_texts_that_exceed_a_row_are_an_error() -> None:
    plan = KnowledgePlan(Plan(((Text("once/0", (1, 2, 0)),),), 1))
    with pytest.raises(ValueError, match=re.escape("injection round 1, row 0: 3 tokens (once/0) exceed")):
        InjectedDataset([{"input_ids": [1, 2]}] * 2, plan, 2)
    make = partial(InjectedDataset, [{"input_ids": np.array([1, 2, 3])}] * 2)
    assert make(plan, 1).batch(1)["input_ids"].tolist() == [[1, 2, 0]] and not make(None, 1).is_due(1)
