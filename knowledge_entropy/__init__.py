"""Knowledge entropy in other programs: measure, observe, edit and score models, and inject knowledge into training.

    import knowledge_entropy as ke

    result = ke.measure(model, texts, tokenizer=tokenizer)
    result.entropy, result.standard_error

Importing this package imports nothing else and changes no global state; each name is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from analysis.result import Difference as Difference
    from analysis.result import Result as Result

    from .editing import Edit as Edit
    from .editing import observe as observe
    from .editing import resuscitate as resuscitate
    from .injected_dataset import InjectedDataset as InjectedDataset
    from .injecting import KnowledgePlan as KnowledgePlan
    from .measuring import measure as measure
    from .scoring import Scores as Scores
    from .scoring import score as score
    from .trainer import KnowledgeEntropyCallback as KnowledgeEntropyCallback
    from .trainer import ProbesCallback as ProbesCallback

__version__ = "1.0.0"  # the only place; pyproject.toml reads it

# Each name, and the module that defines it.
_WHERE = {
    "Difference": "analysis.result",
    "Edit": "knowledge_entropy.editing",
    "InjectedDataset": "knowledge_entropy.injected_dataset",
    "KnowledgeEntropyCallback": "knowledge_entropy.trainer",
    "KnowledgePlan": "knowledge_entropy.injecting",
    "ProbesCallback": "knowledge_entropy.trainer",
    "Result": "analysis.result",
    "Scores": "knowledge_entropy.scoring",
    "measure": "knowledge_entropy.measuring",
    "observe": "knowledge_entropy.editing",
    "resuscitate": "knowledge_entropy.editing",
    "score": "knowledge_entropy.scoring",
}
__all__ = list(_WHERE)


if not TYPE_CHECKING:  # with it, mypy would accept every name

    def __getattr__(name: str) -> object:
        if name not in _WHERE:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        importlib.import_module("analysis")  # raises where another project's olmo would be imported
        return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
