"""Entropy joined with outcomes: a point for each start and intervention, their correlations, and what interventions
that change the entropy by different means do to acquisition and forgetting."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from analysis.estimates import Estimate, Values, quantiles
from analysis.study import entropies
from analysis.study.entropies import Entropies
from analysis.study.interventions import NO_INJECTION, UNCHANGED, kind

RESAMPLES = 2_000
FEWEST = 3  # points of a correlation
# Points of which an interval is given: most draws of three have two different ones, whose coefficient is 1 or -1.
FEWEST_DRAWN = 5
WARNING = (
    "The points share a trend: checkpoints of one pretraining differ in their age, and everything that changes with "
    "age correlates with everything else that does. A high correlation over a handful of points shows neither that the "
    "entropy is the cause nor that it would be found over other points. What interventions on one checkpoint do is the "
    "stronger evidence."
)


# --- correlations of resampled points ---


def pearson(x: Values, y: Values, counts: Values) -> Values:
    """Correlation coefficients (R,) of points drawn `counts` times, all (R, P); NaN where x or y is constant."""
    weights = counts / counts.sum(1, keepdims=True)
    centred = [values - (weights * values).sum(1, keepdims=True) for values in (x, y)]
    variances = [(weights * values**2).sum(1) for values in centred]
    # What a constant leaves is the rounding of its own size.
    vary = [of > 1e-24 * (values**2).max(1) for of, values in zip(variances, (x, y))]
    with np.errstate(invalid="ignore", divide="ignore"):
        found = (weights * centred[0] * centred[1]).sum(1) / np.sqrt(variances[0] * variances[1])
    return np.where(vary[0] & vary[1], np.clip(found, -1, 1), np.nan)


def ranks(values: Values, counts: Values) -> Values:
    """Rank of each value among the points drawn `counts` times, ties at their mean rank; all (R, P)."""
    found = np.empty_like(counts)
    for place, own in enumerate(values.T):  # a point at a time, to bound memory
        below, equal = ((counts * which).sum(1) for which in (values < own[:, None], values == own[:, None]))
        found[:, place] = below + (equal + 1) / 2
    return found


def correlate(x: Values, y: Values, seed: int = 0) -> dict[str, Estimate]:
    """Pearson's and Spearman's coefficients of the means over units (seeds) of x and y (P points, U units), with 95 %
    percentile intervals: points are drawn with replacement, and of several units the same ones for all points. Draws
    in which a measure is constant are left out. Of fewer than FEWEST_DRAWN points the interval is unknown (NaN)."""
    points, units = x.shape
    generator = np.random.default_rng(seed)
    drawn_points = generator.multinomial(points, np.full(points, 1 / points), RESAMPLES).astype(float)
    drawn_units = generator.multinomial(units, np.full(units, 1 / units), RESAMPLES) / units
    once, means = np.ones((1, points)), [values.mean(1)[None] for values in (x, y)]
    resampled = [drawn_units @ values.T for values in (x, y)]
    found = {}
    for name, of in (("pearson", lambda values, _: values), ("spearman", ranks)):
        [value] = pearson(of(means[0], once), of(means[1], once), once)
        draws = pearson(of(resampled[0], drawn_points), of(resampled[1], drawn_points), drawn_points)
        low, high = (float(end[0]) for end in quantiles(draws[None], (0.025, 0.975)))
        known = points >= FEWEST_DRAWN
        found[name] = Estimate(float(value), *((low, high) if known else (math.nan, math.nan)))
    return found


# --- of a study ---


def join(
    conditions: Sequence[Mapping[str, Any]],
    measured: Sequence[Entropies],
    interventions: Mapping[str, Mapping[str, Any]],
    about: str,
    published: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any] | None:
    """Points and correlations, ready for JSON; None where no condition has an entropy.

    conditions: rows of study.json; those without injection are left out, as they acquire nothing. Entropies are of the
    text and coefficient that most conditions have. A correlation is over the conditions of one model and setting: the
    starts alone, and with all interventions. published: numbers by setting, among these `correlations`, coefficients of
    Pearson over the starts by `X, Y`.
    """
    kept = [c for c in conditions if kind(interventions[c["intervention"]]) != NO_INJECTION]
    chosen = _of_most(measured, kept)
    points = [_Point(c, chosen[c["start"], c["intervention"]], about) for c in kept if _place(c) in chosen]
    if not points:
        return None
    first = next(iter(chosen.values()))
    correlations = []
    groups = {(c["model"], c["setting"]): None for c in kept}
    for model, setting in groups:
        of_group = [p for p in points if (p.row["model"], p.row["setting"]) == (model, setting)]
        starts = [p for p in of_group if kind(interventions[p.row["intervention"]]) == UNCHANGED]
        named = ", ".join(name for name, several in ((model, "model"), (setting, "setting")) if _differ(kept, several))
        for over, chosen_points in (("starts", starts), ("starts and interventions", of_group)):
            if over == "starts" or len(of_group) > len(starts):
                text = f"{over}, {named}" if named else over
                of_paper = published.get(setting, {}).get("correlations", {}) if over == "starts" else {}
                correlations += _correlations(chosen_points, text, of_paper)
    level = "pretraining seeds" if about == "model" else "seeds of continual learning"
    return {
        "data": first.data,
        "coefficient": first.coefficient,
        "points": [p.as_json(_differ(kept, "setting")) for p in points],
        "correlations": correlations,
        "resampled": f"Intervals: conditions are drawn with replacement and, of several, {level}, the same for all "
        f"conditions ({RESAMPLES:,} draws, 95 % percentiles); none is given for fewer than {FEWEST_DRAWN}.",
        "warning": WARNING,
    }


class _Point:
    """A condition with its entropies: each measure by unit of repetition, a pretraining or a seed of learning."""

    def __init__(self, row: Mapping[str, Any], measured: Entropies, about: str):
        self.row = row
        self.x: dict[str, dict[Any, float]] = {}
        self.y: dict[str, dict[Any, float]] = {}
        seeds = [tuple(seed) for seed in row["seeds"]]
        unit_of = {seed: seed[0] if about == "model" else seed for seed in seeds}
        for name in entropies.MEASURES:
            parts = {seed: measured.value(seed[0], name) for seed in seeds}
            known = {unit_of[seed]: value for seed, value in parts.items() if value is not None}
            if known:
                self.x[name] = known
        for name, values in row["per_seed"].items():
            if name.endswith("_before") or None in values:
                continue
            of_units: dict[Any, list[float]] = {}
            for seed, value in zip(seeds, values):
                of_units.setdefault(unit_of[seed], []).append(value)
            self.y[name] = {unit: float(np.mean(of_unit)) for unit, of_unit in of_units.items()}

    def as_json(self, with_setting: bool) -> dict[str, Any]:
        names = ("name", "start", "intervention", *(("setting",) if with_setting else ()))
        values = {name: float(np.mean(list(of.values()))) for name, of in {**self.x, **self.y}.items()}
        return {**{name: self.row[name] for name in names}, **values}


def _place(row: Mapping[str, Any]) -> tuple[str, str]:
    return row["start"], row["intervention"]


def _differ(rows: Sequence[Mapping[str, Any]], key: str) -> bool:
    return len({row[key] for row in rows}) > 1


def _of_most(
    measured: Sequence[Entropies], conditions: Sequence[Mapping[str, Any]]
) -> dict[tuple[str, str], Entropies]:
    """The entropies of the text and coefficient that most conditions have, by start and intervention."""
    by_kind: dict[tuple[str, str], dict[tuple[str, str], Entropies]] = {}
    for one in measured:
        by_kind.setdefault((one.data, one.coefficient), {})[one.start, one.intervention] = one
    places = [_place(condition) for condition in conditions]
    return max(by_kind.values(), key=lambda found: sum(place in found for place in places), default={})


def _correlations(points: Sequence[_Point], over: str, published: Mapping[str, float]) -> list[dict[str, Any]]:
    """Of every entropy and outcome that all points have, where there are enough of them."""
    if len(points) < FEWEST:
        return []
    found = []
    for x in [name for name in points[0].x if all(name in p.x for p in points)]:
        for y in [name for name in points[0].y if all(name in p.y for p in points)]:
            both = [p.x[x].keys() & p.y[y].keys() for p in points]
            units = sorted(set.intersection(*map(set, both)))
            if not units:
                continue
            of_x, of_y = (
                np.array([[getattr(p, k)[n][u] for u in units] for p in points]) for k, n in (("x", x), ("y", y))
            )
            coefficients = {name: e.as_json() for name, e in correlate(of_x, of_y).items()}
            found.append({"x": x, "y": y, "over": over, "points": len(points), "seeds": len(units), **coefficients})
            found[-1]["published"] = published.get(f"{x}, {y}")
    return found
