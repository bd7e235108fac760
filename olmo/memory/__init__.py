"""The feed-forward layer as a key-value memory: find it, observe it, measure its entropy, rescale it."""

from .entropy import GROUPS, CoefficientAverages, GroupedMeans, jackknife_error, layer_entropy
from .forward import MEMORIES_AT_ONCE, PROJECTED_AT_ONCE, SUMMED_AT_ONCE
from .observation import COEFFICIENTS, Observation, instance_means, observe

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
