"""Measures of a result besides H, and differences of two results, paired on the same groups of instances."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analysis.breadth import BREADTHS, Breadth, half_sample_error, overlap
from analysis.estimates import finite
from analysis.kinds import difference
from analysis.results import COEFFICIENTS_FILE, read_coefficients
from olmo.memory import jackknife_error

KNOWLEDGE = "knowledge"
OTHERS = {"attention": "attention entropy (nats)", "next_token": "next-token entropy (nats)"}
MEASURES = {**OTHERS, **BREADTHS}  # besides H

Difference = dict[str, float | None]


def number_of(result: Mapping[str, Any], measure: str) -> tuple[float, NDArray[np.float64]] | None:
    """(a measure, the numbers of which `_error` makes its standard error); None where it was not measured. Results of
    earlier versions have no `breadth`."""
    if measure in BREADTHS:
        found = result.get("breadth", {}).get(measure)
        return None if found is None else (found["value"], np.array(found["half_differences"], float))
    prefix = "" if measure == KNOWLEDGE else f"{measure}_"
    if f"{measure}_entropy" not in result:
        return None
    left_out = [
        sum(layers) if isinstance(layers, list) else layers for layers in result[f"{prefix}leave_one_group_out"]
    ]
    return result[f"{measure}_entropy"], np.array(left_out, float)


def _error(measure: str, numbers: NDArray[np.float64]) -> float | None:
    return finite(float((half_sample_error if measure in BREADTHS else jackknife_error)(numbers)))


def standard_error(result: Mapping[str, Any], measure: str) -> float | None:
    """None where it is unknown, or the measure is."""
    found = number_of(result, measure)
    return None if found is None else _error(measure, found[1])


def paired_difference(one: dict[str, Any], other: dict[str, Any]) -> tuple[float, NDArray[np.float64]]:
    """H(other) - H(one), and the same without one group of instances at a time, float64 (G,), for the jackknife.

    Raises ValueError, naming what differs, if the two were not measured on the same instances in the same way.
    """
    reason = difference(one, other)
    if reason is not None:
        raise ValueError(f"entropies measured with {reason} cannot be compared in pairs")
    first, second = number_of(one, KNOWLEDGE), number_of(other, KNOWLEDGE)
    assert first is not None and second is not None
    return second[0] - first[0], second[1] - first[1]


def change(one: dict[str, Any], other: dict[str, Any], measure: str) -> Difference | None:
    """`value`, other minus one, and its `standard_error`; None for a result and itself, or where the two cannot be
    paired or one lacks the measure."""
    first, second = number_of(one, measure), number_of(other, measure)
    if one is other or first is None or second is None or difference(one, other) is not None:
        return None
    both = len(first[1]) == len(second[1])  # one may have no errors
    return {"value": second[0] - first[0], "standard_error": _error(measure, second[1] - first[1]) if both else None}


def most_active(result_file: Path) -> NDArray[np.uint8] | None:
    """The most active memories of a result, from the file of coefficients beside it; None without that file."""
    file = result_file.with_name(COEFFICIENTS_FILE)
    if not file.is_file():
        return None
    coefficients = read_coefficients(file)
    if coefficients.most_active is not None:
        return coefficients.most_active
    return breadth_without_errors(file).most_active


def breadth_without_errors(coefficients_file: Path) -> Breadth:
    """The measures of a result of an earlier version."""
    average = read_coefficients(coefficients_file).average
    return Breadth.without_errors([layer.double().numpy() for layer in average.values()])


def in_common(one: NDArray[np.uint8] | None, other: NDArray[np.uint8] | None) -> Difference | None:
    """The overlap of two results' most active memories."""
    return None if one is None or other is None or one.shape[1] != other.shape[1] else overlap(one, other)
