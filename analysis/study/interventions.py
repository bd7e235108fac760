"""What an intervention of a study is, from its keys: figures and tables choose by these, never by its name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Intervention = Mapping[str, Any]

UNCHANGED, NO_INJECTION, ATTENTION, OTHER = "unchanged", "no injection", "attention temperature", "other"
EDITS = {"lowest": "resuscitation", "random": "random rows", "highest": "most active rows"}  # by selection
TEMPERATURE = "MLP temperature"
KINDS = (UNCHANGED, *EDITS.values(), TEMPERATURE, ATTENTION, OTHER, NO_INJECTION)

_ATTENTION, _MLP, _ROUNDS = "model.temperature_attention", "model.temperature_MLP", "injection.rounds"


def kind(intervention: Intervention) -> str:
    """One of KINDS."""
    overrides = intervention.get("overrides") or {}
    if intervention.get("ratio") is not None:
        selected = EDITS[intervention.get("selection", "lowest")]
        return OTHER if overrides else TEMPERATURE if intervention.get("temperature") else selected
    if not overrides:
        return UNCHANGED
    if set(overrides) == {_ROUNDS} and overrides[_ROUNDS] == 0:
        return NO_INJECTION
    return (
        {_ATTENTION: ATTENTION, _MLP: TEMPERATURE}.get(next(iter(overrides)), OTHER) if len(overrides) == 1 else OTHER
    )


def attention_temperature(intervention: Intervention) -> float | None:
    return intervention["overrides"][_ATTENTION] if kind(intervention) == ATTENTION else None


def edit(intervention: Intervention) -> tuple[float, float] | None:
    """(ratio p, factor q) of the edit of the least active memories; None for anything else."""
    if kind(intervention) != EDITS["lowest"]:
        return None
    return intervention["ratio"], intervention["factor"]


def changes_model(intervention: Intervention) -> bool:
    """Whether an intervention changes what a checkpoint computes from the first step on without editing its weights."""
    overrides = intervention.get("overrides") or {}
    return bool(intervention.get("temperature")) or any(str(key).startswith("model.") for key in overrides)
