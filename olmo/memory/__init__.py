"""The feed-forward layer as a key-value memory: find it, observe it, rescale it."""

from .observation import (
    COEFFICIENTS,
    GROUPS,
    MEMORIES_AT_ONCE,
    PROJECTED_AT_ONCE,
    SUMMED_AT_ONCE,
    CoefficientAverages,
    GroupedMeans,
    Observation,
    instance_means,
    jackknife_error,
    layer_entropy,
    observe,
)

__all__ = [
    "COEFFICIENTS",
    "GROUPS",
    "MEMORIES_AT_ONCE",
    "PROJECTED_AT_ONCE",
    "SUMMED_AT_ONCE",
    "CoefficientAverages",
    "GroupedMeans",
    "Observation",
    "instance_means",
    "jackknife_error",
    "layer_entropy",
    "observe",
]
