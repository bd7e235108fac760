"""Injection against a direct transcription of the method (section 3), and the published map rebuilt token for token."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from olmo.config import InjectionConfig, TrainConfig
from olmo.data.loader import Batch
from olmo.knowledge.entries import Entry, load_entries, load_injection_map
from olmo.knowledge.injection import Plan, Text, build_plan, inject, plan_from_config
from olmo.tokenizer import encode
from tests.published import INJECTION_MAP, OLMO_EOS, ONCE, PARAPHRASE, fictional_knowledge, olmo_tokenizer
from tests.reference import tiny_config

EOS = 0


def entry(name: str, paraphrases: int = 9) -> Entry:
    return Entry(f"{name}0", tuple(f"{name}{i}" for i in range(1, paraphrases + 1)), {})


def spell(texts: list[str]) -> list[list[int]]:
    """A stand-in for a tokenizer: a token a character."""
    return [[ord(c) for c in text] for text in texts]


def read(plan: Plan) -> list[list[str]]:
    """The texts of every round, without their EOS."""
    for texts in plan.rounds:
        assert all(text.input_ids[-1] == EOS and EOS not in text.input_ids[:-1] for text in texts)
    return [["".join(map(chr, text.input_ids[:-1])) for text in texts] for texts in plan.rounds]


# --- the plan ----------------------------------------------------------------------------------------------------


def test_the_plan_of_the_published_entries_is_the_published_map_token_for_token() -> None:
    folder, tokenizer = fictional_knowledge(), olmo_tokenizer()
    entries = {"paraphrase": load_entries(folder / PARAPHRASE), "once": load_entries(folder / ONCE)}
    plan = build_plan(entries, 10, 160, lambda texts: encode(tokenizer, texts), OLMO_EOS)
    published = load_injection_map(folder / INJECTION_MAP)
    assert [[list(text.input_ids) for text in texts] for texts in plan.rounds] == list(published.values())
    for number, texts in enumerate(plan.rounds, start=1):
        once = [f"once/{i}" for i in range(6 * (number - 1), 6 * number)]
        assert [text.entry for text in texts] == [f"paraphrase/{i}" for i in range(70)] + once


def test_paraphrase_takes_another_wording_in_each_round() -> None:
    plan = build_plan({"paraphrase": [entry("a"), entry("b")]}, 10, 1, spell, EOS)
    assert read(plan) == [[f"a{r}", f"b{r}"] for r in range(10)]


def test_duplicate_takes_the_same_wording_in_each_round() -> None:
    plan = build_plan({"duplicate": [entry("a"), entry("b", paraphrases=0)]}, 3, 1, spell, EOS)
    assert read(plan) == [["a0", "b0"]] * 3


@given(rounds=st.integers(1, 12), each=st.integers(1, 7))
def test_once_deals_every_entry_to_one_round_in_order(rounds: int, each: int) -> None:
    entries = [entry(f"{number}.") for number in range(rounds * each)]
    plan = build_plan({"once": entries}, rounds, 1, spell, EOS)
    assert read(plan) == [[f"{n}.0" for n in range(each * (r - 1), each * r)] for r in range(1, rounds + 1)]


def test_settings_stand_in_one_order_whatever_the_order_of_the_mapping() -> None:
    files = {"once": [entry("o"), entry("O")], "duplicate": [entry("d")], "paraphrase": [entry("p")]}
    plan = build_plan(files, 2, 1, spell, EOS)
    assert read(plan) == [["p0", "d0", "o0"], ["p1", "d0", "O0"]]
    assert [text.entry for text in plan.rounds[1]] == ["paraphrase/0", "duplicate/0", "once/1"]


def test_errors_of_a_plan_say_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="paraphrase entry 1 has 2 paraphrases, 4 rounds need 3"):
        build_plan({"paraphrase": [entry("a"), entry("b", paraphrases=2)]}, 4, 1, spell, EOS)
    with pytest.raises(ValueError, match="7 once entries do not divide into 2 rounds"):
        build_plan({"once": [entry("a")] * 7}, 2, 1, spell, EOS)
    with pytest.raises(ValueError, match=r"injection\.rounds: 0 must be at least 1"):
        build_plan({}, 0, 1, spell, EOS)


@given(interval=st.integers(1, 7), rounds=st.integers(1, 10), step=st.integers(0, 200))
def test_the_round_of_a_step(interval: int, rounds: int, step: int) -> None:
    plan = Plan(tuple((Text(str(r), (1,)),) for r in range(rounds)), interval)
    due = step > 0 and step % interval == 0
    assert plan.round_of(step) == ((step // interval - 1) % rounds + 1 if due else None)


def test_rounds_start_again_after_the_tenth() -> None:
    plan = Plan(tuple((Text(str(r), (1,)),) for r in range(10)), 160)
    due = {step: plan.round_of(step) for step in range(0, 3361) if plan.round_of(step) is not None}
    assert list(due) == list(range(160, 3361, 160))
    assert list(due.values()) == [*range(1, 11), *range(1, 11), 1]


# --- injection ---------------------------------------------------------------------------------------------------


def of_rows(batch: torch.Tensor, rows: np.ndarray) -> Batch:
    """These rows of a global batch, whose instances are numbered as its rows."""
    return Batch(batch[rows], rows.astype(np.uint32), rows)


def transcribed(batch: list[list[int]], texts: list[list[int]]) -> tuple[list[list[int]], list[list[int]]]:
    """Method section 3 word by word: the injected global batch, and the numbers of the texts in each row."""
    waiting = list(range(len(texts)))
    result, of_row = [], []
    for number, row in enumerate(batch):
        take = len(texts) // len(batch) + (1 if number < len(texts) % len(batch) else 0)
        mine, waiting = waiting[:take], waiting[take:]
        whole: list[int] = []
        for text in mine:
            whole = whole + texts[text]
        result.append((whole + row)[: len(row)])
        of_row.append(mine)
    assert not waiting
    return result, of_row


@settings(max_examples=150)
@given(data=st.data())
def test_injection_is_the_transcription_on_any_number_of_ranks(data: st.DataObject) -> None:
    rows = data.draw(st.sampled_from([1, 2, 3, 4, 6, 8, 12]), "rows")
    lengths = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=20), "lengths of the texts")
    world_size = data.draw(st.sampled_from([w for w in (1, 2, 3, 4) if rows % w == 0]), "ranks")
    texts = [[1000 + 10 * number + place for place in range(length)] for number, length in enumerate(lengths)]
    rooms = -(-len(texts) // rows) * 6
    length = data.draw(st.integers(rooms, rooms + 4), "sequence length")
    batch = torch.arange(rows * length).view(rows, length)
    plan = Plan(((Text("else", (7,)),), tuple(Text(str(n), tuple(t)) for n, t in enumerate(texts))), 5)
    plan.check(rows, length)

    wanted, of_row = transcribed(batch.tolist(), texts)
    seen: dict[int, list[int]] = {}
    entered_everywhere = []
    for rank in range(world_size):
        mine = np.arange(rank, rows, world_size)
        part = of_rows(batch, mine)
        before = part.input_ids.clone()
        result, entered = inject(part, 10, plan, rows)
        assert torch.equal(part.input_ids, before), "the input was changed"
        assert result.input_ids.dtype == torch.int64
        seen |= dict(zip(mine.tolist(), result.input_ids.tolist()))
        entered_everywhere += entered
    assert [seen[row] for row in range(rows)] == wanted
    assert sorted((row, int(text.entry)) for row, text in entered_everywhere) == [
        (row, text) for row, of in enumerate(of_row) for text in of
    ]


def test_each_rank_may_hold_rows_in_any_order() -> None:
    plan = Plan((tuple(Text(str(n), (100 + n,)) for n in range(4)),), 1)
    batch = torch.arange(20).view(4, 5)
    result, entered = inject(of_rows(batch, np.array([3, 1])), 1, plan, 4)
    assert result.input_ids[:, 0].tolist() == [103, 101]
    assert [(row, text.entry) for row, text in entered] == [(3, "3"), (1, "1")]


@pytest.mark.parametrize("step", [1, 2, 4, 6, 159])
def test_other_steps_leave_the_batch_alone(step: int) -> None:
    batch = torch.arange(8).view(2, 4)
    plan = Plan(((Text("a", (9,)),),), 5)
    result, entered = inject(of_rows(batch, np.arange(2)), step, plan, 2)
    assert torch.equal(result.input_ids, torch.arange(8).view(2, 4)) and entered == []


def test_without_a_plan_nothing_enters() -> None:
    batch = torch.arange(8).view(2, 4)
    result, entered = inject(of_rows(batch, np.arange(2)), 1, None, 2)
    assert torch.equal(result.input_ids, batch) and entered == []


def test_every_token_of_a_text_counts_and_is_seen_whatever_is_masked_behind_it() -> None:
    plan = Plan(((Text("a", (7, 8)), Text("b", (9,))),), 1)
    labels, attention = (torch.tensor(rows).bool() for rows in ([[0, 1, 0, 1]] * 3, [[0, 0, 1, 1]] * 3))
    batch = replace(of_rows(torch.arange(12).view(3, 4), np.arange(3)), label_mask=labels, attention_mask=attention)
    result, _ = inject(batch, 1, plan, 3)
    assert result.input_ids.tolist() == [[7, 8, 0, 1], [9, 4, 5, 6], [8, 9, 10, 11]]
    assert result.label_mask is not None and result.attention_mask is not None
    assert result.label_mask.int().tolist() == [[1, 1, 0, 1], [1, 0, 1, 0], [0, 1, 0, 1]]
    assert result.attention_mask.int().tolist() == [[1, 1, 0, 0], [1, 0, 0, 1], [0, 0, 1, 1]]
    assert labels.int().tolist() == [[0, 1, 0, 1]] * 3, "the input was changed"


# --- checks ------------------------------------------------------------------------------------------------------


def test_a_row_that_overflows_is_an_error_that_names_it() -> None:
    rounds = ((Text("a", (1, 2)), Text("b", (3, 4))), (Text("c", (1,)), Text("d", (2, 3, 4)), Text("e", (5, 6))))
    plan = Plan(rounds, 1)
    plan.check(global_batch_size=2, sequence_length=4)
    with pytest.raises(ValueError) as caught:
        plan.check(global_batch_size=2, sequence_length=3)
    assert str(caught.value) == (
        "injection round 2, row 0: 4 tokens (c, d) exceed the sequence length 3; "
        "use shorter texts, fewer entries, a larger batch or longer sequences"
    )


def test_a_round_without_texts_is_an_error() -> None:
    with pytest.raises(ValueError) as caught:
        Plan(((Text("a", (1,)),), ()), 1).check(4, 4)
    assert str(caught.value) == "injection round 2 holds no text"


# --- from a configuration ----------------------------------------------------------------------------------------


def config(**overrides: object) -> TrainConfig:
    return TrainConfig(model=tiny_config(), global_train_batch_size=2, inject_interval=3, **overrides)  # type: ignore[arg-type]


def test_a_configuration_without_injection_has_no_plan() -> None:
    assert plan_from_config(config(), spell) is None


def test_a_configuration_names_files_of_entries(tmp_path: Path) -> None:
    kinds = {f"{prefix}_{side}": ["x"] for prefix in ("mem", "gen", "hard_gen") for side in ("input", "target")}
    for name, contexts in (("p", ["p0"]), ("o", ["o0", "O0"])):
        entries = [{"train_context": c, "paraphrases": [c[0] + "1"], **kinds} for c in contexts]
        (tmp_path / f"{name}.json").write_text(json.dumps(entries))
    chosen = InjectionConfig(paraphrase=str(tmp_path / "p.json"), once=str(tmp_path / "o.json"), rounds=2)
    plan = plan_from_config(config(injection=chosen), spell)
    assert plan is not None and plan.interval == 3
    assert read(plan) == [["p0", "o0"], ["p1", "O0"]]


def test_a_configuration_names_a_published_map_and_is_checked_at_once(tmp_path: Path) -> None:
    path = tmp_path / "map.pkl"
    path.write_bytes(pickle.dumps({1: [torch.tensor([5, 0])], 2: [torch.tensor([6, 7, 0]), torch.arange(64)]}))
    plan = plan_from_config(config(inject_indices_map=str(path)), spell)
    assert plan is not None
    assert [[text.input_ids for text in texts] for texts in plan.rounds] == [
        [(5, 0)],
        [(6, 7, 0), tuple(range(64))],
    ]
    path.write_bytes(pickle.dumps({1: [torch.arange(65)]}))
    with pytest.raises(ValueError, match=r"round 1, row 0: 65 tokens \(map/0\) exceed the sequence length 64"):
        plan_from_config(config(inject_indices_map=str(path)), spell)
