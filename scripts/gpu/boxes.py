"""The measurements of `make gpu`, the most important first, and the seconds that each has.

A measurement is a module with `measure(place: Place) -> Iterator[Row]`, which yields every row as soon as it is
measured. Together they have at most eight minutes, starts of processes included.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Box:
    """A measurement in a process of its own: its module, and the seconds after which the process is killed."""

    name: str
    module: str
    seconds: int
    what: str


FIRST = Box("peak", "scripts.gpu.peak", 25, "the device, and the rate of a large bfloat16 product of matrices")
BOXES = {
    box.name: box
    for box in (
        FIRST,
        Box("entropy", "scripts.gpu.entropy", 75, "knowledge entropy of OLMo-1B's shape, compiled"),
        Box("training", "scripts.gpu.training", 125, "OLMo-1B's shape on rows of 1024 tokens: rate, MFU, memory"),
        Box("tests", "scripts.gpu.tests", 80, "the tests that are marked gpu"),
        Box("entropy-ways", "scripts.gpu.entropy_ways", 40, "entropy in other ways, and by the obvious script"),
        Box("saves", "scripts.gpu.saves", 45, "how long training waits for a checkpoint"),
        Box("probes", "scripts.gpu.probes", 30, "1,950 probes packed, and one evaluator at a time"),
        Box("entropy-7b", "scripts.gpu.entropy_7b", 30, "memory of the entropy of OLMo-7B's shape"),
        Box("loss", "scripts.gpu.loss", 30, "the loss of OLMo-1B's vocabulary, ours and others: time, memory, error"),
    )
}
LIMIT = 480  # seconds of a whole run
SMALL_SCALE = 4  # small runs have so many times the seconds: their machine may have other work
