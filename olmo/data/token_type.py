"""Which type of number a file of tokens holds: files without a header do not state it, and most can be read as any.

A file that is read as another type mostly gives ids of the vocabulary all the same: of 32-bit tokens read as 16-bit
ones, every second id is 0.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

TYPES = ("uint8", "uint16", "uint32", "uint64")
HEAD = 2**15  # bytes of a file that are examined: 4,096 tokens of the widest type
_LEAST, _LEAST_OF_BYTES = 512, 4096  # bytes; fewer prove nothing
_MOST = 2**20  # ids, more than any vocabulary has


def _fitting_type(content: bytes) -> str | None:
    """The type of the tokens in bytes whose number is a multiple of 8; None if they prove nothing.

    Tokens wider than 16 bits: the upper half of each number is small, as no vocabulary has 2^20 ids, but the lower half
    is not; two tokens of 16 bits would be alike. One byte: bytes at even and odd places have the same distribution, and
    not that of random numbers. Two bytes: the distributions differ.
    """
    words = np.frombuffer(content, "<u2")
    if not words.reshape(-1, 4)[:, 2:].any() and _are_halves(words[::4], words[1::4]):
        return "uint64"
    if _are_halves(words[::2], words[1::2]):
        return "uint32"
    words = words[words != np.bincount(words).argmax()]  # which may be padding
    if words.nbytes < _LEAST_OF_BYTES:
        return None
    even, odd = (np.bincount(words.view("u1")[place::2], minlength=256) / len(words) for place in (0, 1))
    shares = (even + odd)[even + odd > 0] / 2
    entropy, differ = -float(shares @ np.log2(shares)), float(np.abs(even - odd).sum() / 2)
    if not 3 < entropy < 7:
        return None
    return "uint8" if differ < 0.15 else "uint16" if differ > 0.5 else None


def wrong_type(content: bytes, dtype: str) -> str | None:
    """The type (or types) that fit consecutive bytes of a token file better than `dtype`; None if none does.

    The bytes begin at a multiple of 8 in the file. Signed types are named as the unsigned ones of their width.
    """
    content = content[: len(content) // 8 * 8]
    if len(content) < _LEAST:
        return None
    fits, width = _fitting_type(content), np.dtype(dtype).itemsize
    if fits is not None and (np.dtype(fits).itemsize > width or (fits, dtype) == ("uint8", "uint16")):
        return fits
    # Several narrower tokens in one number exceed every vocabulary.
    exceed = width > 2 and (np.frombuffer(content, np.dtype(dtype).newbyteorder("<")) >= _MOST).mean() > 0.5
    return (fits or "uint8 or uint16") if exceed else None


def _are_halves(lower: NDArray[np.uint16], upper: NDArray[np.uint16]) -> bool:
    """Whether pairs of 16-bit numbers are the halves of larger ones, all below `_MOST`."""
    most = int(upper.max())
    return most < _MOST >> 16 and bool((lower > most).mean() > 0.5)
