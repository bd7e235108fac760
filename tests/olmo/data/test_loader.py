"""Who gets what, and where a restart goes on."""

import itertools
import random
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from olmo.config import DataConfig, TrainConfig
from olmo.data import order as order_module
from olmo.data.loader import Batch, Loader, run_loader
from olmo.data.masks import Masks
from olmo.data.order import EpochOrder, build_order
from olmo.data.sources import PADDING
from olmo.distributed import ABANDONABLE
from tests.reference import tiny_config


class Counting:
    """Instance i holds i, i + 1, i + 2; remembers what was read."""

    sequence_length = 3

    def __init__(self, count: int):
        self.count = count
        self.reads = 0

    def __len__(self) -> int:
        return self.count

    def read(self, indices: Sequence[int] | NDArray[np.integer]) -> NDArray[np.int64]:
        self.reads += 1
        return np.asarray(indices, dtype=np.int64)[:, None] + np.arange(3)


@st.composite
def setups(draw: st.DrawFn) -> dict:
    """A data set, a batch size and a number of ranks that fit together."""
    world_size = draw(st.integers(1, 5))
    batch_size = world_size * draw(st.integers(1, 4))
    return {
        "count": draw(st.integers(batch_size, 60)),
        "batch_size": batch_size,
        "world_size": world_size,
        "seed": draw(st.integers(0, 2**16)),
        "shuffle": draw(st.booleans()),
    }


def loader(setup: dict, rank: int, world_size: int | None = None) -> Loader:
    return Loader(
        Counting(setup["count"]),
        setup["batch_size"],
        setup["seed"],
        shuffle=setup["shuffle"],
        rank=rank,
        world_size=world_size or setup["world_size"],
    )


def together(parts: list[Batch], size: int) -> list[int]:
    """The instances of a global batch from the parts of its ranks, each row given exactly once."""
    placed: dict[int, int] = {}
    for part in parts:
        assert part.input_ids.tolist() == [[i, i + 1, i + 2] for i in part.instances.tolist()]
        assert len(part.rows) == size // len(parts)
        for row, instance in zip(part.rows.tolist(), part.instances.tolist(), strict=True):
            assert row not in placed
            placed[row] = instance
    assert sorted(placed) == list(range(size))
    return [placed[row] for row in range(size)]


def same(a: Batch, b: Batch) -> bool:
    return (
        a.input_ids.equal(b.input_ids) and np.array_equal(a.instances, b.instances) and np.array_equal(a.rows, b.rows)
    )


# --- laws ---


@given(setup=setups(), epoch=st.integers(0, 3))
def test_the_ranks_together_see_the_global_order(setup: dict, epoch: int) -> None:
    ranks = [loader(setup, rank) for rank in range(setup["world_size"])]
    order = build_order(setup["count"], setup["seed"], epoch, shuffle=setup["shuffle"]).tolist()
    batches = {rank.batches_per_epoch for rank in ranks}
    assert batches == {len(order) // setup["batch_size"]}
    seen = []
    for number in range(batches.pop()):
        seen += together([rank.batch(epoch, number) for rank in ranks], setup["batch_size"])
    assert seen == order[: len(seen)]
    assert len(order) - len(seen) < setup["batch_size"]


@given(setup=setups())
def test_rows_go_to_the_ranks_in_turn(setup: dict) -> None:
    for rank in range(setup["world_size"]):
        rows = loader(setup, rank).batch(0, 0).rows
        assert rows.tolist() == list(range(rank, setup["batch_size"], setup["world_size"]))


@settings(max_examples=30)
@given(setup=setups(), epoch=st.integers(0, 2), number=st.integers(0, 60))
def test_a_restart_replays_and_skips_nothing(setup: dict, epoch: int, number: int) -> None:
    """The batches from any position on are those of an uninterrupted run, across the ends of epochs."""
    rank = setup["world_size"] - 1
    uninterrupted = loader(setup, rank)
    per_epoch = uninterrupted.batches_per_epoch
    number %= per_epoch
    skipped = epoch * per_epoch + number
    whole = uninterrupted.batches()
    restarted = loader(setup, rank).batches(epoch, number)
    for expected, batch in zip(itertools.islice(whole, skipped, skipped + per_epoch + 2), restarted):
        assert same(expected, batch)
    whole.close()  # type: ignore[attr-defined]
    restarted.close()  # type: ignore[attr-defined]


@settings(max_examples=30)
@given(
    setup=setups(),
    place=st.integers(0, 40),
    workers=st.integers(1, 4),
    ahead=st.integers(0, 9),
    seed=st.integers(0, 2**16),
)
def test_ranks_and_workers_see_the_global_order_from_any_restart(
    setup: dict, place: int, workers: int, ahead: int, seed: int
) -> None:
    """However long each read takes, and over the end of an epoch: together they see the order, place by place."""

    class Slow(Counting):
        def read(self, indices: Sequence[int] | NDArray[np.integer]) -> NDArray[np.int64]:
            time.sleep(chance.random() / 500)
            return super().read(indices)

    chance = random.Random(seed)
    size, world_size = setup["batch_size"], setup["world_size"]
    running = []
    for rank in range(world_size):
        one = loader(setup, rank)
        one.source, one.workers, one.ahead = Slow(setup["count"]), workers, ahead
        running.append(one.batches(*divmod(place, one.batches_per_epoch)))
    per_epoch = one.batches_per_epoch
    for step in range(place, place + min(per_epoch, 4) + 1):
        epoch, number = divmod(step, per_epoch)
        order = build_order(setup["count"], setup["seed"], epoch, shuffle=setup["shuffle"]).tolist()
        expected = order[number * size : (number + 1) * size]
        assert together([next(rank) for rank in running], size) == expected
    for rank in running:
        rank.close()  # type: ignore[attr-defined]
    assert ended()


@settings(max_examples=30)
@given(setup=setups(), other=st.integers(1, 5))
def test_a_restart_may_have_another_number_of_ranks(setup: dict, other: int) -> None:
    """Global batches do not depend on how many ranks share them."""
    setup = {**setup, "batch_size": setup["world_size"] * other}
    if setup["count"] < setup["batch_size"]:
        return
    for epoch, number in ((0, 0), (1, setup["count"] // setup["batch_size"] - 1)):
        before, after = (
            together([loader(setup, rank, size).batch(epoch, number) for rank in range(size)], setup["batch_size"])
            for size in (setup["world_size"], other)
        )
        assert before == after


@given(setup=setups(), epochs=st.lists(st.integers(0, 3), min_size=1, max_size=4))
def test_batches_do_not_depend_on_what_was_asked_before(setup: dict, epochs: list[int]) -> None:
    used = loader(setup, 0)
    for epoch in epochs:
        assert same(used.batch(epoch, 0), loader(setup, 0).batch(epoch, 0))


# --- epochs ---


def test_each_epoch_is_shuffled_anew() -> None:
    shuffled = Loader(Counting(40), 4, seed=7)
    epochs = [[i for n in range(10) for i in shuffled.batch(epoch, n).instances.tolist()] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(40)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert epochs[1] == build_order(40, seed=8, epoch=0).tolist()  # seed + epoch, as in OLMo


def test_without_shuffling_every_epoch_is_in_the_order_of_the_files() -> None:
    plain = Loader(Counting(7), 3, seed=7, shuffle=False)
    taken = [batch.instances.tolist() for batch in itertools.islice(plain.batches(), 4)]
    assert taken == [[0, 1, 2], [3, 4, 5], [0, 1, 2], [3, 4, 5]]


def test_the_loader_of_a_configuration(tmp_path: Path) -> None:
    np.arange(400, dtype="<u2").tofile(tmp_path / "a.npy")
    (tmp_path / "a.mask").write_bytes(bytes(range(2)) * 200)
    model = tiny_config(max_sequence_length=4, vocab_size=500, embedding_size=512, pad_token_id=7)
    data = DataConfig(paths=[str(tmp_path / "a.npy")], label_mask_paths=[str(tmp_path / "a.mask")], seed=5)
    config = TrainConfig(seed=9, model=model, data=data, global_train_batch_size=6)
    made = run_loader(config, 1, 3, order_folder=tmp_path, keep=False)
    assert (made.global_batch_size, made.seed, made.shuffle, made.vocabulary) == (6, 5, True, 512)
    assert (made.rank, made.world_size, made.order_folder, made.source.keep) == (1, 3, tmp_path, False)  # type: ignore[attr-defined]
    assert (made.workers, made.ahead, made.pin_memory) == (1, 1, False)
    batch = made.batch(0, 0)
    assert batch.instances.tolist() == build_order(100, 5, 0)[[1, 4]].tolist()
    assert batch.label_mask is not None and batch.label_mask.int().tolist() == [[0, 1, 0, 1]] * 2
    for workers, factor, expected in ((0, 4, (1, 4)), (3, None, (3, 6)), (2, 5, (2, 10))):
        config.data.num_workers, config.data.prefetch_factor = workers, factor
        made = run_loader(config)
        assert (made.workers, made.ahead) == expected and made.source.keep  # type: ignore[attr-defined]


# --- a large data set ---


def test_an_order_that_is_not_held_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process, and the same run after a restart, find the file; without a folder places are traced."""
    expected = [Loader(Counting(50), 6, seed=3).batch(epoch, number) for epoch in range(2) for number in range(8)]
    monkeypatch.setattr(order_module, "LARGE", 20)
    monkeypatch.setattr(order_module, "SMALL", 1)
    for folder in (tmp_path / "run", tmp_path / "run", None):
        batches = Loader(Counting(50), 6, seed=3, order_folder=folder).batches()
        assert all(same(batch, other) for batch, other in zip(expected, batches, strict=False))
        batches.close()  # type: ignore[attr-defined]
    names = sorted(path.name for path in (tmp_path / "run").glob("global*.npy"))
    assert names[:2] == ["global_indices_50_seed3.npy", "global_indices_50_seed4.npy"]


# --- masks ---


def test_a_batch_has_the_masks_of_its_rows() -> None:
    class Padded(Counting):
        def read(self, indices: Sequence[int] | NDArray[np.integer]) -> NDArray[np.int64]:
            rows = super().read(indices)
            rows[np.asarray(indices) % 2 == 1, 0] = PADDING
            return rows

    loader = Loader(Padded(8), 4, seed=0, shuffle=False, rank=1, world_size=2, vocabulary=100)
    batch = loader.batch(0, 0)
    assert batch.input_ids.tolist() == [[0, 2, 3], [0, 4, 5]]
    assert batch.label_mask is not None and batch.label_mask.tolist() == [[False, False, True]] * 2
    assert batch.attention_mask is not None and batch.attention_mask.tolist() == [[False, True, True]] * 2
    even = Loader(Padded(8), 4, seed=0, shuffle=False, rank=0, world_size=2).batch(0, 0)
    assert even.label_mask is None and even.attention_mask is None
    loader.masks = Masks(pad_token_id=100)
    with pytest.raises(ValueError, match=r"model\.pad_token_id: 100 pads rows, the model's vocabulary has 100"):
        loader.batch(0, 0)


@pytest.mark.parametrize("foreign", [100, -2])
def test_tokens_that_the_model_does_not_know(foreign: int) -> None:
    class Foreign(Counting):
        def read(self, indices: Sequence[int] | NDArray[np.integer]) -> NDArray[np.int64]:
            rows = super().read(indices)
            rows[np.asarray(indices) == 2, 1] = foreign
            return rows

    told = f"instance 2 holds token {foreign}, the model's vocabulary has 100: tokenizer and model disagree"
    with pytest.raises(ValueError, match=told):
        Loader(Foreign(4), 4, seed=0, vocabulary=100).batch(0, 0)


# --- the iterator ---


def loader_threads() -> int:
    return sum(thread.name.startswith(ABANDONABLE) for thread in threading.enumerate())


def ended() -> bool:
    """Whether all reading has ended, after a while."""
    for _ in range(200):
        if not loader_threads():
            return True
        time.sleep(0.02)
    return False


def test_the_next_batch_is_read_ahead_and_no_more() -> None:
    assert ended()  # what earlier tests read
    source = Counting(40)
    batches = Loader(source, 4, seed=0).batches()
    for taken in range(1, 25):  # two epochs and a half
        next(batches)
        assert taken <= source.reads <= taken + 1
    assert loader_threads() == 1
    batches.close()  # type: ignore[attr-defined]
    assert ended()


def test_as_many_batches_are_read_ahead_as_asked() -> None:
    source = Counting(100)
    batches = Loader(source, 1, seed=0, workers=3, ahead=6).batches()
    next(batches)
    for _ in range(100):
        if source.reads == 7:
            break
        time.sleep(0.02)
    assert source.reads == 7 and 1 <= loader_threads() <= 3
    batches.close()  # type: ignore[attr-defined]
    assert ended()


def test_a_run_reads_nothing_beyond_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order_module, "LARGE", 2)
    source = Counting(12)
    taken = list(Loader(source, 4, seed=3, workers=2, ahead=5, order_folder=tmp_path).batches(count=3))
    assert len(taken) == source.reads == 3
    assert [path.name for path in tmp_path.glob("global*.npy")] == ["global_indices_12_seed3.npy"]  # of one epoch


def test_an_order_that_cannot_be_made_is_an_error_of_its_own_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    def order(instances: int, seed: int, epoch: int, shuffle: bool, folder: Path | None) -> EpochOrder:
        if epoch:
            raise OSError("no room for this epoch's order")
        return EpochOrder(instances, seed, epoch, shuffle)

    monkeypatch.setattr("olmo.data.loader.EpochOrder", order)
    batches = Loader(Counting(12), 4, seed=3, ahead=6).batches()
    assert len([next(batches) for _ in range(3)]) == 3
    with pytest.raises(OSError, match="no room"):
        next(batches)


def test_closing_does_not_wait_for_a_read_that_hangs() -> None:
    class Hanging(Counting):
        def read(self, indices: Sequence[int] | NDArray[np.integer]) -> NDArray[np.int64]:
            if 4 in indices:
                assert released.wait(30)
            return super().read(indices)

    released = threading.Event()
    source = Hanging(40)
    batches = Loader(source, 4, seed=0, shuffle=False, ahead=6).batches()
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    assert loader_threads() == 1  # still waiting
    released.set()
    assert ended() and source.reads <= 2, "batches that nobody wants are read"


def test_an_error_comes_with_its_batch_and_not_before() -> None:
    class Damaged(Counting):
        def read(self, indices: Sequence[int] | NDArray[np.integer]) -> NDArray[np.int64]:
            if 9 in indices:
                raise ValueError("instance 9 is damaged")
            return super().read(indices)

    batches = Loader(Damaged(12), 2, seed=0, shuffle=False).batches()
    assert [next(batches).instances.tolist() for _ in range(4)] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    with pytest.raises(ValueError, match="instance 9 is damaged"):
        next(batches)
    assert ended()


# --- mistakes ---


def test_token_beyond_the_vocabulary_names_the_instance() -> None:
    fits = Loader(Counting(8), 4, seed=0, shuffle=False, vocabulary=10)  # instance 7 holds 7, 8, 9
    assert fits.batch(0, 1).input_ids.max() == 9
    short = Loader(Counting(8), 4, seed=0, shuffle=False, vocabulary=9)
    assert short.batch(0, 0).input_ids.max() == 5
    with pytest.raises(ValueError) as caught:
        short.batch(0, 1)
    assert str(caught.value) == "instance 7 holds token 9, the model's vocabulary has 9: tokenizer and model disagree"


def test_batch_that_the_ranks_cannot_share() -> None:
    with pytest.raises(ValueError, match="global_train_batch_size: 6 is not a multiple of the number of processes, 4"):
        Loader(Counting(20), 6, seed=0, world_size=4)


def test_fewer_instances_than_a_batch() -> None:
    with pytest.raises(ValueError, match="5 instances are fewer than one global batch of 6"):
        Loader(Counting(5), 6, seed=0)
    with pytest.raises(ValueError, match="3 instances are fewer than one global batch of 4"):
        Loader(Counting(3), 4, seed=0, world_size=2)


def test_batches_are_int64_tensors() -> None:
    batch = Loader(Counting(8), 4, seed=0).batch(0, 0)
    assert str(batch.input_ids.dtype) == "torch.int64"
    assert batch.input_ids.shape == (4, 3)
    assert batch.instances.dtype == np.uint32
