"""The feed-forward layer as a key-value memory: find it, observe it, measure its entropy, rescale it."""

# ruff: noqa: F401 (what is imported here is what the package exports)
from typing import TYPE_CHECKING

from .. import on_use

if TYPE_CHECKING:
    from .entropy import GROUPS, CoefficientAverages, GroupedMeans, jackknife_error, layer_entropy
    from .forward import MEMORIES_AT_ONCE, PROJECTED_AT_ONCE, SUMMED_AT_ONCE
    from .observation import COEFFICIENTS, Observation, instance_means, observe
else:
    __getattr__, __dir__ = on_use(
        __name__,
        entropy="GROUPS CoefficientAverages GroupedMeans jackknife_error layer_entropy",
        forward="MEMORIES_AT_ONCE PROJECTED_AT_ONCE SUMMED_AT_ONCE",
        observation="COEFFICIENTS Observation instance_means observe",
    )
