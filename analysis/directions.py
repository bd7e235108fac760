"""Whether the demo's study saw what the paper found: differences with intervals, and one rule for the verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from analysis.estimates import Estimate, jackknife
from analysis.outcomes import compare, compare_loss_rise
from analysis.pairs import paired_difference
from analysis.runs import Run, from_original

FORGETTING = "general"  # label of the held-out loss whose rise is forgetting
SEEN, OPPOSITE, NOISE = "seen", "not seen (the opposite)", "within noise at this scale"
ONE_RUN = "one run; not a verdict"


def verdict(estimate: Estimate, expected: int) -> str:
    """SEEN where the 95 % interval lies entirely on the expected side of 0 (`expected` +1 or -1), OPPOSITE where
    entirely on the other side, NOISE where it includes 0 or is unknown. ONE_RUN where what the verdict is about was
    not repeated: the interval does not contain what another seed would change."""
    if estimate.repetitions == 1:
        return ONE_RUN
    if estimate.low > 0 or estimate.high < 0:
        return SEEN if (estimate.low > 0) == (expected > 0) else OPPOSITE
    return NOISE


def entropy_difference(
    first: Sequence[dict[str, Any]], second: Sequence[dict[str, Any]], about: str = "model"
) -> Estimate:
    """H(second) - H(first), mean over pretraining seeds, each pair measured on the same instances. The interval is
    that of `estimates.jackknife`."""
    pairs = [paired_difference(one, other) for one, other in zip(first, second)]
    return jackknife([value for value, _ in pairs], np.array([left_out for _, left_out in pairs]), about)


def directions(
    runs: Mapping[str, Sequence[Run]], starts: Mapping[str, int], entropies: Sequence[Mapping[int, dict[str, Any]]]
) -> list[dict[str, Any]]:
    """Every direction, ready for JSON.

    runs: per condition, one a seed. starts: the pretraining step from which each condition started. entropies: per seed
    the results of analysis.entropy by step.
    """
    found: list[dict[str, Any]] = []
    early, middle, last = (starts[key] for key in ("early", "middle", "last"))

    def add(claim: str, measured: str, estimate: Estimate, expected: int) -> None:
        side, seen = "above 0" if expected > 0 else "below 0", verdict(estimate, expected)
        found.append({"claim": claim, "measured": measured, **estimate.as_json(), "expected": side, "verdict": seen})

    change = entropy_difference([h[early] for h in entropies], [h[last] for h in entropies])
    add("Entropy falls during pretraining", f"H at step {last} minus H at step {early} (nats)", change, -1)
    for other in ("early", "middle"):
        measured = f"A from step {last} minus A from step {starts[other]} (points)"
        change = compare(runs[other], runs["last"])["A"]
        add(f"A later checkpoint acquires less than the {other} one", measured, change, -1)
    for other in ("early", "middle"):
        measured = f"rise of held-out loss from step {last} minus from step {starts[other]} (points)"
        change = compare_loss_rise(runs[other], runs["last"], FORGETTING)
        add(f"A later checkpoint forgets more than the {other} one", measured, change, +1)
    for other in ("early", "last"):
        measured = f"K after training from step {middle} minus from step {starts[other]}"
        change = compare(runs[other], runs["middle"])["K_after"]
        add(f"The middle checkpoint ends with more knowledge than the {other} one", measured, change, +1)
    for key, q in (("last_q1", 1), ("last_q2", 2)):
        measured = f"K after training, resuscitated, q = {q}, minus as it was"
        change = compare(runs["last"], runs[key])["K_after"]
        add(f"Resuscitation (q = {q}) ends with more knowledge", measured, change, +1)
        measured = f"rise of held-out loss, resuscitated, q = {q}, minus as it was (points, common start)"
        # From the weights that both share: what the edit lost at once counts as lost.
        change = compare_loss_rise(runs["last"], [from_original(run) for run in runs[key]], FORGETTING)
        add(f"Resuscitation (q = {q}) ends having forgotten less", measured, change, -1)
    change = compare(runs["last_control"], runs["last"])["A"]
    claim = "Our control: injection, not the science text alone, brings the knowledge"
    add(claim, "A with injection minus A without (points)", change, +1)
    return found
