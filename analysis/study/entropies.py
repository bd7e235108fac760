"""The entropies of a study: results of analysis.entropy, those of all pretrainings together, and differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analysis import shapes
from analysis.breadth import BREADTHS, half_sample_error
from analysis.estimates import Estimate, finite, jackknife
from analysis.kinds import difference
from analysis.results import RESULT
from analysis.study.plan_file import Plan
from olmo.files.paths import read_json
from olmo.memory import jackknife_error

RESULT_SHAPE: dict[str, Any] = {
    "knowledge_entropy": float,
    "standard_error": (float, None),
    "layers": [float],
    "layer_standard_errors": [(float, None)],
    "?layer_numbers": [int],
    "maximum": float,
    "number_of_instances": int,
    "leave_one_group_out": [[float]],
    "?attention_entropy": float,
    "?attention_leave_one_group_out": [[float]],
    "?next_token_entropy": float,
    "?next_token_leave_one_group_out": [float],
    "?breadth": {f"?{name}": {"value": float, "half_differences": [float]} for name in BREADTHS},
    "checkpoint": {"path": str, "step": int, "?tokens": (int, None)},
    "data": {"path": str, "sha256": str},
    "coefficient": str,
}
MEASURES = ("H", "H_last_layer", "attention", "next_token")
_KEYS = {  # measure -> its key in a result, and that of the numbers without one group of instances at a time
    "H": ("knowledge_entropy", "leave_one_group_out"),
    "attention": ("attention_entropy", "attention_leave_one_group_out"),
    "next_token": ("next_token_entropy", "next_token_leave_one_group_out"),
}


@dataclass(frozen=True)
class Entropies:
    """The results of one start and intervention, on one text, by pretraining."""

    data: str
    coefficient: str
    start: str
    intervention: str
    results: Mapping[int, dict[str, Any]]
    about: str  # what an interval is about, `model` or `checkpoint`

    def value(self, pretraining: int, measure: str) -> float | None:
        """A measure of one pretraining, None where it was not measured."""
        parts = _parts(self.results[pretraining], measure) if pretraining in self.results else None
        return None if parts is None else parts[0]


def name_of(row: Mapping[str, Any]) -> str:
    """How directions and tables name a start and its intervention."""
    return row["start"] if row["intervention"] == "none" else f"{row['start']}, {row['intervention']}"


def read_entropies(plan: Plan) -> tuple[list[Entropies], list[str]]:
    """(entropies, lines about what is missing). Raises ValueError for a result that is damaged, or measured in another
    way than those of the other pretrainings."""
    found: dict[tuple[str, str, str, str], dict[int, dict[str, Any]]] = {}
    missing = []
    for member in plan.content["entropies"]:
        names = (member["data"], member["coefficient"], member["start"], member["intervention"])
        path = plan.place(member["folder"]) / RESULT
        if (reason := plan.unfinished(member)) is None and not path.is_file():
            reason = f"no {RESULT}"
        if reason is not None:
            missing.append(f"entropy of {member['start']}, {member['intervention']}, {path.parent}: {reason}")
            continue
        result = read_json(path)
        shapes.check(path, result, RESULT_SHAPE)
        of_names = found.setdefault(names, {})
        if member["pretraining"] in of_names:
            raise ValueError(f"{path}: a second entropy of {', '.join(names)} and pretraining {member['pretraining']}")
        first = next(iter(of_names.values()), result)
        if reason := difference(first, result):
            raise ValueError(f"{path}: measured with {reason} than that of another pretraining")
        of_names[member["pretraining"]] = result
    return [Entropies(*names, results, plan.content["about"]) for names, results in found.items()], missing


def _parts(result: Mapping[str, Any], measure: str) -> tuple[float, NDArray[np.float64]] | None:
    """(a measure, the same without one group of instances at a time (G,)); None where it was not measured."""
    if measure == "H_last_layer":
        return result["layers"][-1], np.array([layers[-1] for layers in result["leave_one_group_out"]])
    key, key_of_left_out = _KEYS[measure]
    if key not in result:
        return None
    left_out = np.array(result[key_of_left_out])
    return result[key], left_out.sum(1) if left_out.ndim == 2 else left_out


def estimate(entropies: Entropies, measure: str = "H") -> Estimate | None:
    """A measure, mean over pretrainings; None where one of them lacks it."""
    return _over_seeds([_parts(result, measure) for result in entropies.results.values()], entropies.about)


def difference_of(first: Entropies, second: Entropies, measure: str = "H") -> Estimate | None:
    """Second minus first, mean over the pretrainings that both have, on the same instances.

    None where they have no pretraining in common, or one lacks the measure. Raises ValueError where they were measured
    in different ways.
    """
    pairs = []
    for seed in [seed for seed in first.results if seed in second.results]:
        results = first.results[seed], second.results[seed]
        if reason := difference(*results):
            raise ValueError(f"entropies measured with {reason} cannot be compared in pairs")
        one, other = (_parts(result, measure) for result in results)
        pairs.append(None if one is None or other is None else (other[0] - one[0], other[1] - one[1]))
    return _over_seeds(pairs, first.about)


def _over_seeds(parts: Sequence[tuple[float, NDArray[np.float64]] | None], about: str) -> Estimate | None:
    known = [part for part in parts if part is not None]
    if not known or len(known) < len(parts):
        return None
    return jackknife([value for value, _ in known], np.array([left_out for _, left_out in known]), about)


def row(entropies: Entropies, starts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What study.json has of one start and intervention."""
    results, start = list(entropies.results.values()), starts[entropies.start]
    first = results[0]
    left_out = np.mean([result["leave_one_group_out"] for result in results], axis=0)  # (G, L)
    knowledge = estimate(entropies)
    assert knowledge is not None
    others = {name: estimate(entropies, name) for name in ("H_last_layer", "attention", "next_token")}
    errors = [None if np.isnan(error) else float(error) for error in np.atleast_1d(jackknife_error(left_out))]
    total = float(jackknife_error(left_out.sum(1)))
    return {
        "data": entropies.data,
        "coefficient": entropies.coefficient,
        "precision": first.get("precision"),
        "start": entropies.start,
        "step": start["step"],
        "tokens": first["checkpoint"].get("tokens"),
        "intervention": entropies.intervention,
        "model": start["model"],
        "instances": first["number_of_instances"],
        "H": knowledge.as_json(),
        "standard_error": None if np.isnan(total) else total,
        "layers": np.mean([result["layers"] for result in results], axis=0).tolist(),
        "layer_standard_errors": errors,
        "layer_numbers": first.get("layer_numbers", list(range(len(first["layers"])))),
        "maximum": first["maximum"],
        **{name: None if found is None else found.as_json() for name, found in others.items()},
        "per_seed": list(knowledge.per_run),
        "breadth": _breadth(results),
    }


def _breadth(results: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Measures of breadth, means over pretrainings; standard errors are over instances, the same of all pretrainings.
    None where one of them lacks it, as of an earlier version."""
    if not all(name in result.get("breadth", {}) for result in results for name in BREADTHS):
        return None
    found = {}
    for name in BREADTHS:
        each = [result["breadth"][name] for result in results]
        differences = np.mean([one["half_differences"] for one in each], axis=0)
        found[name] = {
            "value": float(np.mean([one["value"] for one in each])),
            "standard_error": finite(float(half_sample_error(differences))),
            "per_seed": [one["value"] for one in each],
        }
    return found
