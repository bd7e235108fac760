"""In which order a run sees the instances of its source: OLMo's global indices (formats section 3).

An order file is headerless little-endian uint32: place k of the run is instance file[k].
"""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..reporting import Progress
from .remote import RemoteFiles
from .sources import TokenFiles

DTYPE = np.dtype("<u4")
PIECE = 2**22  # places handled at a time where the whole order would not fit into memory
LARGEST_WORLD = 4096  # ranks; OLMo cuts or pads an order by fewer places than these


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
    """Write what `build_order` gives, or its `first` places, to a file, in bounded memory.

    The shuffle needs every place even where only the first ones are wanted. It happens in a file beside `path`, four
    bytes an instance, whose pages the system may put out of memory at any time. Raises OSError where the disk cannot
    hold it, ValueError for too many instances.
    """
    _check_fits(instances)
    length = order_length(instances, world_size, drop_last)
    places = max(instances, length)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A mapped file on a full disk is no OSError, but the end of the process.
    if places * DTYPE.itemsize > shutil.disk_usage(path.parent).free:
        raise OSError(f"{path.parent}: {places * DTYPE.itemsize / 1e9:.1f} GB for the shuffle do not fit on this disk")
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        if places:
            mapped = np.memmap(partial, DTYPE, "w+", shape=(places,))
            # As a plain array: numpy shuffles a memmap, too, to the same result, but a hundred times slower.
            _fill(mapped.view(np.ndarray), instances, seed + epoch, shuffle)
            mapped.flush()
            del mapped
        else:
            partial.touch()
        os.truncate(partial, min(length, length if first is None else first) * DTYPE.itemsize)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


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

    Raises FileNotFoundError where there is none, ValueError where its size is no whole number of places.
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
            return np.fromfile(self.place, DTYPE, stop - start, offset=start * DTYPE.itemsize)
        # Read-only, as the bytes are that it came in.
        width = (stop - start) * DTYPE.itemsize
        return np.frombuffer(self._remote.read([0], [start * DTYPE.itemsize], width, keep), DTYPE)


def check_places(order: OrderFile, start: int, places: NDArray[np.uint32], source: TokenFiles) -> None:
    """Raise ValueError for the first of these places, read from `start` on, whose instance the files do not have."""
    outside = places >= len(source)
    if outside.any():
        place = int(outside.argmax())
        raise ValueError(
            f"{order.place}: place {start + place} is instance {places[place]}, the data set has {len(source)} "
            f"({source.extent()}): data order and files disagree"
        )


def verify_order(
    order: OrderFile, source: TokenFiles, drop_last: bool, world_size: int | None = None, shuffle: bool = True
) -> None:
    """Raise ValueError unless a data order holds every instance of the files once, at random places.

    Its end may be cut (`drop_last`) or padded from its front: to a multiple of `world_size`, or, where that is not
    known, by fewer places than any run had ranks. Bounded memory: one bit an instance.
    """
    instances, length = len(source), len(order)
    expected = instances if world_size is None else order_length(instances, world_size, drop_last)
    most = 0 if world_size is not None else LARGEST_WORLD - 1
    off = expected - length if drop_last else length - expected
    if not 0 <= off <= most:
        wrong = "is incomplete" if length < expected else "is of more or larger files"
        _first_outside(order, source)
        raise ValueError(
            f"{order.place}: {length} places, expected {'' if world_size else 'about '}{expected} for {instances} "
            f"instances ({source.extent()}): the order {wrong}"
        )
    seen = np.zeros((instances + 7) // 8, dtype=np.uint8)
    in_place = 0
    with Progress("verifying", length, "places") as progress:
        for start in range(0, length, PIECE):
            places = order.read(start, min(start + PIECE, length), keep=False)
            check_places(order, start, places, source)
            in_place += int((places == np.arange(start, start + len(places))).sum())
            progress.advance(len(places))
            places = places[: max(instances - start, 0)]  # beyond, the front comes again
            byte, bit = places >> 3, (1 << (places & 7)).astype(np.uint8)
            again = (seen[byte] & bit) != 0
            if not again.any() and (np.diff(np.sort(places)) == 0).any():  # twice within this piece
                again = ~np.isin(np.arange(len(places)), np.unique(places, return_index=True)[1])
            if again.any():
                place = int(again.argmax())
                raise ValueError(
                    f"{order.place}: place {start + place} is instance {places[place]}, which came before: each "
                    "should come once"
                )
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


def _first_outside(order: OrderFile, source: TokenFiles) -> None:
    """Raise for the first place beyond the files, which says more than lengths do; not through a whole remote order."""
    for start in range(0, 0 if "://" in order.place else len(order), PIECE):
        check_places(order, start, order.read(start, min(start + PIECE, len(order))), source)
