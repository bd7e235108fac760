"""Whether the demo's study saw what the paper found: differences with intervals, and one rule for the verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from analysis.estimates import Estimate, widen
from analysis.outcomes import compare, compare_loss_after, compare_loss_rise
from analysis.runs import Run
from analysis.series import paired_difference
from olmo.memory import jackknife_error

FORGETTING = "general"  # label of the held-out loss whose rise is forgetting
SEEN, OPPOSITE, NOISE = "seen", "not seen (the opposite)", "within noise at this scale"


def verdict(estimate: Estimate, expected: int) -> str:
    """SEEN where the 95 % interval lies entirely on the expected side of 0 (`expected` +1 or -1), OPPOSITE where
    entirely on the other side, NOISE where it includes 0 or is unknown."""
    if estimate.low > 0 or estimate.high < 0:
        return SEEN if (estimate.low > 0) == (expected > 0) else OPPOSITE
    return NOISE


def entropy_difference(first: Sequence[dict[str, Any]], second: Sequence[dict[str, Any]]) -> Estimate:
    """H(second) - H(first), mean over seeds, each pair measured on the same instances.

    The interval is 1.96 standard errors of the paired jackknife over instances, widened by the differences between
    seeds. All seeds are measured on the same instances, so a group of instances is left out of all of them together:
    their errors do not average out.
    """
    pairs = [paired_difference(one, other) for one, other in zip(first, second)]
    differences = np.array([difference for difference, _ in pairs])
    half = 1.96 * float(jackknife_error(np.mean([left_out for _, left_out in pairs], axis=0)))
    value = float(np.mean(differences))
    return widen(Estimate(value, value - half, value + half), differences)


def directions(
    runs: Mapping[str, Sequence[Run]], starts: Mapping[str, int], entropies: Sequence[Mapping[int, dict[str, Any]]]
) -> list[dict[str, Any]]:
    """Every direction, ready for JSON.

    runs: per condition, one a seed. starts: the pretraining step from which each condition started. entropies: per seed
    the results of analysis.entropy by step.
    """
    last = starts["last"]
    h_early, h_last = ([by_step[starts[key]] for by_step in entropies] for key in ("early", "last"))
    found = [
        _direction(
            "Entropy falls during pretraining",
            f"H at step {last} minus H at step {starts['early']} (nats)",
            entropy_difference(h_early, h_last),
            -1,
        )
    ]
    for other in ("early", "middle"):
        found.append(
            _direction(
                f"A later checkpoint acquires less than the {other} one",
                f"A from step {last} minus A from step {starts[other]} (points)",
                compare(runs[other], runs["last"])["A"],
                -1,
            )
        )
    for other in ("early", "middle"):
        found.append(
            _direction(
                f"A later checkpoint forgets more than the {other} one",
                f"rise of held-out loss from step {last} minus from step {starts[other]} (points)",
                compare_loss_rise(runs[other], runs["last"], FORGETTING),
                +1,
            )
        )
    for other in ("early", "last"):
        found.append(
            _direction(
                f"The middle checkpoint ends with more knowledge than the {other} one",
                f"K after training from step {starts['middle']} minus from step {starts[other]}",
                compare(runs[other], runs["middle"])["K_after"],
                +1,
            )
        )
    for key, factor in (("last_q1", 1), ("last_q2", 2)):
        found += [
            _direction(
                f"Resuscitation (q = {factor}) ends with more knowledge",
                f"K after training, resuscitated, q = {factor}, minus as it was",
                compare(runs["last"], runs[key])["K_after"],
                +1,
            ),
            _direction(
                f"Resuscitation (q = {factor}) ends having forgotten less",
                f"held-out loss after training, resuscitated, q = {factor}, minus as it was (% of the common start)",
                compare_loss_after(runs["last"], runs[key], FORGETTING),
                -1,
            ),
        ]
    found.append(
        _direction(
            "Our control: injection, not the science text alone, brings the knowledge",
            "A with injection minus A without (points)",
            compare(runs["last_control"], runs["last"])["A"],
            +1,
        )
    )
    return found


def _direction(claim: str, measured: str, estimate: Estimate, expected: int) -> dict[str, Any]:
    return {
        "claim": claim,
        "measured": measured,
        **estimate.as_json(),
        "expected": "above 0" if expected > 0 else "below 0",
        "verdict": verdict(estimate, expected),
    }
