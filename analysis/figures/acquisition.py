"""The figures of acquisition.json (analysis.acquisition), each with its numbers as CSV."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from analysis.canvas import KIND_COLORS, palette, save
from analysis.figures.dynamics import (
    Drawn,
    effectivity_by_injection,
    has_points,
    probes_by_kind,
    probes_by_part,
    retainability,
)
from analysis.figures.outcomes import acquisition_and_forgetting, outcomes_of, outcomes_over_pretraining
from analysis.rows import columns_of
from analysis.summary_table import by_condition, from_common_start
from olmo.knowledge.entries import SETTINGS


def save_acquisition(result: dict[str, Any], folder: Path) -> None:
    """Save the figures of acquisition.json (analysis.acquisition): A and forgetting of each run, the same over
    pretraining, log-probabilities over steps, effectivity, retainability. Outcomes are those of conditions, from the
    start that edited and unedited runs share."""
    runs, outcomes = result["runs"], [from_common_start(row) for row in by_condition(result)]
    labels = [label for label in outcomes[0]["loss_rise"] if all(label in r["loss_rise"] for r in outcomes)]
    colors = palette(len(outcomes))
    if labels:
        rows = [
            {"name": r["run"], "color": c, "A": r["A"], "loss_rise": r["loss_rise"][labels[0]]}
            for r, c in zip(outcomes, colors)
        ]
        numbers = [
            {"run": r["name"], **columns_of("A, %", r["A"]), **columns_of(f"rise of {labels[0]}, %", r["loss_rise"])}
            for r in rows
        ]
        save(acquisition_and_forgetting(rows, labels[0]), folder / "acquisition_and_forgetting", numbers)
    if len(outcomes) > 1:
        measures = outcomes_of(outcomes).items()
        numbers = [
            {"run": r["run"], "start": r["start"]}
            | {column: value for name, found in measures for column, value in columns_of(name, found[place]).items()}
            for place, r in enumerate(outcomes)
        ]
        save(outcomes_over_pretraining(outcomes, colors), folder / "outcomes_over_pretraining", numbers)
    colors = palette(len(runs))
    asked = {name for run in runs for point in run["curve"] for name in point}
    parts = [[f"K_{s}_{kind}" for kind in KIND_COLORS] for s in SETTINGS if f"K_{s}" in asked]
    points = [{"run": run["run"], **point} for run in runs for point in run["curve"]]
    save(probes_by_part(runs, colors, parts), folder / "probes_over_steps", points)
    save(*_drawn(probes_by_kind(runs), folder / "probes_by_kind"))
    measured = [run for run in runs if run["dynamics"] is not None]
    if has_points(measured, "effectivity_by_injection"):
        save(*_drawn(effectivity_by_injection(measured), folder / "effectivity"))
    if has_points(measured, "retainability"):
        save(*_drawn(retainability(measured), folder / "retainability"))
    in_tokens = [run for run in measured if run.get("tokens_per_step") is not None]
    if has_points(in_tokens, "retainability"):
        save(*_drawn(retainability(in_tokens, in_tokens=True), folder / "retainability_tokens"))


def _drawn(drawn: Drawn, stem: Path) -> tuple[Figure, Path, list[dict[str, Any]]]:
    return drawn[0], stem, drawn[1]
