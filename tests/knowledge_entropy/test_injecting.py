"""KnowledgePlan: the batches of a loop of one's own, against lists of tokens put together by method section 3."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from knowledge_entropy.injecting import KnowledgePlan
from olmo.knowledge.entries import load_entries
from olmo.knowledge.plan import Plan, Text
from scripts.injection_plan import main as write_plan
from tests.running import write_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


def by_hand(rows: list[list[int]], texts: list[list[int]], mark: list[int] | None = None) -> list[list[int]]:
    """Text after text, the first (n mod rows) rows one more, at the front of rows of unchanged length; or, with `mark`,
    the same for the tokens' marks."""
    found, start = [], 0
    for number, row in enumerate(rows):
        stop = start + len(texts) // len(rows) + (number < len(texts) % len(rows))
        new = [token if mark is None else mark[0] for text in texts[start:stop] for token in text]
        found.append((new + row)[: len(row)])
        start = stop
    return found


@settings(max_examples=25)
@given(st.data())
def test_a_batch_is_that_of_the_method(data: st.DataObject) -> None:
    size, length, interval = (data.draw(st.integers(*ends)) for ends in ((1, 5), (8, 12), (1, 3)))
    tokens = st.lists(st.integers(2, 9), min_size=1, max_size=2)
    rounds = [[[*text, 0] for text in data.draw(st.lists(tokens, min_size=1, max_size=2 * size))] for _ in range(2)]
    named = tuple(tuple(Text(f"once/{k}", tuple(text)) for k, text in enumerate(texts)) for texts in rounds)
    plan = KnowledgePlan(Plan(named, interval))

    def table(of: st.SearchStrategy) -> list[list[Any]]:
        return data.draw(st.lists(st.lists(of, min_size=length, max_size=length), min_size=size, max_size=size))

    rows, counts = table(st.integers(10, 99)), torch.tensor(table(st.booleans()))
    ids = torch.tensor(rows)
    labels, mask = torch.where(counts, ids, -100), counts.int()
    before = ids.clone()
    for step in range(1, 3 * interval + 2):
        found = plan.inject(ids, step, labels, mask)
        due = step % interval == 0
        texts = rounds[(step // interval - 1) % 2] if due else []
        assert plan.is_due(step) == due and len(plan.texts(step, size)) == len(texts)
        wanted = by_hand(rows, texts)
        marks = by_hand(counts.int().tolist(), texts, [1])
        assert found["input_ids"].tolist() == wanted and torch.equal(ids, before)
        assert found["attention_mask"].tolist() == marks and found["attention_mask"].dtype == torch.int32
        assert found["labels"].tolist() == [[t if m else -100 for t, m in zip(*pair)] for pair in zip(wanted, marks)]
        chosen = [row for row in range(size) if row % 2 == 0]
        part = plan.inject(ids[chosen], step, rows=chosen, global_batch_size=size)
        assert part.keys() == {"input_ids"} and part["input_ids"].tolist() == [wanted[row] for row in chosen]


def test_plans_of_entries_of_files_and_of_maps_are_the_same(world: Path, tmp_path: Path) -> None:
    write_plan([str(world / "config.yaml"), "--output", str(tmp_path / "plan.json")])
    written = KnowledgePlan.from_file(tmp_path / "plan.json", interval=2)
    files = {name: world / f"{name}.json" for name in ("paraphrase", "once")}
    how: dict[str, Any] = {"tokenizer": world / "tokenizer.json", "eos_token_id": 0, "rounds": 3}
    made = KnowledgePlan.from_entries(**files, interval=2, **how)
    assert made == written and made.steps == (2, 4, 6) and made.is_due(8) and not made.is_due(1)
    assert (
        made.plan.rounds
        == KnowledgePlan.from_entries(
            paraphrase=load_entries(files["paraphrase"]), once=load_entries(files["once"]), **how
        ).plan.rounds
    )
    assert made.texts(2, 6) == [(0, "paraphrase/0"), (1, "paraphrase/1"), (2, "paraphrase/2"), (3, "once/0")]
    once = KnowledgePlan.from_entries(**files, interval=2, repeat=False, start_step=3, position="document", **how)
    assert once.steps == (3, 5, 7) and not once.is_due(9) and once.plan.boundary == 0
    tensors = [[torch.tensor(text.input_ids) for text in texts] for texts in made.plan.rounds]
    (tmp_path / "map.pkl").write_bytes(pickle.dumps(dict(enumerate(tensors, 1))))
    ids = torch.full((6, 256), 5)
    from_map = KnowledgePlan.from_file(tmp_path / "map.pkl", interval=2)
    assert torch.equal(from_map.inject(ids, 4)["input_ids"], made.inject(ids, 4)["input_ids"])
    behind = KnowledgePlan.from_file(tmp_path / "map.pkl", interval=2, position="document")
    assert behind.plan.boundary == 0
    tensors[1][0] = tensors[1][0][:-1]
    (tmp_path / "map.pkl").write_bytes(pickle.dumps(dict(enumerate(tensors, 1))))
    with pytest.raises(ValueError, match=r"map\.pkl: its texts end with different tokens"):
        KnowledgePlan.from_file(tmp_path / "map.pkl", interval=2, position="document")


IDS = torch.arange(12).reshape(2, 6)
PLAN = KnowledgePlan(Plan(((Text("once/0", (1, 2, 0)),),), 1))


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"step": 0}, "step: 0; optimizer steps count from 1"),
        ({"input_ids": IDS[0]}, r"input_ids: shape \(6,\)"),
        ({"input_ids": IDS.float()}, "of torch.float32; expected token ids"),
        ({"labels": IDS[:, 1:]}, r"labels: shape \(2, 5\), that of input_ids is \(2, 6\)"),
        ({"labels": IDS.roll(-1, 1)}, "labels: neither the token's own id nor -100"),
        ({"attention_mask": torch.ones(6)}, r"attention_mask: shape \(6,\)"),
        ({"rows": [0, 1]}, "rows and global_batch_size: give both, or neither"),
        ({"rows": [0, 2], "global_batch_size": 2}, r"rows: \[0, 2\]; expected 2 different ones below 2"),
        ({"input_ids": IDS[:, :2]}, "3 tokens .once/0. exceed the sequence length 2"),
    ],
)
def test_a_batch_of_another_form_is_one_error(arguments: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        PLAN.inject(**{"input_ids": IDS, "step": 1, **arguments})


def test_wrong_arguments_of_a_plan_are_one_error(world: Path, tmp_path: Path) -> None:
    tokenizer, once = world / "tokenizer.json", world / "once.json"
    wrong: list[tuple[dict[str, Any], str]] = [
        ({}, "no entries; give paraphrase, duplicate or once"),
        ({"once": []}, "expected a file of fictional knowledge"),
        ({"once": once, "interval": 0}, "interval: 0 must be at least 1"),
        ({"once": once, "rounds": 2}, "3 once entries do not divide into 2 rounds"),
        ({"once": once, "rounds": 3, "position": "end"}, "position: 'end'; expected one of front, document"),
        ({"once": once, "rounds": 3, "tokenizer": 5}, "tokenizer: int; expected"),
    ]
    for arguments, error in wrong:
        with pytest.raises(ValueError, match=error):
            KnowledgePlan.from_entries(**{"tokenizer": tokenizer, "eos_token_id": 0, **arguments})
    (tmp_path / "plan.json").write_text(json.dumps({"format": "other"}))
    with pytest.raises(ValueError, match="not an injection plan"):
        KnowledgePlan.from_file(tmp_path / "plan.json", interval=2)
    write_plan([str(world / "config.yaml"), "--output", str(tmp_path / "of_run.json")])
    with pytest.raises(ValueError, match="has no steps; give interval"):
        KnowledgePlan.from_file(tmp_path / "of_run.json")
