"""How often intervals contain the truth, and how often verdicts are right, over synthetic studies with known effects.

    python -m tests.coverage [--studies 500] [--seed 0]

The first table: coverage in percent of the 95 % intervals of K, A and a paired difference of A, for 3, 4 and 5
repetitions, 20, 60 and 130 entries, and several ratios of the standard deviations between repetitions, learning seeds,
entries, and of what an entry does in one run alone. Beside them the intervals of two simpler methods: both of our parts
in quadrature, without taking out what they share; and resampling of repetitions, then entries. The second table:
verdicts about a planted difference, by the functions that the report uses.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from analysis import estimates
from analysis.conditions import Repetitions
from analysis.estimates import STUDENT, Estimate, bootstrap, percent_change, quantiles
from analysis.outcomes import compare
from analysis.study.directions import verdict
from tests.run_folders import run_in_memory

LEVEL, GAIN = -6.0, 1.0  # K before training, and what training adds
RESAMPLES = 1000


@dataclass(frozen=True)
class Sizes:
    """Standard deviations of the gain of log-probability at each level, and learning seeds of each repetition."""

    repetitions: float
    entries: float
    alone: float  # of an entry in one run
    learning: float = 0.0
    learning_seeds: int = 1


VARIANCES = {
    "entries only": Sizes(0.0, 0.5, 0.0),
    "an entry in a run alone": Sizes(0.0, 0.0, 0.5),
    "comparable": Sizes(0.07, 0.5, 0.3),
    "mostly repetitions": Sizes(0.5, 0.5, 0.2),
    "two levels of seeds": Sizes(0.2, 0.5, 0.3, learning=0.3, learning_seeds=2),
}


def normal(generator: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float64]:
    return generator.normal(0, 1, shape)


def skewed(generator: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Exponential: few entries with much higher values."""
    return generator.exponential(1, shape) - 1


def heavy(generator: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Student's t with three degrees of freedom, of variance 1."""
    return generator.standard_t(3, shape) / math.sqrt(3)


SHAPES = {"normal": normal, "skewed": skewed, "heavy tails": heavy}


@dataclass(frozen=True)
class Study:
    """Log-probabilities of one synthetic study: [before, after] of two conditions, each (runs, entries)."""

    columns: list[NDArray[np.float64]]
    units: list[int]


def draw(
    generator: np.random.Generator, sizes: Sizes, repetitions: int, entries: int, shape: Callable, effect: float = 0.0
) -> Study:
    """Conditions share the entries' levels and differ by `effect` in their gain, and by noise at every level. `shape`:
    of what differs between entries; what differs between repetitions is normal, or has heavy tails as well."""
    runs = repetitions * sizes.learning_seeds
    level = LEVEL + 2 * shape(generator, (1, entries))
    columns = []
    for gain in (GAIN, GAIN + effect):
        of_repetitions = sizes.repetitions * (heavy if shape is heavy else normal)(generator, (repetitions, 1))
        start = 0.3 * sizes.repetitions * normal(generator, (repetitions, 1))
        before = level + (start + 0.3 * sizes.alone * shape(generator, (repetitions, entries))).repeat(
            sizes.learning_seeds, axis=0
        )
        gains = (
            gain + of_repetitions.repeat(sizes.learning_seeds, axis=0) + sizes.entries * shape(generator, (entries,))
        )
        gains = gains + sizes.learning * normal(generator, (runs, 1)) + sizes.alone * shape(generator, (runs, entries))
        columns += [before, before + gains]
    return Study(columns, np.repeat(np.arange(repetitions), sizes.learning_seeds).tolist())


def _difference(before: NDArray, after: NDArray, other_before: NDArray, other_after: NDArray) -> NDArray:
    return percent_change(other_before, other_after) - percent_change(before, after)


# measure -> its columns, statistic and truth
MEASURES: dict[str, tuple[slice, Callable, float]] = {
    "K": (slice(1, 2), lambda after: after, LEVEL + GAIN),
    "A": (slice(0, 2), percent_change, 100 * GAIN / -LEVEL),
    "difference of A": (slice(0, 4), _difference, 0.0),
}


def ours(study: Study, columns: slice, statistic: Callable) -> Estimate:
    return bootstrap(study.columns[columns], statistic, units=study.units)


def quadrature(study: Study, columns: slice, statistic: Callable) -> Estimate:
    """The interval over entries of the mean over runs, and Student's t times the standard error over repetitions."""
    means = _of_units(study, columns)
    per_unit, value = statistic(*means.mean(axis=2)), float(statistic(*means.mean(axis=(1, 2))))
    [drawn] = estimates._draws([means.shape[2]], RESAMPLES, 0)
    low, high = (
        x[0] for x in quantiles(statistic(*(means.mean(axis=1) @ drawn.T / len(drawn.T)))[None], (0.025, 0.975))
    )
    half = STUDENT[len(per_unit) - 2] * per_unit.std(ddof=1) / math.sqrt(len(per_unit))
    return Estimate(value, value - math.hypot(value - low, half), value + math.hypot(high - value, half))


def resampled(study: Study, columns: slice, statistic: Callable) -> Estimate:
    """Percentiles of draws of repetitions, then of entries."""
    means = _of_units(study, columns)
    count = means.shape[1]
    [drawn] = estimates._draws([means.shape[2]], RESAMPLES, 0)
    chosen = np.random.default_rng(1).multinomial(count, np.full(count, 1 / count), RESAMPLES) / count
    values = statistic(*np.einsum("cun,rn,ru->cr", means, drawn / len(drawn.T), chosen, optimize=True))
    return Estimate(
        float(statistic(*means.mean(axis=(1, 2)))), *(x[0] for x in quantiles(values[None], (0.025, 0.975)))
    )


def _of_units(study: Study, columns: slice) -> NDArray[np.float64]:
    """Means over learning seeds (columns, repetitions, entries)."""
    stacked = np.stack(study.columns[columns])
    return stacked.reshape(len(stacked), max(study.units) + 1, -1, stacked.shape[2]).mean(axis=2)


METHODS = {"ours": ours, "quadrature": quadrature, "resampled": resampled}


def coverage(
    generator: np.random.Generator,
    studies: int,
    sizes: Sizes,
    repetitions: int,
    entries: int,
    shape: Callable = normal,
    methods: tuple[str, ...] = ("ours",),
) -> Counter[tuple[str, str]]:
    """How many of the studies' intervals contain the truth, by (method, measure)."""
    hits: Counter[tuple[str, str]] = Counter()
    for _ in range(studies):
        study = draw(generator, sizes, repetitions, entries, shape)
        for measure, (columns, statistic, truth) in MEASURES.items():
            for method in methods:
                found = METHODS[method](study, columns, statistic)
                hits[method, measure] += found.low <= truth <= found.high
    return hits


def planted(
    generator: np.random.Generator, studies: int, sizes: Sizes, repetitions: int, effect: float
) -> dict[str, Counter[str]]:
    """Verdicts, by measure, about studies in which the second condition gains `effect` more; expected above 0."""
    found: dict[str, Counter[str]] = {"A": Counter(), "K_after": Counter()}
    for _ in range(studies):
        study = draw(generator, sizes, repetitions, 60, normal, effect)
        seeds = tuple((unit, place % sizes.learning_seeds) for place, unit in enumerate(study.units))
        one, other = (
            Repetitions(tuple(run_in_memory({"once": b}, {"once": a}) for b, a in zip(before, after)), seeds)
            for before, after in (study.columns[:2], study.columns[2:])
        )
        for measure, estimate in compare(one, other).items():
            found[measure][verdict(estimate, +1)] += 1
    return found


# --- tables ---


def tables(studies: int, seed: int) -> Iterator[str]:
    generator, methods = np.random.default_rng(seed), tuple(METHODS)
    head = f"{'repetitions':>11} {'entries':>7} {'shape':<12} {'deviations':<24}"
    yield f"Coverage in percent over {studies} studies: " + ", ".join(f"K, A, difference of A of {m}" for m in methods)
    yield head + " | ".join(f"{method:^17}" for method in methods)
    every: dict[str, list[float]] = {method: [] for method in methods}
    for repetitions in (3, 4, 5):
        for entries in (20, 60, 130):
            for shape, function in SHAPES.items():
                for name, sizes in VARIANCES.items():
                    hits = coverage(generator, studies, sizes, repetitions, entries, function, methods)
                    shares = {m: [100 * hits[m, measure] / studies for measure in MEASURES] for m in methods}
                    for method in methods:
                        every[method] += shares[method]
                    cells = (" ".join(f"{share:5.1f}" for share in shares[method]) for method in methods)
                    yield f"{repetitions:>11} {entries:>7} {shape:<12} {name:<24}" + " | ".join(cells)
    for method, shares_of in every.items():
        outside = sum(not 90 <= share <= 99 for share in shares_of)
        yield (
            f"{method}: {min(shares_of):.1f} to {max(shares_of):.1f}, mean {np.mean(shares_of):.1f}; {outside} of "
            f"{len(shares_of)} outside 90 to 99"
        )
    yield f"\nVerdicts in percent over {studies} studies of 60 entries, of A and of K after: {' / '.join(VERDICTS)}"
    for repetitions in (3, 4, 5):
        for name in ("comparable", "mostly repetitions", "two levels of seeds"):
            sizes = VARIANCES[name]
            # In standard errors of the difference: none, about one, and far more.
            error = math.sqrt(2 * (sizes.repetitions**2 + sizes.learning**2 / sizes.learning_seeds) / repetitions)
            error = math.hypot(error, math.sqrt(2 / 60) * sizes.entries)
            for effect in (0.0, 1.0, 12.0):
                found = planted(generator, studies, sizes, repetitions, effect * error)
                cells = (_shares(found[measure], studies) for measure in ("A", "K_after"))
                yield f"{repetitions:>11} {name:<24} effect {effect:4.1f} standard errors: " + " | ".join(cells)


def _shares(verdicts: Counter[str], studies: int) -> str:
    return " / ".join(f"{100 * verdicts[v] / studies:5.1f}" for v in VERDICTS)


VERDICTS = ("seen", "not seen (the opposite)", "within noise at this scale")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.coverage", description=__doc__.partition("\n")[0])
    parser.add_argument("--studies", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    estimates.RESAMPLES = RESAMPLES
    for line in tables(args.studies, args.seed):
        print(line, flush=True)


if __name__ == "__main__":
    main()
