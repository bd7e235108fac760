"""In which order a run sees the instances of its source: OLMo's global indices (formats section 3).

An order file is headerless little-endian uint32: place k of the run is instance file[k].
"""

from __future__ import annotations

import math
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..console import Progress, log
from ..files.atomic import atomic_path, delete_partial_files
from ..files.lock import Lock
from .ranges import RemoteFiles
from .sources import TokenFiles

DTYPE = np.dtype("<u4")
PIECE = 2**22  # places at a time if the order does not fit into memory
LARGEST_PIECE = 2**20  # swaps at a time
MOST_TRACED = 2**14  # places; tracing more costs more than a full shuffle
SMALL = 2**20  # instances that are shuffled at once
LARGE = 2**26  # more instances than these do not stay in memory, 4 bytes each
LARGEST_WORLD = 4096  # ranks; OLMo cuts or pads an order by fewer places than it has ranks


def order_length(instances: int, world_size: int, drop_last: bool) -> int:
    """Places of an epoch: a multiple of `world_size`, at most (`drop_last`) or at least `instances`."""
    if drop_last:
        return instances // world_size * world_size
    return math.ceil(instances / world_size) * world_size


def build_order(
    instances: int, seed: int, epoch: int, world_size: int = 1, drop_last: bool = True, shuffle: bool = True
) -> NDArray[np.uint32]:
    """Instance numbers (n,), uint32, in the order that OLMo's `IterableDataset` gives them.

    The shuffle is numpy's Generator(PCG64(seed + epoch)). The result is cut (`drop_last`) or padded from its own
    front to a multiple of `world_size`.
    """
    _check_fits(instances)
    order = np.empty(max(instances, order_length(instances, world_size, drop_last)), dtype=DTYPE)
    _fill(order, instances, seed + epoch, shuffle)
    return order[: order_length(instances, world_size, drop_last)]


def instances_at(
    places: NDArray[np.integer], instances: int, seed: int, epoch: int, shuffle: bool = True
) -> NDArray[np.uint32]:
    """`build_order(instances, seed, epoch)[places]`, of any number of instances in little memory; places are few.

    numpy's shuffle swaps place i with a random place j <= i, for i from the last to 1. What ends at a place is traced
    back through these swaps in reverse; few of them move it. The random numbers are drawn twice: forwards, to find
    where each piece of the swaps begins, and backwards piece by piece, as PCG64 can jump.
    Takes about a minute for a billion instances.
    """
    _check_fits(instances)
    if not shuffle:
        return places.astype(DTYPE)
    if instances < SMALL or not 0 < len(places) <= MOST_TRACED:
        return build_order(instances, seed, epoch)[places]
    wanted = np.unique(places)
    last, seed, begins, high, position = max(int(wanted[0]), 1), seed + epoch, [], instances - 1, 0
    while high >= last:
        count = _piece_size(high, last)
        begins.append((high, count, position))
        position = _swaps(seed, position, high, count)[1]
        high -= count
    traced = {0: 0} if wanted[0] == 0 else {}  # where it stood before the swaps up to i -> where it ends
    hashed = np.zeros(2**22, dtype=bool)  # of low bits: sorts out in one step what is not traced
    hashed[0] = True
    low_bits = np.uint32(len(hashed) - 1)
    for top, count, begin in reversed(begins):
        partners, low = _swaps(seed, begin, top, count)[0][::-1], top - count + 1  # now of low, low + 1, ..., top
        ends = wanted[np.searchsorted(wanted, low) : np.searchsorted(wanted, top, side="right")] - low
        hashed[partners[ends] & low_bits] = True
        # Places of this piece may become traced within it, so all swaps with them are looked at.
        looked_at = np.flatnonzero(hashed[partners & low_bits] | (partners >= low))
        begin_here = set(ends.tolist())
        for k in looked_at.tolist():
            partner = int(partners[k])
            moved = traced.pop(partner, None)
            if k in begin_here:
                traced[partner] = low + k
            if moved is not None:
                traced[low + k] = moved
                hashed[(low + k) & int(low_bits)] = True
    found = np.empty(len(wanted), dtype=DTYPE)
    found[np.searchsorted(wanted, list(traced.values()))] = list(traced)
    return found[np.searchsorted(wanted, places)]


class EpochOrder:
    """The order of an epoch, read by place. A large one is not kept in memory.

    It is read from a file in `folder`, written if missing, for all processes and restarts of a run; without a folder,
    places are traced (`instances_at`), which takes a minute each time.
    """

    def __init__(self, instances: int, seed: int, epoch: int, shuffle: bool = True, folder: Path | None = None):
        self.instances, self.seed, self.epoch, self.shuffle = instances, seed, epoch, shuffle
        self._whole: NDArray[np.uint32] | None = None
        if instances <= LARGE:
            self._whole = build_order(instances, seed, epoch, shuffle=shuffle)
        elif shuffle and folder is not None:
            path = folder / f"global_indices_{instances}_seed{seed + epoch}.npy"
            with Lock(path.with_name(f"{path.name}.lock"), wait=True):
                if not path.is_file() or path.stat().st_size != instances * DTYPE.itemsize:
                    delete_partial_files(path)
                    log.info("shuffling %s instances: a minute or more", f"{instances:,}")
                    write_order(path, instances, seed, epoch)
            self._whole = np.memmap(path, DTYPE, "r", shape=(instances,))

    def at(self, places: NDArray[np.integer]) -> NDArray[np.uint32]:
        """Instance numbers at these places."""
        if self._whole is not None:
            return np.asarray(self._whole[places])
        return instances_at(places, self.instances, self.seed, self.epoch, self.shuffle)


def write_order(
    path: Path,
    instances: int,
    seed: int,
    epoch: int,
    world_size: int = 1,
    drop_last: bool = True,
    shuffle: bool = True,
    first: int | None = None,
) -> None:
    """Write what `build_order` gives, or its `first` places, to a file.

    Few first places need neither memory nor disk (`instances_at`). The whole is shuffled in memory where four bytes an
    instance fit, and otherwise, far slower, in a file beside `path` whose pages the system may evict at any
    time. Raises OSError where the disk cannot hold it, ValueError for too many instances.
    """
    _check_fits(instances)
    length = order_length(instances, world_size, drop_last)
    kept = length if first is None else min(first, length)
    places = max(instances, length)
    few = kept <= min(MOST_TRACED, instances)
    in_memory = few or places * DTYPE.itemsize < _free_memory() * 0.8
    path.parent.mkdir(parents=True, exist_ok=True)
    # Writing to a mapped file on a full disk raises no OSError: it ends the process.
    needed = (kept if in_memory else places) * DTYPE.itemsize
    if needed > shutil.disk_usage(path.parent).free:
        raise OSError(f"{path.parent}: {needed / 1e9:.1f} GB for the order do not fit on this disk")
    with atomic_path(path, durable=True) as partial:  # else a crash of the machine may leave zeros
        if few:
            instances_at(np.arange(kept), instances, seed, epoch, shuffle).tofile(partial)
        elif in_memory:
            build_order(instances, seed, epoch, world_size, drop_last, shuffle)[:kept].tofile(partial)
        else:
            mapped = np.memmap(partial, DTYPE, "w+", shape=(places,))
            # As a plain array: numpy shuffles a memmap, too, to the same result, but a hundred times slower.
            _fill(mapped.view(np.ndarray), instances, seed + epoch, shuffle)
            mapped.flush()
            del mapped
            os.truncate(partial, kept * DTYPE.itemsize)


def _piece_size(high: int, low: int) -> int:
    """How many swaps, of i = high downwards and not below `low`, to draw at once.

    Random numbers are cut to the bits of i, so those stay the same within a piece; and the smaller a piece is against
    i, the fewer numbers are undecided in `_swaps`.
    """
    return min(LARGEST_PIECE, max(4096, high >> 8), high - (1 << high.bit_length() - 1) + 1, high - low + 1)


def _swaps(seed: int, position: int, high: int, count: int) -> tuple[NDArray[np.uint32], int]:
    """The partners j (count,) of i = high, high - 1, ..., drawn from a position on in the generator's 32-bit numbers.

    Also gives the position after them. numpy's rule: a number is cut to the bits of i; one above i is passed over.
    """
    mask, lowest = (1 << high.bit_length()) - 1, high - count + 1
    bits = np.random.PCG64(seed)
    bits.advance(position // 2)
    drawn = np.empty(0, dtype=np.uint32)
    while True:
        more = int((count - 0.5 * len(drawn)) * (mask + 1) / lowest) + 64  # a few too many rather than a second time
        drawn = np.concatenate((drawn, bits.random_raw(max(more, 64) // 2 + 1).view("<u4")))
        values = drawn[position % 2 :] & np.uint32(mask)
        taken = values <= lowest
        undecided = np.flatnonzero((values > lowest) & (values <= high))
        before = np.searchsorted(np.flatnonzero(taken), undecided)
        accepted = 0
        for k, earlier, value in zip(undecided.tolist(), before.tolist(), values[undecided].tolist()):
            if value <= high - earlier - accepted:
                taken[k] = True
                accepted += 1
        numbers = np.flatnonzero(taken)[:count]
        if len(numbers) == count:
            return values[numbers], position + int(numbers[-1]) + 1


def _free_memory() -> int:
    """Bytes that this process may still take, 0 where that is not known."""
    try:
        available = re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        return 0
    free = int(available[1]) * 1024 if available else 0
    with suppress(OSError, ValueError):  # a container's limit; "max" is none
        limit, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
        free = min(free, limit - used)
    return free


def _check_fits(instances: int) -> None:
    if instances >= np.iinfo(np.uint32).max:
        raise ValueError(f"{instances} instances do not fit OLMo's 32-bit data order")


def _fill(order: NDArray[np.uint32], instances: int, seed: int, shuffle: bool) -> None:
    """The shuffled numbers of all instances, and the first of them again as far as `order` is longer."""
    for start in range(0, instances, PIECE):
        stop = min(start + PIECE, instances)
        order[start:stop] = np.arange(start, stop, dtype=np.uint32)
    if shuffle:
        np.random.Generator(np.random.PCG64(seed=seed)).shuffle(order[:instances])
    if len(order) > instances:
        order[instances:] = np.resize(order[:instances], len(order))[instances:]


class OrderFile:
    """An order file, on disk or at a URL, read in slices.

    Raises FileNotFoundError where there is none, ValueError where its size is not a whole number of places.
    """

    def __init__(self, place: str | Path):
        self.place = str(place)
        self._remote = RemoteFiles([self.place]) if "://" in self.place else None
        if self._remote is None and not Path(self.place).is_file():
            raise FileNotFoundError(f"{self.place}: no such data order")
        size = self._remote.sizes[0] if self._remote else Path(self.place).stat().st_size
        if size % DTYPE.itemsize:
            raise ValueError(
                f"{self.place}: {size} bytes are no whole number of 32-bit places; a data order has no header (it is "
                "not for numpy.load), or this one is cut off"
            )
        self._length = size // DTYPE.itemsize

    def __len__(self) -> int:
        return self._length

    def read(self, start: int, stop: int, keep: bool = True) -> NDArray[np.uint32]:
        """Places [start, stop), uint32. With `keep`, remote ones are not asked for again. ValueError beyond the end."""
        if not 0 <= start <= stop <= len(self):
            raise ValueError(f"{self.place}: places {start} to {stop} of a data order that has {len(self)}")
        if self._remote is None:
            places = np.fromfile(self.place, DTYPE, stop - start, offset=start * DTYPE.itemsize)
            if len(places) != stop - start:
                size = Path(self.place).stat().st_size
                raise ValueError(f"{self.place}: the file has {size} bytes now, it had {len(self) * DTYPE.itemsize}")
            return places
        # Read-only, as its bytes are.
        width = (stop - start) * DTYPE.itemsize
        return np.frombuffer(self._remote.read([0], [start * DTYPE.itemsize], width, keep), DTYPE)


def most_off(instances: int) -> int:
    """By how many places the order of a run with an unknown number of ranks may be cut or padded: not by more than a
    hundredth, or small orders of other data would pass."""
    return min(LARGEST_WORLD - 1, instances // 100)


def check_places(order: OrderFile, start: int, places: NDArray[np.uint32], source: TokenFiles) -> None:
    """Raise ValueError where an order is too long for the files, and for the first of these places, read from `start`
    on, whose instance the files do not have, or that is repeated among them."""
    if len(order) > len(source) + LARGEST_WORLD:
        raise ValueError(
            f"{order.place}: {len(order)} places for {len(source)} instances ({source.extent()}): it is of other "
            "files, or no order of 32-bit numbers"
        )
    outside = places >= len(source)
    if outside.any():
        place = int(outside.argmax())
        raise ValueError(
            f"{order.place}: place {start + place} is instance {places[place]}, the data set has {len(source)} "
            f"({source.extent()}): data order and files disagree"
        )
    within = places[: max(len(source) - start, 0)]  # beyond, the front is repeated
    distinct = np.unique(within, return_index=True)[1]
    if len(distinct) < len(within):
        place = int(np.setdiff1d(np.arange(len(within)), distinct)[0])
        raise _repeated(order, start + place, within[place])


def _repeated(order: OrderFile, place: int, instance: np.integer) -> ValueError:
    return ValueError(f"{order.place}: place {place} is instance {instance}, which came before: each should come once")


def verify_order(
    order: OrderFile,
    source: TokenFiles,
    drop_last: bool,
    world_size: int | None = None,
    shuffle: bool = True,
    first: int | None = None,
) -> None:
    """Raise ValueError unless a data order holds every instance of the files once, at random places.

    Its end may be cut (`drop_last`) or padded from its front: to a multiple of `world_size`, or, where that is not
    known, by fewer places than any run had ranks. Of the `first` places alone: that no instance is among them twice.
    Bounded memory: one bit an instance.
    """
    instances, length = len(source), len(order) if first is None else first
    if length > len(order):
        raise ValueError(f"{order.place}: {len(order)} places, --first asks for {length}")
    expected = instances if world_size is None else order_length(instances, world_size, drop_last)
    most = 0 if world_size is not None else most_off(instances)
    off = expected - length if drop_last else length - expected
    if first is None and not 0 <= off <= most:
        wrong = "is incomplete" if length < expected else "is of more or larger files"
        # The first place beyond the files says more than lengths do; a remote order is not read for it.
        for start in range(0, 0 if "://" in order.place else length, PIECE):
            check_places(order, start, order.read(start, min(start + PIECE, length)), source)
        raise ValueError(
            f"{order.place}: {length} places, expected {'' if world_size else 'about '}{expected} for {instances} "
            f"instances ({source.extent()}): the order {wrong}"
            + ("" if world_size else "; or give the number of ranks of the run (--world_size)")
            + (f"; of an order's beginning, give --first {length}" if 0 < length < expected else "")
        )
    seen = np.zeros((instances + 7) // 8, dtype=np.uint8)
    in_place = 0
    with Progress("verifying", length, "places") as progress:
        for start in range(0, length, PIECE):
            places = order.read(start, min(start + PIECE, length), keep=False)
            check_places(order, start, places, source)
            in_place += int((places == np.arange(start, start + len(places))).sum())
            progress.advance(len(places))
            places = places[: max(instances - start, 0)]  # beyond, the front is repeated
            byte, bit = places >> 3, (1 << (places & 7)).astype(np.uint8)
            again = (seen[byte] & bit) != 0
            if again.any():
                place = int(again.argmax())
                raise _repeated(order, start + place, places[place])
            np.bitwise_or.at(seen, byte, bit)
    if length > instances:
        front = np.resize(order.read(0, min(instances, length - instances), keep=False), length - instances)
        if (order.read(instances, length, keep=False) != front).any():
            raise ValueError(f"{order.place}: places from {instances} on should repeat the first ones")
    # A random order has about one instance at its own place.
    if shuffle and length > 100 and in_place > length // 2:
        raise ValueError(
            f"{order.place}: not shuffled; {in_place} of {length} instances stand where the files have them"
        )
