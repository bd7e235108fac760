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
        Box("entropy-ways", "scripts.gpu.entropy_ways", 40, "the same in other ways, and by the obvious script"),
        Box("entropy-7b", "scripts.gpu.entropy_7b", 30, "memory of the entropy of OLMo-7B's shape"),
    )
}
LIMIT = 480  # seconds of a whole run
