"""The figures of acquisition.json (analysis.acquisition), each with its numbers as CSV."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from analysis.canvas import KIND_COLORS, palette, save
from analysis.figures.dynamics import probes_by_part, retainability
from analysis.figures.outcomes import acquisition_and_forgetting, outcomes_over_pretraining
from analysis.summary_table import by_condition, from_common_start
from olmo.knowledge.entries import SETTINGS


def save_acquisition(result: dict[str, Any], folder: Path) -> None:
    """Save the figures of acquisition.json (analysis.acquisition): A and forgetting of each run, the same over
    pretraining, log-probabilities over steps, retainability. Outcomes are those of conditions, from the start that
    edited and unedited runs share."""
    runs, outcomes = result["runs"], [from_common_start(row) for row in by_condition(result)]
    labels = [label for label in outcomes[0]["loss_rise"] if all(label in r["loss_rise"] for r in outcomes)]
    colors = palette(len(outcomes))
    if labels:
        rows = [
            {"name": r["run"], "color": c, "A": r["A"], "loss_rise": r["loss_rise"][labels[0]]}
            for r, c in zip(outcomes, colors)
        ]
        save(acquisition_and_forgetting(rows, labels[0]), folder / "acquisition_and_forgetting")
    if len(outcomes) > 1:
        save(outcomes_over_pretraining(outcomes, colors), folder / "outcomes_over_pretraining")
    colors = palette(len(runs))
    asked = {name for run in runs for point in run["curve"] for name in point}
    parts = [[f"K_{s}_{kind}" for kind in KIND_COLORS] for s in SETTINGS if f"K_{s}" in asked]
    save(probes_by_part(runs, colors, parts), folder / "probes_over_steps")
    measured = [run for run in runs if run["dynamics"] is not None]
    if any(group["retainability"]["at"] for run in measured for group in run["dynamics"]["groups"].values()):
        save(retainability(measured), folder / "retainability")
