"""Injection against a direct transcription of the method (section 3) and its laws."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from olmo.data.loader import Batch
from olmo.knowledge.injection import inject
from olmo.knowledge.plan import Plan, Text

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
