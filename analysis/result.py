"""One measurement as an object: what the two result files of a checkpoint hold, and its comparison with another."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from analysis.breadth import sorted_shares
from analysis.estimates import NORMAL, finite
from analysis.measure import Measurement
from analysis.pairs import paired_difference
from analysis.results import COEFFICIENTS_FILE, RESULT, read_coefficients, save_result
from olmo.console import fixed
from olmo.exceptions import needs
from olmo.files.paths import read_json
from olmo.memory import jackknife_error

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Difference:
    """The knowledge entropy of one result minus that of another, measured on the same instances.

    Attributes:
        value: in nats.
        standard_error: paired, of the same groups of instances left out of both; None of a single instance.
        low: of the 95 % interval, value - 1.96 standard errors; None without one.
        high: of the 95 % interval, value + 1.96 standard errors; None without one.
    """

    value: float
    standard_error: float | None
    low: float | None
    high: float | None

    def __repr__(self) -> str:
        error = "unknown" if self.standard_error is None else f"{self.standard_error:.4f}"
        return f"Difference({fixed(self.value, 4, '+')}, standard error {error})"


@dataclass(frozen=True, eq=False, repr=False)
class Result:
    """The knowledge entropy of one model on given instances, with its parts and its standard error.

    Attributes:
        content: of `knowledge_entropy.json` (docs/entropy.md).
        coefficients: average coefficients Cbar^l, (M_l,) by the number of the layer in the model: float64 where
            measured here, float32 where loaded.
        most_active: as in `analysis.breadth.Breadth`.
    """

    content: Mapping[str, Any]
    coefficients: dict[int, NDArray[np.floating]]
    most_active: NDArray[np.uint8] | None = None

    @classmethod
    def of(
        cls,
        measurement: Measurement,
        rows: Sequence[NDArray[np.int64]],
        length: int,
        memories: str,
        about: Mapping[str, Any],
    ) -> Result:
        """Of a measurement on the first of `rows`, which have at most `length` tokens. memories: `describe` of the
        model; about: the other keys of `knowledge_entropy.json`, which identify model, instances and settings."""
        numbers = measurement.to_dict()
        lengths = [len(row) for row in rows[: numbers["number_of_instances"]]]
        content = {
            **numbers,
            "number_of_tokens": sum(lengths),
            "mean_length": sum(lengths) / len(lengths),
            "shortest_length": min(lengths),
            "sequence_length": length,
            "memories": memories,
            **about,
        }
        return cls(content, dict(measurement.coefficients), measurement.breadth.most_active)

    @classmethod
    def load(cls, folder: str | Path) -> Result:
        """The result that `save` or analysis.entropy wrote to a folder.

        Raises:
            OSError: where one of the two files cannot be read.
            ValueError: where it is something else.
        """
        folder = Path(folder)
        content = read_json(folder / RESULT)
        read = read_coefficients(folder / COEFFICIENTS_FILE)
        if not isinstance(content, dict) or "knowledge_entropy" not in content:
            raise ValueError(f"{folder / RESULT}: not a result of analysis.entropy")
        if read.data not in (None, content["data"]["sha256"]):
            raise ValueError(f"{read.path}: coefficients of another measurement than {folder / RESULT}")
        return cls(content, {n: values.numpy() for n, values in read.average.items()}, read.most_active)

    def save(self, folder: str | Path) -> None:
        """Write the two files of analysis.entropy to a folder, each atomically.

        Raises:
            OSError: where the folder cannot be written.
        """
        save_result(Path(folder), dict(self.content), self.coefficients, self.most_active)

    @property
    def entropy(self) -> float:
        """H, the knowledge entropy, in nats."""
        return float(self.content["knowledge_entropy"])

    @property
    def standard_error(self) -> float | None:
        """Of H, over instances; None of a single one."""
        return self.content["standard_error"]

    @property
    def layers(self) -> NDArray[np.float64]:
        """H^l of each layer that has memories, (L,), in nats."""
        return np.array(self.content["layers"])

    @property
    def maximum(self) -> float:
        """The largest H that the model can have: all memories used equally."""
        return float(self.content["maximum"])

    def compare(self, other: Result) -> Difference:
        """H of `other` minus H of this result, paired on the same groups of instances.

        Raises:
            ValueError: naming what differs, where the two were not measured on the same instances in the same way.
        """
        if not isinstance(other, Result):
            raise ValueError(f"compare: {type(other).__name__}; expected a Result, such as of Result.load(folder)")
        value, left_out = paired_difference(dict(self.content), dict(other.content))
        error = finite(float(jackknife_error(left_out)))
        low, high = (None, None) if error is None else (value - NORMAL * error, value + NORMAL * error)
        return Difference(value, error, low, high)

    def to_dict(self) -> dict[str, Any]:
        """The content of `knowledge_entropy.json`, a copy."""
        return copy.deepcopy(dict(self.content))

    def plot(self) -> Figure:
        """A matplotlib Figure: H^l of each layer with bars of two standard errors, and how each layer spreads its
        coefficients over its memories. Neither pyplot nor matplotlib's settings change."""
        needs("matplotlib", "plot", "plot()")
        from analysis.figures.result import draw_result

        return draw_result(self.content, **sorted_shares([v.astype(float) for v in self.coefficients.values()]))

    def __repr__(self) -> str:
        error = "unknown" if self.standard_error is None else f"{self.standard_error:.4f}"
        return (
            f"Result(entropy {fixed(self.entropy, 4)}, standard error {error}, "
            f"{self.content['number_of_instances']} instances, at most {self.maximum:.2f})"
        )
