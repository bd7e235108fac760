"""Chang et al.'s figures (arXiv 2406.11813), from the rows of study.json: (figure, rows of its CSV)."""

from __future__ import annotations

from typing import Any

from analysis.figures import dynamics
from analysis.figures.dynamics import Drawn
from analysis.study.figures.choice import Study, in_order, need


def _conditions(study: Study) -> list[dict[str, Any]]:
    return [{**condition, "run": condition["name"]} for condition in in_order(study, study["conditions"])]


def change(study: Study) -> Drawn:
    """Change of log-probability over steps, by setting and kind of probe."""
    found = [c for c in _conditions(study) if dynamics.settings_of_curves([c])]
    need(found, "training whose evaluations have probes")
    return dynamics.probes_by_kind(found)


def _measured(study: Study, curve: str) -> list[dict[str, Any]]:
    found = [c for c in _conditions(study) if c.get("dynamics") and dynamics.has_points([c], curve)]
    need(found, "probes scored around injections (probing, or eval_interval: 1, in the configuration of training)")
    return found


def effectivity(study: Study) -> Drawn:
    """Mean effectivity by the number of the injection."""
    return dynamics.effectivity_by_injection(_measured(study, "effectivity_by_injection"))


def retainability(study: Study) -> Drawn:
    """Mean retainability over steps since the maximum, with its fit."""
    return dynamics.retainability(_measured(study, "retainability"))


def retainability_in_tokens(study: Study) -> Drawn:
    """The same over tokens."""
    found = [c for c in _measured(study, "retainability") if c["tokens_per_step"] is not None]
    need(found, "runs with batch size and length in their config.yaml")
    return dynamics.retainability(found, in_tokens=True)
