"""The steps of a plan's rounds, and plans that cannot be injected."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from olmo.knowledge.plan import Plan, Text

EOS = 0


def of_rounds(count: int, *timing: int | None, **knobs: tuple[int, ...]) -> Plan:
    return Plan(tuple((Text(str(r), (1,)),) for r in range(count)), *timing, **knobs)  # type: ignore[arg-type]


@given(interval=st.integers(1, 7), rounds=st.integers(1, 10), step=st.integers(0, 200))
def test_the_round_of_a_step(interval: int, rounds: int, step: int) -> None:
    plan = of_rounds(rounds, interval)
    due = step > 0 and step % interval == 0
    assert plan.round_of(step) == ((step // interval - 1) % rounds + 1 if due else None)


def test_rounds_start_again_after_the_tenth() -> None:
    plan = of_rounds(10, 160)
    due = {step: plan.round_of(step) for step in range(0, 3361) if plan.round_of(step) is not None}
    assert list(due) == list(range(160, 3361, 160))
    assert list(due.values()) == [*range(1, 11), *range(1, 11), 1]


@given(interval=st.integers(1, 7), rounds=st.integers(1, 5), start=st.integers(1, 30))
def test_a_start_step_moves_all_rounds(interval: int, rounds: int, start: int) -> None:
    plan = of_rounds(rounds, interval, start)
    expected = {start + number * interval: number % rounds + 1 for number in range(20)}
    found = {step: plan.round_of(step) for step in range(start + 20 * interval) if plan.round_of(step) is not None}
    assert found == expected


@given(passed=st.sets(st.integers(0, 40), min_size=1, max_size=6), start=st.none() | st.integers(1, 9))
def test_rounds_with_steps_of_their_own_come_once(passed: set[int], start: int | None) -> None:
    plan = of_rounds(len(passed), None, start, steps_passed=tuple(sorted(passed)))
    found = {step: plan.round_of(step) for step in range(200) if plan.round_of(step) is not None}
    assert found == {(start or 1) + before: number for number, before in enumerate(sorted(passed), start=1)}


@given(data=st.data(), first=st.integers(1, 30), last=st.integers(0, 40), start=st.none() | st.integers(1, 20))
def test_how_many_rounds_fall_within_a_run(data: st.DataObject, first: int, last: int, start: int | None) -> None:
    passed = data.draw(st.none() | st.sets(st.integers(0, 40), min_size=1, max_size=5))
    if passed is None:
        plan = of_rounds(data.draw(st.integers(1, 4)), data.draw(st.integers(1, 9)), start)
    else:
        plan = of_rounds(len(passed), None, start, steps_passed=tuple(sorted(passed)))
    counted = {plan.round_of(step) for step in range(first, last + 1)} - {None}
    assert plan.rounds_within(first, last) == len(counted)


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


def test_all_rows_that_overflow_are_one_error() -> None:
    plan = Plan(tuple((Text(f"once/{number}", (1,) * number),) for number in range(1, 10)), 1)
    with pytest.raises(ValueError) as caught:
        plan.check(global_batch_size=1, sequence_length=2)
    listed = "; ".join(f"injection round {n}, row 0: {n} tokens (once/{n})" for n in range(3, 8))
    assert str(caught.value).startswith(f"{listed}; and 2 more exceed the sequence length 2; use shorter texts")


def test_texts_that_are_repeated() -> None:
    """Under another name anywhere, or in one round; the same entry in several rounds is what `duplicate` asks for."""
    first, again = Text("once/0", (1, 2)), Text("duplicate/0", (3, 4))
    assert Plan(((first, again), (again,)), 1).repeated() == []
    assert Plan(((first, first), (Text("once/7", (1, 2)), again)), 1).repeated() == [
        "round 1: once/0 is the text of once/0",
        "round 2: once/7 is the text of once/0",
    ]


def test_a_round_without_texts_is_an_error() -> None:
    with pytest.raises(ValueError) as caught:
        Plan(((Text("a", (1,)),), ()), 1).check(4, 4)
    assert str(caught.value) == "injection round 2 holds no text"


def published_rows(texts: list[str], batch_size: int, processes: int) -> dict[int, list[str]]:
    """Row of the global batch -> the texts that the published trainer inserts there.

    `insert_data` of kaistAI/Knowledge-Entropy, olmo/train.py, on every rank; `IterableDataset` gives rank r the rows
    r, r + W, r + 2 W, ... of the global batch.
    """
    concatenated = [[text] for text in texts]
    if max(1, 128 // batch_size) > 1:
        each, more = divmod(len(texts), batch_size)
        remaining = iter(texts)
        concatenated = [[next(remaining) for _ in range(each + (row < more))] for row in range(batch_size)]
    own = batch_size // processes
    found = {}
    for rank in range(processes):
        for number, inserted in enumerate(concatenated):
            if rank * own <= number < rank * own + own:
                found[(number - rank * own) * processes + rank] = inserted
    return found


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("batch_size", [4, 16, 64, 68, 72, 76, 128, 2048])
def test_rows_are_the_published_ones_on_one_process(batch_size: int, processes: int) -> None:
    """docs/differences.md: with several, the texts of a row move together to another; some batches lose texts."""
    texts = [str(number) for number in range(76)]
    plan = Plan((tuple(Text(text, (1, EOS)) for text in texts),), 1)
    ours: dict[int, list[str]] = {}
    for row, text in plan.texts_of_batch(1, batch_size):
        ours.setdefault(row, []).append(text.entry)
    published = published_rows(texts, batch_size, processes)
    own = batch_size // processes
    moved = {row: row % own * processes + row // own for row in ours}
    dropped = 76 - batch_size if 64 < batch_size < 76 else 0
    if dropped:  # ours has two texts in each of the first rows
        assert sum(map(len, ours.values())) == 76 and sum(map(len, published.values())) == 76 - dropped
        assert sorted(text for inserted in published.values() for text in inserted) == sorted(texts[:batch_size])
    else:
        assert published == {moved[row]: inserted for row, inserted in ours.items()}
        assert (published == ours) == (processes == 1 or own == 1)
    if (batch_size, processes) == (128, 4):
        assert [moved[i] for i in (0, 1, 2, 31, 32, 75)] == [0, 4, 8, 124, 1, 46]
