"""The order in which a run sees its instances: OLMo's rule, and its headerless file."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from olmo.data.order import build_order, load_order


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


def test_file_is_headerless_and_little_endian(tmp_path: Path) -> None:
    path = tmp_path / "global_indices.npy"
    path.write_bytes(bytes([1, 0, 0, 0, 0, 1, 0, 0, 255, 255, 255, 255]))
    order = load_order(path)
    assert order.dtype == np.uint32
    assert order.tolist() == [1, 256, 2**32 - 1]


def test_file_round_trip(tmp_path: Path) -> None:
    order = build_order(1000, 1, 2, world_size=3)
    order.astype("<u4").tofile(tmp_path / "a.npy")
    assert np.array_equal(load_order(tmp_path / "a.npy"), order)
    assert np.array_equal(load_order(str(tmp_path / "a.npy")), order)


def test_file_is_mapped_and_read_only(tmp_path: Path) -> None:
    np.arange(4, dtype="<u4").tofile(tmp_path / "a.npy")
    order = load_order(tmp_path / "a.npy")
    assert isinstance(order, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        order[0] = 1


@pytest.mark.parametrize("size", [0, 3, 5, 4095])
def test_size_that_fits_no_whole_number(tmp_path: Path, size: int) -> None:
    (tmp_path / "a.npy").write_bytes(bytes(size))
    with pytest.raises(ValueError, match=rf"a\.npy: {size} bytes are no whole number of 32-bit instance numbers"):
        load_order(tmp_path / "a.npy")


def test_missing_file_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"a\.npy: no such data order; scripts/get_dataorder\.sh"):
        load_order(tmp_path / "a.npy")
