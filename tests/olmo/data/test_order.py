"""The order in which a run sees its instances: OLMo's rule."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from olmo.data.order import build_order


def by_the_rule(count: int, seed: int, world_size: int, drop_last: bool, shuffle: bool) -> list[int]:
    """Shuffle arange(n); then cut to a multiple of the world size, or repeat from the front up to the next one."""
    order = np.arange(count)
    if shuffle:
        np.random.Generator(np.random.PCG64(seed)).shuffle(order)
    places = order.tolist()
    if drop_last:
        while len(places) % world_size:
            places.pop()
        return places
    padded = list(places)
    while len(padded) % world_size:
        padded.append(places[(len(padded) - count) % count])
    return padded


@given(
    count=st.integers(1, 70),
    seed=st.integers(0, 2**32),
    epoch=st.integers(0, 5),
    world_size=st.integers(1, 150),
    drop_last=st.booleans(),
    shuffle=st.booleans(),
)
def test_olmos_rule(count: int, seed: int, epoch: int, world_size: int, drop_last: bool, shuffle: bool) -> None:
    order = build_order(count, seed, epoch, world_size, drop_last, shuffle)
    assert order.dtype == np.uint32
    assert order.tolist() == by_the_rule(count, seed + epoch, world_size, drop_last, shuffle)


GOLDEN = [[9, 4, 3, 2, 6, 0, 10, 11, 7, 8, 1, 5], [9, 11, 4, 8, 5, 6, 2, 1, 10, 3, 0, 7]]


def test_the_order_of_a_seed_never_changes() -> None:
    """Written down, because a run cannot be repeated should numpy's shuffle ever give another order."""
    assert build_order(12, 6198, 0).tolist() == GOLDEN[0]
    assert build_order(12, 6198, 1).tolist() == GOLDEN[1]
    assert build_order(12, 6199, 0).tolist() == GOLDEN[1]


@given(st.integers(1, 200), st.integers(0, 100))
def test_every_instance_once(count: int, seed: int) -> None:
    assert sorted(build_order(count, seed, 0).tolist()) == list(range(count))


def test_too_many_instances_for_32_bits() -> None:
    with pytest.raises(ValueError, match="4294967295 instances do not fit"):
        build_order(2**32 - 1, 0, 0)


# --- the file ---
