"""Batches of texts of unequal length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def batched_by_length(lengths: Sequence[int], tokens_per_batch: int) -> Iterator[slice]:
    """Divide texts sorted by length, longest first, none empty, into batches of at most `tokens_per_batch` padded
    tokens, or of one text.

    No text is padded by more than a seventh of its length: padding costs as much as text, another batch very little.
    """
    start = 0
    while start < len(lengths):
        longest = lengths[start]
        most = start + max(1, tokens_per_batch // longest)
        stop = start + 1
        while stop < min(most, len(lengths)) and 8 * lengths[stop] >= 7 * longest:
            stop += 1
        yield slice(start, stop)
        start = stop
