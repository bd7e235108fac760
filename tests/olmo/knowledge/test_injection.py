"""Injection against a direct transcription of the method (section 3), its laws, and plans from configurations."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from olmo.config import EvaluatorConfig, InjectionConfig, TrainConfig
from olmo.data.loader import Batch
from olmo.exceptions import ConfigurationError
from olmo.knowledge.injection import inject, needs_tokenizer, plan_from_config
from olmo.knowledge.plan import Plan, Text
from olmo.knowledge.plan_files import PlanFile, write_plan
from tests.reference import tiny_config

EOS = 0


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


@st.composite
def injections(draw: st.DrawFn) -> tuple[Plan, Batch, int]:
    """A plan whose second round is injected at step 5, a global batch with ends of documents, padding and masks."""
    rows = draw(st.sampled_from([1, 2, 3, 4, 6, 8, 12]))
    lengths = draw(st.lists(st.integers(1, 6), min_size=1, max_size=20))
    # Tokens that no row holds, each text's its own.
    texts = [
        (*range(1000 + 10 * number, 1000 + 10 * number + length - 1), EOS) for number, length in enumerate(lengths)
    ]
    boundary = draw(st.sampled_from([None, EOS]))
    rounds = ((Text("else", (7, EOS)),), tuple(Text(str(number), text) for number, text in enumerate(texts)))
    plan = Plan(rounds, 1, 4, boundary=boundary)
    length = 6 * -(-len(texts) // rows) + draw(st.integers(0, 6))
    shape = (rows, length)
    numbers = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(numbers)
    ids = torch.from_numpy(np.where(rng.random(shape) < 0.15, EOS, rng.integers(1, 9, shape)))
    labels, attention = (
        torch.from_numpy(rng.random(shape) < 0.8) if draw(st.booleans()) else None for _ in ("labels", "attention")
    )
    return plan, Batch(ids, np.arange(rows).astype(np.uint32), np.arange(rows), labels, attention), rows


def rows_of(batch: Batch, rows: np.ndarray) -> Batch:
    """What a rank that holds these rows has of a global batch."""
    labels, attention = (None if m is None else m[rows] for m in (batch.label_mask, batch.attention_mask))
    return Batch(batch.input_ids[rows], batch.instances[rows], rows, labels, attention)


def assert_same(one: Batch, two: Batch) -> None:
    for name in ("input_ids", "label_mask", "attention_mask"):
        a, b = getattr(one, name), getattr(two, name)
        assert (a is None) == (b is None) and (a is None or torch.equal(a, b)), name


@settings(max_examples=200)
@given(drawn=injections())
def test_every_text_enters_once_and_whole_and_the_rest_of_a_row_stays(drawn: tuple[Plan, Batch, int]) -> None:
    plan, batch, rows = drawn
    before = replace(batch, **{n: v.clone() for n in ("input_ids", "label_mask", "attention_mask")
                               if (v := getattr(batch, n)) is not None})  # fmt: skip
    result, entered = inject(batch, 5, plan, rows)
    assert_same(batch, before)  # never changed in place
    assert result.input_ids.shape == batch.input_ids.shape and result.input_ids.dtype == torch.int64
    texts = plan.rounds[1]
    assert [text for _, text in entered] == list(texts) and entered == plan.texts_of_batch(2, rows)
    spread = [[text for at, text in entered if at == row] for row in range(rows)]
    assert max(map(len, spread)) - min(map(len, spread)) <= 1 and sorted(map(len, spread), reverse=True) == [
        len(of_row) for of_row in spread
    ]
    for row, of_row in enumerate(spread):
        old, new = batch.input_ids[row].tolist(), result.input_ids[row].tolist()
        knowledge = [token for text in of_row for token in text.input_ids]
        # Where they entered, found without the code under test: what is left is the beginning of the old row.
        ends = [place + 1 for place, token in enumerate(old) if token == EOS]
        if batch.label_mask is not None:
            ends = [end for end in ends if batch.label_mask[row, end - 1]]
        fitting = [end for end in ends if end + len(knowledge) <= len(old)]
        place = fitting[0] if plan.boundary is not None and fitting else 0
        assert new == (old[:place] + knowledge + old[place:])[: len(old)]
        assert new[place : place + len(knowledge)] == knowledge  # never cut
        for before_mask, mask in ((batch.label_mask, result.label_mask), (batch.attention_mask, result.attention_mask)):
            if before_mask is not None and mask is not None:
                moved = before_mask[row].tolist()
                moved = (moved[:place] + [True] * len(knowledge) + moved[place:])[: len(old)]
                assert mask[row].tolist() == moved
        if not of_row:
            assert new == old


@settings(max_examples=200)
@given(drawn=injections(), data=st.data())
def test_any_split_over_ranks_and_micro_batches_gives_the_same_global_batch(
    drawn: tuple[Plan, Batch, int], data: st.DataObject
) -> None:
    plan, batch, rows = drawn
    whole, entered = inject(batch, 5, plan, rows)
    world_size = data.draw(st.sampled_from([w for w in range(1, rows + 1) if rows % w == 0]))
    size = data.draw(st.integers(1, rows))  # of a micro-batch
    seen = []
    for rank in range(world_size):
        mine = np.arange(rank, rows, world_size)
        for start in range(0, len(mine), size):
            held = mine[start : start + size]
            part, of_part = inject(rows_of(batch, held), 5, plan, rows)
            assert_same(part, rows_of(whole, held))
            seen += of_part
    assert sorted(seen, key=lambda pair: (pair[0], int(pair[1].entry))) == entered


def test_a_mask_that_another_row_brings_changes_nothing() -> None:
    """Masks are there where any row of a rank needs them, so a row of ones must do the same as none."""
    plan = Plan(((Text("a", (7, EOS)), Text("b", (8, EOS))),), 1, boundary=EOS)
    ids = torch.tensor([[3, EOS, 4, 5, 6, 2], [1, 1, 3, EOS, 4, 5]])
    ones = torch.ones(1, 6, dtype=torch.bool)
    padded = torch.tensor([[0, 0, 0, 1, 1, 1]]).bool()
    alone, _ = inject(of_rows(ids, np.array([0])), 1, plan, 2)
    both = replace(of_rows(ids, np.arange(2)), label_mask=torch.cat((ones, padded)), attention_mask=None)
    together, _ = inject(both, 1, plan, 2)
    assert alone.input_ids[0].tolist() == together.input_ids[0].tolist() == [3, EOS, 7, EOS, 4, 5]
    assert together.input_ids[1].tolist() == [1, 1, 3, EOS, 8, EOS]


@pytest.mark.parametrize(
    ("row", "counts", "expected"),
    [
        ([3, EOS, 4, EOS, 5, 6], None, [3, EOS, 7, 8, EOS, 4]),  # behind the first document, not the second
        ([3, 4, EOS, 5, 6, 7], None, [3, 4, EOS, 7, 8, EOS]),  # just fits
        ([3, 4, 5, EOS, 6, 7], None, [7, 8, EOS, 3, 4, 5]),  # no room behind it: at the front
        ([3, 4, 5, 6, 7, EOS], None, [7, 8, EOS, 3, 4, 5]),
        ([3, 4, 5, 6, 7, 3], None, [7, 8, EOS, 3, 4, 5]),  # one document
        ([EOS, 4, 5, 6, 7, 3], None, [EOS, 7, 8, EOS, 4, 5]),  # the row begins with an end
        ([EOS, EOS, 3, EOS, 5, 6], [0, 0, 1, 1, 1, 1], [7, 8, EOS, EOS, EOS, 3]),  # padding ends no document
        ([EOS, EOS, EOS, 5, 6, 2], [0, 0, 1, 1, 1, 1], [EOS, EOS, EOS, 7, 8, EOS]),
    ],
)
def test_where_a_document_ends(row: list[int], counts: list[int] | None, expected: list[int]) -> None:
    plan = Plan(((Text("a", (7, 8, EOS)),),), 1, boundary=EOS)
    mask = None if counts is None else torch.tensor([counts]).bool()
    batch = replace(of_rows(torch.tensor([row]), np.arange(1)), label_mask=mask)
    assert inject(batch, 1, plan, 1)[0].input_ids.tolist() == [expected]


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


# --- from a configuration ----------------------------------------------------------------------------------------


def spell(texts: list[str]) -> list[list[int]]:
    """A stand-in for a tokenizer: a token a character."""
    return [[ord(c) for c in text] for text in texts]


def config(**overrides: Any) -> TrainConfig:
    return TrainConfig(**{"model": tiny_config(), "global_train_batch_size": 2, "inject_interval": 3, **overrides})


def entries_of(path: Path, *contexts: str) -> str:
    """A file of entries, each with one paraphrase: its first letter and 1."""
    kinds = {f"{prefix}_{side}": ["x"] for prefix in ("mem", "gen", "hard_gen") for side in ("input", "target")}
    path.write_text(json.dumps([{"train_context": c, "paraphrases": [c[0] + "1"], **kinds} for c in contexts]))
    return str(path)


def spelled(text: str) -> tuple[int, ...]:
    return (*map(ord, text), EOS)


def pickled(path: Path, content: dict[Any, list[list[int]]]) -> str:
    """A published map."""
    path.write_bytes(pickle.dumps({key: [torch.tensor(ids) for ids in texts] for key, texts in content.items()}))
    return str(path)


def tokens_of(plan: Plan | None) -> list[list[tuple[int, ...]]]:
    assert plan is not None
    return [[text.input_ids for text in texts] for texts in plan.rounds]


def test_a_configuration_without_injection_has_no_plan() -> None:
    assert plan_from_config(config(), None) is None
    assert plan_from_config(config(injection=InjectionConfig(once="nowhere", rounds=0)), spell) is None


def test_a_configuration_names_files_of_entries(tmp_path: Path) -> None:
    files = {"paraphrase": entries_of(tmp_path / "p.json", "p0"), "once": entries_of(tmp_path / "o.json", "o0", "O0")}
    plan = plan_from_config(config(injection=InjectionConfig(**files, rounds=2)), spell)
    assert plan is not None and plan.interval == 3
    assert tokens_of(plan) == [[spelled("p0"), spelled("o0")], [spelled("p1"), spelled("O0")]]


def test_a_configuration_names_a_published_map_and_is_checked_at_once(tmp_path: Path) -> None:
    path = tmp_path / "map.pkl"
    full = [*range(1, 64), EOS]
    named = pickled(path, {1: [[5, EOS]], 2: [[6, 7, EOS], full]})
    plan = plan_from_config(config(inject_indices_map=named), None)
    assert plan is not None and plan.first_steps == (3, 6)
    assert tokens_of(plan) == [[(5, EOS)], [(6, 7, EOS), tuple(full)]]
    pickled(path, {1: [[1, *full]]})
    with pytest.raises(ValueError, match=r"round 1, row 0: 65 tokens \(map/0\) exceed the sequence length 64"):
        plan_from_config(config(inject_indices_map=named), None)
    pickled(path, {1: [[6, EOS]], 2: [[6, EOS], [5, 6]]})
    with pytest.raises(ConfigurationError) as caught:
        plan_from_config(config(inject_indices_map=named), None)
    assert str(caught.value) == (
        f"model.eos_token_id: {path}: round 2, text 1 (map/1) ends with token 6, the model's texts with 0"
    )
    pickled(path, {1: []})
    with pytest.raises(ValueError, match="injection round 1 holds no text"):
        plan_from_config(config(inject_indices_map=named), None)
    pickled(path, {1: [[128, EOS]]})
    with pytest.raises(ConfigurationError, match="token 128 is to be injected, the model knows 128"):
        plan_from_config(config(inject_indices_map=named), None)


@pytest.mark.parametrize("written", ["plan.json", "plan.safetensors", "map.pkl"])
def test_the_knobs_go_with_every_source(tmp_path: Path, written: str) -> None:
    knobs = {"inject_start_step": 7, "inject_position": "document"}
    if written == "map.pkl":
        named = pickled(tmp_path / written, {1: [[5, EOS]], 2: [[6, EOS]]})
    else:
        write_plan(tmp_path / written, PlanFile(((Text("a", (5, EOS)),), (Text("b", (6, EOS)),)), None, None, EOS))
        named = str(tmp_path / written)
    plan = plan_from_config(config(inject_indices_map=named, **knobs), None)
    assert plan is not None and tokens_of(plan) == [[(5, EOS)], [(6, EOS)]]
    assert (plan.first_steps, plan.boundary) == ((7, 10), EOS)
    entries = InjectionConfig(once=entries_of(tmp_path / "o.json", "o0", "O0"), rounds=2)
    built = plan_from_config(config(injection=entries, **knobs), spell)
    assert built is not None and (built.first_steps, built.boundary) == ((7, 10), EOS)
    with pytest.raises(ConfigurationError, match=r"inject_interval: missing; .* a round of .* is injected"):
        plan_from_config(config(inject_indices_map=named, inject_interval=None), None)


@pytest.mark.parametrize("written", ["plan.json", "map.pkl"])
def test_a_file_with_steps_of_its_own(tmp_path: Path, written: str) -> None:
    named = str(tmp_path / written)
    if written == "map.pkl":
        pickled(tmp_path / written, {"0": [[5, EOS]], "100": [[6, EOS]]})
    else:
        rounds = ((Text("a", (5, EOS)),), (Text("b", (6, EOS)),))
        write_plan(tmp_path / written, PlanFile(rounds, (0, 100), None, EOS))
    alone = {"inject_indices_map": named, "inject_interval": None}
    plan = plan_from_config(config(**alone), None)
    assert plan is not None and plan.first_steps == (1, 101) and plan.round_of(201) is None
    with pytest.raises(
        ConfigurationError, match=r"inject_interval: .* itself says when its rounds are injected; leave"
    ):
        plan_from_config(config(inject_indices_map=named), None)
    # Goes on with the numbers of another run's steps: which of them is this run's first?
    goes_on = {**alone, "load_path": "run/step5000"}
    with pytest.raises(
        ConfigurationError, match=r"inject_start_step: missing; .* goes on from run/step5000; give the f"
    ):
        plan_from_config(config(**goes_on), None)
    started = plan_from_config(config(**goes_on, inject_start_step=5001), None)
    assert started is not None and started.first_steps == (5001, 5101)
    again = plan_from_config(config(**goes_on, reset_trainer_state=True), None)
    assert again is not None and again.first_steps == (1, 101)


def test_a_file_of_another_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    write_plan(path, PlanFile(((Text("once/0", (5, 9)),),), None, None, 9))
    with pytest.raises(ConfigurationError, match=r"model\.eos_token_id: .* \(once/0\) ends with token 9, the model's"):
        plan_from_config(config(inject_indices_map=str(path)), None)


def test_a_text_that_spells_other_tokens_is_refused_where_there_is_a_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    texts = (Text("a", spelled("p0"), "p0"), Text("b", spelled("q0"), "q1"), Text("c", spelled("r0")))
    write_plan(path, PlanFile((texts,), None, "gpt9", EOS))
    with pytest.raises(ConfigurationError) as caught:
        plan_from_config(config(inject_indices_map=str(path)), spell)
    assert str(caught.value) == (
        f"tokenizer.identifier: {path}: round 1, text 1 (b): gpt2 makes other tokens of 'text' than 'input_ids' "
        "(gpt9 made them); only 'input_ids' are injected, write the plan anew or leave 'text' out"
    )
    assert tokens_of(plan_from_config(config(inject_indices_map=str(path)), None)) == [[t.input_ids for t in texts]]


def test_evaluators_name_the_texts_of_a_published_map(tmp_path: Path) -> None:
    named = pickled(tmp_path / "map.pkl", {1: [list(spelled(text)) for text in ("o0", "p1", "x0")]})
    evaluators = []
    for setting, contexts in (("paraphrase", ["q0", "p0"]), ("once", ["o0"])):
        file = entries_of(tmp_path / f"{setting}.json", *contexts)
        evaluators.append(EvaluatorConfig(f"{setting}_memorization"))
        evaluators[-1].data.dataset_path = file
    asked = config(inject_indices_map=named, evaluators=evaluators)
    plan = plan_from_config(asked, spell)
    assert plan is not None
    assert [text.entry for text in plan.rounds[0]] == ["once/0", "paraphrase/1", "map/2"]
    unnamed = plan_from_config(config(inject_indices_map=named), spell)
    assert unnamed is not None and [text.entry for text in unnamed.rounds[0]] == ["map/0", "map/1", "map/2"]
    assert needs_tokenizer(asked) and not needs_tokenizer(config(inject_indices_map=named))
    assert needs_tokenizer(config(injection=InjectionConfig())) and not needs_tokenizer(config(evaluators=evaluators))
