"""What a reader of a study may conclude, and what not: sentences that follow from its seeds, level, and scale."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

from analysis.study.directions import NOT_MEASURED, ONE_RUN

PAPER = "16 layers of 8,192 memories (1B) and 32 of 11,008 (7B)"


def repetitions(study: Mapping[str, Any]) -> int:
    """Number of seeds at the level that verdicts are about."""
    seeds = study["seeds"]
    return len(seeds) if study["about"] == "model" else max(map(len, seeds), default=0)


def repeated(study: Mapping[str, Any]) -> str:
    """What was repeated, as a sentence."""
    seeds, learning = study["seeds"], max(map(len, study["seeds"]), default=0)
    continual = f"{learning} {'seed' if learning == 1 else 'seeds'} of continual learning"
    if study["about"] == "checkpoint":
        return f"{continual} from every start."
    number = f"{len(seeds)} {'pretraining' if len(seeds) == 1 else 'pretrainings'}"
    if not study["conditions"]:
        return f"{number}."
    return (
        f"{number} with different seeds, each with {continual}." if len(seeds) > 1 else f"{number}, with {continual}."
    )


def may(study: Mapping[str, Any]) -> list[str]:
    """What the study supports."""
    count, about = repetitions(study), study["about"]
    verdicts = Counter(d["verdict"] for d in study["directions"])
    found = []
    if not verdicts:
        found.append("The tables and figures describe these models and runs. The study compares nothing.")
    elif count < 2:
        found.append(
            "The numbers describe these runs. Their intervals include the choice of entries and instances, "
            "not what another seed would change, so no verdict is given"
            + (", except of entropies, which no seed changes." if verdicts.keys() - {ONE_RUN, NOT_MEASURED} else ".")
        )
    else:
        counts = ", ".join(f"{number} {verdict}" for verdict, number in verdicts.items())
        found.append(f"Of {len(study['directions'])} directions: {counts}.")
        subject = (
            "models pretrained as these were, in architecture, text and settings; seeds differ from pretraining on"
            if about == "model"
            else "continual learning from these checkpoints; seeds differ in continual learning alone"
        )
        found.append(f"A verdict is about the sign of a difference, for {subject}.")
    if len(study["interventions"]) > 1 and study["conditions"] and not study["warnings"]:
        found.append(
            "Conditions of one seed share the data and their order, so the difference between an intervention and none "
            "is an effect of the intervention, on all that it changes, entropy being one of these."
        )
    return found


def may_not(study: Mapping[str, Any]) -> list[str]:
    """What the study does not support."""
    count, about, number = repetitions(study), study["about"], len(study["directions"])
    found = []
    if number and about == "checkpoint":
        found.append(
            "Another pretraining, with the same text and settings, may give the other sign: the study does not repeat "
            "pretraining."
        )
    if number and 1 < count < 5:
        found.append(
            f"{count} seeds give wide intervals: a difference within noise may exist, and need more seeds to be seen."
        )
    if number > 1 and count > 1:
        chance = f"of {number} intervals of 95 %, about {0.05 * number:.1f} exclude 0 by chance"
        found.append(f"One verdict among many is weak evidence: {chance}.")
    points = len((study.get("joined") or {}).get("points") or ())
    if points:
        found.append(
            f"A correlation over {points} conditions shows no cause: whatever changes during pretraining changes along."
        )
    if sizes := scale(study):
        found.append(
            f"The models have {sizes}, the paper's {PAPER}; what holds here may not hold there, nor the reverse."
        )
    if len(study.get("settings") or {}) == 1 and study["conditions"]:
        found.append("One training setting does not show what another learning rate, batch or text would give.")
    if study.get("missing"):
        found.append("Parts are missing, named at the top; no number or verdict includes them.")
    return found


def scale(study: Mapping[str, Any]) -> str:
    """Layers and memories of the measured models, where all entropies have the same; else ''."""
    sizes = {(len(e["layers"]), e.get("maximum")) for e in study["entropies"]}
    if len(sizes) != 1 or (found := sizes.pop())[1] is None or not found[0]:
        return ""
    layers, maximum = found
    memories = math.exp(maximum / layers)  # where all layers have the same number
    if (layers, round(memories)) in ((16, 8192), (32, 11008)) or abs(memories - round(memories)) > 1e-3 * memories:
        return ""
    return f"{layers} layers of {round(memories):,} memories"
