"""Batches of texts of unequal length."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from olmo.eval.batches import batched_by_length


@given(st.lists(st.integers(1, 300), max_size=80), st.integers(1, 2000))
def test_every_text_once_within_the_room_and_hardly_padded(lengths: list[int], room: int) -> None:
    lengths.sort(reverse=True)
    cut = list(batched_by_length(lengths, room))
    assert [text for part in cut for text in range(part.start, part.stop)] == list(range(len(lengths)))
    for part in cut:
        longest, shortest, count = lengths[part.start], lengths[part.stop - 1], part.stop - part.start
        assert count == 1 or count * longest <= room
        assert longest - shortest <= shortest / 7
    for part, following in itertools.pairwise(cut):  # no batch ends without a reason
        longest, more = lengths[part.start], part.stop - part.start + 1
        assert more * longest > room or longest - lengths[following.start] > lengths[following.start] / 7
