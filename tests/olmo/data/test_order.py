"""The order in which a run sees its instances: OLMo's rule."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from olmo.data import order as order_module
from olmo.data.order import EpochOrder, OrderFile, build_order, check_places, instances_at, verify_order, write_order
from olmo.data.sources import TokenFiles
from tests.serving import serving


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


# --- on disk -----------------------------------------------------------------------------------------------------


@given(
    count=st.integers(1, 70),
    seed=st.integers(0, 2**32),
    epoch=st.integers(0, 5),
    world_size=st.integers(1, 150),
    drop_last=st.booleans(),
    shuffle=st.booleans(),
    first=st.none() | st.integers(0, 80),
    piece=st.integers(1, 80),
    traced=st.integers(0, 80),
    in_memory=st.booleans(),
)
def test_the_file_is_what_is_built_in_memory(
    tmp_path_factory: pytest.TempPathFactory,
    count: int,
    seed: int,
    epoch: int,
    world_size: int,
    drop_last: bool,
    shuffle: bool,
    first: int | None,
    piece: int,
    traced: int,
    in_memory: bool,
) -> None:
    folder = tmp_path_factory.mktemp("order")
    expected = build_order(count, seed, epoch, world_size, drop_last, shuffle)[:first]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order_module, "PIECE", piece)
        patch.setattr(order_module, "SMALL", 1)
        patch.setattr(order_module, "MOST_TRACED", traced)
        patch.setattr(order_module, "_free_memory", lambda: 10**9 if in_memory else 0)
        write_order(folder / "order.npy", count, seed, epoch, world_size, drop_last, shuffle, first)
    assert (folder / "order.npy").read_bytes() == expected.astype("<u4").tobytes()
    assert [path.name for path in folder.iterdir()] == ["order.npy"]


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_shuffle_equals_numpys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_memory: bool) -> None:
    """Large enough for every page to be visited more than once."""
    monkeypatch.setattr(order_module, "_free_memory", lambda: 10**9 if in_memory else 0)
    write_order(tmp_path / "order.npy", 300_000, 6198, 0)
    expected = np.arange(300_000, dtype=np.uint32)
    np.random.Generator(np.random.PCG64(6198)).shuffle(expected)
    np.testing.assert_array_equal(np.fromfile(tmp_path / "order.npy", "<u4"), expected)


@given(
    count=st.integers(1, 20_000),
    seed=st.integers(0, 2**32),
    epoch=st.integers(0, 3),
    asked=st.lists(st.integers(0, 19_999), max_size=60),
    run=st.tuples(st.integers(0, 19_999), st.integers(0, 40)),
    piece=st.sampled_from([100, 999, 2**20]),
)
def test_places_are_traced(
    count: int, seed: int, epoch: int, asked: list[int], run: tuple[int, int], piece: int
) -> None:
    """Places anywhere, in any order, some of them twice, and places in a row."""
    places = np.array([*asked, *range(run[0], sum(run))], dtype=np.int64) % count
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order_module, "SMALL", 1)
        patch.setattr(order_module, "LARGEST_PIECE", piece)
        traced = instances_at(places, count, seed, epoch)
    assert traced.dtype == np.uint32
    assert traced.tolist() == build_order(count, seed, epoch)[places].tolist()


def test_places_of_many_instances_are_traced() -> None:
    """Around a power of two, where numbers have one bit more; at the front, in the middle, and the last ones."""
    for count in (2**21 + 3, 3_000_000):
        whole = build_order(count, 6198, 0)
        for start in (0, 1, 1_000_000, count - 2048):
            places = np.arange(start, start + 2048)
            np.testing.assert_array_equal(instances_at(places, count, 6198, 0), whole[places])


def test_an_order_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    np.arange(1000, dtype="<u4").tofile(tmp_path / "order.npy")
    order = OrderFile(tmp_path / "order.npy")
    np.arange(10, dtype="<u4").tofile(tmp_path / "order.npy")
    assert order.read(0, 10).tolist() == list(range(10))
    with pytest.raises(ValueError, match=r"order\.npy: the file has 40 bytes now, it had 4000$"):
        order.read(5, 11)


# --- an epoch by place -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("way", ["in memory", "in a file", "traced"])
def test_an_epoch_by_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, shuffle: bool) -> None:
    monkeypatch.setattr(order_module, "LARGE", 10**6 if way == "in memory" else 100)
    monkeypatch.setattr(order_module, "SMALL", 1)
    folder = tmp_path / "run" / "train_data" if way == "in a file" else None
    expected = build_order(1000, 7, 2, shuffle=shuffle)
    order = EpochOrder(1000, 7, 2, shuffle, folder)
    places = np.array([3, 500, 0, 999, 3])
    assert order.at(places).tolist() == expected[places].tolist()
    assert order.at(np.arange(1000)).tolist() == expected.tolist()
    if folder is not None and shuffle:
        assert (folder / "global_indices_1000_seed9.npy").read_bytes() == expected.tobytes()


def test_what_a_killed_process_left_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order_module, "LARGE", 100)
    expected = build_order(1000, 7, 2)
    path = tmp_path / "global_indices_1000_seed9.npy"
    path.write_bytes(expected[:500].tobytes())
    (tmp_path / f".{path.stem}.999999.partial.npy").write_bytes(b"half")
    assert EpochOrder(1000, 7, 2, folder=tmp_path).at(np.arange(1000)).tolist() == expected.tolist()
    assert sorted(p.name for p in tmp_path.iterdir()) == [path.name]


def test_the_file_of_an_epoch_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order_module, "LARGE", 10)
    written = []

    def write(path: Path, *args: int) -> None:
        written.append(args)
        time.sleep(0.05)  # long enough for the others to come
        write_order(path, *args)

    monkeypatch.setattr(order_module, "write_order", write)
    with ThreadPoolExecutor(4) as pool:
        orders = list(pool.map(lambda _: EpochOrder(100, 5, 1, folder=tmp_path), range(4)))
    assert written == [(100, 5, 1)]
    assert EpochOrder(100, 6, 0, folder=tmp_path).at(np.arange(100)).tolist() == build_order(100, 5, 1).tolist()
    assert all(order.at(np.arange(100)).tolist() == build_order(100, 5, 1).tolist() for order in orders)
    assert len(written) == 1
    EpochOrder(100, 5, 2, folder=tmp_path)
    EpochOrder(101, 5, 1, folder=tmp_path)
    assert written[1:] == [(100, 5, 2), (101, 5, 1)]


@pytest.mark.parametrize(("first", "free"), [(None, 39), (3, 11)])
def test_a_disk_that_is_too_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: int | None, free: int
) -> None:
    usage = type("Usage", (), {"free": free})()
    monkeypatch.setattr(order_module.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"0\.0 GB for the order do not fit on this disk"):
        write_order(tmp_path / "order.npy", 10, 0, 0, first=first)
    assert not list(tmp_path.iterdir())


@given(count=st.integers(1, 60), seed=st.integers(0, 99), data=st.data())
def test_a_slice_is_a_slice_of_what_is_built(
    tmp_path_factory: pytest.TempPathFactory, count: int, seed: int, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("order") / "order.npy"
    write_order(path, count, seed, 0)
    start = data.draw(st.integers(0, count))
    stop = data.draw(st.integers(start, count))
    read = OrderFile(path).read(start, stop)
    assert len(OrderFile(path)) == count and read.dtype == np.uint32
    assert read.tolist() == build_order(count, seed, 0)[start:stop].tolist()


def test_a_remote_slice_brings_its_bytes_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    built = build_order(100_000, 6198, 0)
    with serving() as server:
        place = server.add("", {"order.npy": built.tobytes()}) + "order.npy"
        for _ in range(2):
            assert OrderFile(place).read(10, 58).tolist() == built[10:58].tolist()
        assert [(asked.range, asked.sent) for asked in server.asked] == [("bytes=40-231", 192)]
        assert server.heads == ["/order.npy"]


def test_order_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.npy: no such data order"):
        OrderFile(tmp_path / "nowhere.npy")
    (tmp_path / "odd.npy").write_bytes(bytes(10))
    with pytest.raises(ValueError, match=r"odd\.npy: 10 bytes are no whole number of 32-bit places"):
        OrderFile(tmp_path / "odd.npy")
    (tmp_path / "two.npy").write_bytes(bytes(8))
    with pytest.raises(ValueError, match=r"two\.npy: places 1 to 3 of a data order that has 2"):
        OrderFile(tmp_path / "two.npy").read(1, 3)


# --- against the files -------------------------------------------------------------------------------------------

COUNT = 500


@pytest.fixture
def source(tmp_path: Path) -> TokenFiles:
    for name, count in (("a", 300), ("b", 200)):
        np.zeros(count * 4 + 1, dtype="<u2").tofile(tmp_path / f"{name}.npy")
    return TokenFiles([tmp_path / "a.npy", tmp_path / "b.npy"], 4)


@pytest.mark.parametrize("piece", [7, 64, 1000])
@pytest.mark.parametrize(
    ("drop_last", "world_size", "known"),
    [(True, 1, 1), (True, 64, 64), (True, 7, None), (False, 64, 64), (False, 7, None)],
)
def test_a_right_order(
    tmp_path: Path,
    source: TokenFiles,
    monkeypatch: pytest.MonkeyPatch,
    piece: int,
    drop_last: bool,
    world_size: int,
    known: int | None,
) -> None:
    monkeypatch.setattr(order_module, "PIECE", piece)
    write_order(tmp_path / "order.npy", COUNT, 3, 0, world_size, drop_last)
    verify_order(OrderFile(tmp_path / "order.npy"), source, drop_last, known)


def beyond(order: NDArray[np.uint32]) -> tuple[NDArray[np.uint32], str]:
    order[450] = 501
    return order, r"place 450 is instance 501, the data set has 500 \(2 files, 4004 bytes, the last .*b\.npy of 1602 b"


def longer(order: NDArray[np.uint32]) -> tuple[NDArray[np.uint32], str]:
    return build_order(
        600, 3, 0
    ), r"place \d+ is instance 5\d\d, the data set has 500 .*b\.npy of 1602 bytes\): data or"


def repeated(order: NDArray[np.uint32]) -> tuple[NDArray[np.uint32], str]:
    order[450] = order[20]
    return order, rf"place 450 is instance {order[20]}, which came before"


def repeated_soon(order: NDArray[np.uint32]) -> tuple[NDArray[np.uint32], str]:
    order[21] = order[20]
    return order, rf"place 21 is instance {order[20]}, which came before"


def unshuffled(order: NDArray[np.uint32]) -> tuple[NDArray[np.uint32], str]:
    return np.arange(COUNT, dtype=np.uint32), "not shuffled; 500 of 500 instances stand where the files have them"


def incomplete(order: NDArray[np.uint32]) -> tuple[NDArray[np.uint32], str]:
    return order[:400], r"400 places, expected 500 for 500 instances .*: the order is incomplete"


@pytest.mark.parametrize("piece", [7, 64, 1000])
@pytest.mark.parametrize("wrong", [beyond, longer, repeated, repeated_soon, unshuffled, incomplete])
def test_a_wrong_order_is_named(
    tmp_path: Path,
    source: TokenFiles,
    monkeypatch: pytest.MonkeyPatch,
    piece: int,
    wrong: Callable[[NDArray[np.uint32]], tuple[NDArray[np.uint32], str]],
) -> None:
    monkeypatch.setattr(order_module, "PIECE", piece)
    order, said = wrong(build_order(COUNT, 3, 0))
    order.astype("<u4").tofile(tmp_path / "order.npy")
    with pytest.raises(ValueError, match=said):
        verify_order(OrderFile(tmp_path / "order.npy"), source, True, 1)


def test_a_wrong_end(tmp_path: Path, source: TokenFiles) -> None:
    order = build_order(COUNT, 3, 0, 64, drop_last=False)
    order[-1], order[-2] = order[-2], order[-1]
    order.tofile(tmp_path / "order.npy")
    with pytest.raises(ValueError, match="places from 500 on should repeat the first ones"):
        verify_order(OrderFile(tmp_path / "order.npy"), source, False, 64)


@pytest.mark.parametrize("count", [0, 20, 494, 506])
def test_a_length_that_no_run_of_few_ranks_has(tmp_path: Path, source: TokenFiles, count: int) -> None:
    """More than a hundredth is missing or too much, of an order that may be that of other data."""
    np.resize(build_order(COUNT, 3, 0), count).tofile(tmp_path / "order.npy")
    with pytest.raises(ValueError, match=rf"{count} places, expected about 500 .* the number of ranks of the run"):
        verify_order(OrderFile(tmp_path / "order.npy"), source, drop_last=count < COUNT)


def test_numbers_of_64_bits(tmp_path: Path) -> None:
    np.zeros(20_000, dtype="<u2").tofile(tmp_path / "a.npy")
    source = TokenFiles([tmp_path / "a.npy"], 4)
    build_order(5000, 3, 0).astype("<i8").tofile(tmp_path / "order.npy")
    order = OrderFile(tmp_path / "order.npy")
    with pytest.raises(ValueError, match=r"10000 places for 5000 instances .*, or no order of 32-bit numbers"):
        check_places(order, 0, order.read(0, 10), source)
