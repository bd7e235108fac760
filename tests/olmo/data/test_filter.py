"""Which instances repeat themselves: against the definition written out, token by token."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from olmo.config import InstanceFilterConfig
from olmo.data.filter import repeats_itself


def by_definition(row: list[int], config: InstanceFilterConfig) -> bool:
    for period in range(config.repetition_min_period, min(config.repetition_max_period, len(row) // 3) + 1):
        for start in range(len(row)):
            end = start + period
            while end < len(row) and row[end] == row[end - period]:
                end += 1
            if end <= len(row) and (end - start) // period >= config.repetition_max_count:
                return True
    return False


@st.composite
def repetitive(draw: st.DrawFn) -> list[int]:
    noise = st.lists(st.integers(0, 3), max_size=8)
    phrase = draw(st.lists(st.integers(0, 9), min_size=1, max_size=5))
    times = draw(st.integers(1, 8))
    return [*draw(noise), *(phrase * times), *phrase[: draw(st.integers(0, 4))], *draw(noise), *range(9)]


@given(repetitive(), st.integers(1, 3), st.integers(1, 6), st.integers(3, 7))
def test_repetition_is_found_where_it_is(row: list[int], low: int, high: int, count: int) -> None:
    config = InstanceFilterConfig(high, low, count)
    assert bool(repeats_itself(np.array([row]), config)[0]) == by_definition(row, config)


def test_official_setting() -> None:
    rows = np.tile(np.arange(300), (4, 1))
    rows[1, 40:72] = 7  # 32 times one token
    rows[2, 40:71] = 7  # 31 times
    rows[3, 10 : 10 + 13 * 20] = np.tile(np.arange(13), 20)  # 20 times thirteen tokens
    assert repeats_itself(rows, InstanceFilterConfig()).tolist() == [False, True, False, False]
