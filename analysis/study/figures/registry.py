"""The figures that a study file may name, and drawing those that it does name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from analysis.canvas import save
from analysis.study.figures import dynamics, entropy, joined, outcomes
from analysis.study.figures.choice import Lacking, Study
from olmo.exceptions import did_you_mean

INTERVALS = "Intervals are 95 %."
FROM_COMMON_START = f"A and forgetting are measured from the checkpoint as it was saved. {INTERVALS}"
RETAINED = (
    "Share of what was acquired that is left after the maximum that follows the last injection. Dashed: the fitted "
    "line, whose slope against log10 is -a. Standard error and R² are those of the fit to the means drawn."
)


@dataclass(frozen=True)
class Kind:
    """A figure: its title, what a reader has to know, and the function of study.json that draws it."""

    title: str
    caption: str
    draw: Callable[[Study], tuple[Figure, list[dict[str, Any]]]]


FIGURES: dict[str, Kind] = {
    "overview": Kind(
        "Entropy, acquisition and forgetting",
        f"Large points are the checkpoints from which training starts. {FROM_COMMON_START}",
        outcomes.overview,
    ),
    "acquisition_and_forgetting": Kind(
        "Acquisition and forgetting of every condition", FROM_COMMON_START, outcomes.acquisition_and_forgetting
    ),
    **{
        f"probes_{setting}": Kind(
            f"Probes of setting {setting} during training",
            "Mean log-probability of the target spans; dotted lines are rounds of injection.",
            partial(outcomes.probes, setting=setting),
        )
        for setting in ("paraphrase", "once", "duplicate")
    },
    "figure_2": Kind(
        "Knowledge entropy over pretraining (figure 2)",
        f"Models have other ceilings, and a panel each. {INTERVALS}",
        entropy.figure_2,
    ),
    "figure_3": Kind("Attention and next-token entropy over pretraining (figure 3)", INTERVALS, entropy.figure_3),
    "figure_4a": Kind("Acquisition and forgetting by start (figure 4a)", FROM_COMMON_START, outcomes.figure_4a),
    "figure_4b": Kind(
        "Knowledge and accuracy by start (figure 4b)",
        f"After training (solid) and before (dotted). {INTERVALS}",
        outcomes.figure_4b,
    ),
    "figure_5a": Kind(
        "Acquisition and forgetting over the amplifying factor (figure 5a)",
        f"The dashed line is the same checkpoint without an edit. {FROM_COMMON_START}",
        outcomes.figure_5a,
    ),
    "figure_5b": Kind(
        "Knowledge and accuracy over the amplifying factor (figure 5b)",
        f"The dashed line is the same checkpoint without an edit. {INTERVALS}",
        outcomes.figure_5b,
    ),
    "figure_6": Kind("Knowledge entropy of another family over pretraining (figure 6)", INTERVALS, entropy.figure_6),
    "figure_7": Kind("Knowledge entropy on several texts (figure 7)", INTERVALS, entropy.figure_7),
    "figure_8": Kind(
        "Knowledge entropy of each layer (figure 8)",
        f"Intervals are over instances, the same of all pretrainings. {INTERVALS}",
        entropy.figure_8,
    ),
    "figure_9": Kind("Knowledge entropy by coefficient (figure 9)", INTERVALS, entropy.figure_9),
    "breadth": Kind(
        "How broadly memories are used",
        "Effective share of memories, Gini coefficient of the average coefficients, and share of memories whose "
        f"average coefficient is below a tenth of the layer's mean. {INTERVALS}",
        entropy.breadth,
    ),
    "figure_11": Kind("Acquisition and knowledge by setting of probes (figure 11)", INTERVALS, outcomes.figure_11),
    "figure_12": Kind(
        "Knowledge and accuracy before and after training (figure 12)",
        f"After training (solid) and before (dotted). {INTERVALS}",
        outcomes.figure_4b,
    ),
    "figure_13": Kind("Outcomes by start and setting (figure 13)", FROM_COMMON_START, outcomes.figure_13),
    "figure_14": Kind("Entropy and acquisition of two families (figure 14)", INTERVALS, outcomes.figure_14),
    "figure_15": Kind(
        "Outcomes over the ratio of edited memories (figure 15)",
        f"The dashed line is the same checkpoint without an edit. {FROM_COMMON_START}",
        outcomes.figure_15,
    ),
    "figure_16": Kind(
        "Outcomes by start, with and without resuscitation (figure 16)", FROM_COMMON_START, outcomes.figure_16
    ),
    "figure_17": Kind(
        "Outcomes over the amplifying factor from earlier starts (figure 17)",
        f"Dashed lines are the same checkpoints without an edit. {FROM_COMMON_START}",
        outcomes.figure_17,
    ),
    "figure_18": Kind("Attention temperatures beside resuscitation (figure 18)", FROM_COMMON_START, outcomes.figure_18),
    "chang_probes": Kind(
        "Change of log-probability by kind of probe (Chang et al.)",
        "Mean over the probes of a kind, since the first evaluation; dotted lines are rounds of injection.",
        dynamics.change,
    ),
    "chang_effectivity": Kind(
        "Effectivity by number of injections (Chang et al.)",
        f"Rise of a probe's log-probability from an injection to its maximum in the window after it. {INTERVALS}",
        dynamics.effectivity,
    ),
    "chang_retainability": Kind("Retainability over steps (Chang et al.)", RETAINED, dynamics.retainability),
    "chang_retainability_tokens": Kind(
        "Retainability over tokens (Chang et al.)", RETAINED, dynamics.retainability_in_tokens
    ),
    "joined": Kind(
        "Entropy against outcomes",
        "A point a condition; r: Pearson's coefficient, its interval is over conditions. A handful of points share a "
        "trend.",
        joined.scatter,
    ),
    "effects": Kind(
        "Effects of interventions against the change of entropy that each made",
        "Paired differences from the same start without an intervention. If entropy alone mattered, interventions with "
        f"the same change of H would have the same effects. {INTERVALS}",
        joined.effects,
    ),
}


def check_names(names: Sequence[str]) -> None:
    """Raise ValueError, with the nearest, for a name that is no figure."""
    for name in names:
        if name not in FIGURES:
            raise ValueError(f"unknown figure '{name}'{did_you_mean(name, FIGURES)}; known: {', '.join(FIGURES)}")


def draw_all(study: Study, names: Sequence[str], folder: Path) -> list[dict[str, Any]]:
    """Draw figures into `folder`/figures, as PNG, PDF and CSV; returns their rows of study.json, with the reason where
    one cannot be drawn because the study lacks what it shows."""
    check_names(names)
    found = []
    for name in names:
        kind = FIGURES[name]
        row: dict[str, Any] = {"name": name, "title": kind.title, "caption": kind.caption, "files": []}
        try:
            figure, rows = kind.draw(study)
        except Lacking as lacking:
            row["missing"] = f"needs {lacking}"
        else:
            save(figure, folder / "figures" / name, rows)
            row["files"] = [f"figures/{name}{suffix}" for suffix in (".png", ".pdf", ".csv")]
        found.append(row)
    return found
