"""Log-probabilities of probes over the steps of a run, as a test wants them; and E and R of them, by plain loops."""

from __future__ import annotations

import math

import numpy as np

from analysis.probes import ProbeSeries


def series(steps, values, setting: str = "once", per_entry: int = 1) -> ProbeSeries:
    """Of probes of one setting and kind (T, Q), `per_entry` of them an entry."""
    values = np.asarray(values, dtype=np.float64)
    count = values.shape[1]
    return ProbeSeries(
        np.asarray(steps, dtype=np.int64),
        np.array([setting] * count),
        np.arange(count) // per_entry,
        np.array(["semantic"] * count),
        values,
    )


def decaying(gains, slope: float, start: float = 1.0, last: int = 400, at: int = 10, peak: int = 0) -> tuple:
    """(steps, values): probes that gain by an injection at step `at`, whose maximum is `peak` steps later, and of whose
    gain a share `start - slope * log10 t` is left t steps after it."""
    steps = np.arange(last + 1)
    t = np.maximum(steps - at - peak, 1)
    share = np.where(steps < at, 0.0, np.where(steps <= at + peak, 1.0, start - slope * np.log10(t)))
    share[(steps >= at) & (steps < at + peak)] = 0.5
    return steps, -6.0 + np.outer(share, gains)


def loops(probes: ProbeSeries, encounters: dict, window: int) -> tuple[dict, dict]:
    """({(probe, i): E}, {(probe, t): R}) by the definitions, one probe after the other."""
    steps = probes.steps.tolist()
    effectivity, retainability = {}, {}
    for probe in range(probes.values.shape[1]):
        level = {s: v for s, v in zip(steps, probes.values[:, probe].tolist()) if not math.isnan(v)}
        entered = encounters.get((str(probes.settings[probe]), int(probes.entries[probe])), [])
        entered = [s for s in entered if s <= steps[-1]]
        before = peak = at = None
        for number, step in enumerate(entered):
            latest = step + window - 1
            if number + 1 < len(entered):
                latest = min(latest, entered[number + 1] - 1)
            base = level.get(step - 1)
            following = [] if base is None else [s for s in level if step <= s <= latest]
            peak = at = None
            for s in sorted(following):
                if peak is None or level[s] > peak:
                    peak, at = level[s], s
            if number == 0:
                before = base
            if peak is not None and base is not None:
                effectivity[probe, number] = peak - base
        if before is not None and peak is not None and peak > before:
            for s in level:
                if s > at:
                    retainability[probe, s - at] = (level[s] - before) / (peak - before)
    return effectivity, retainability
