"""The trainer and its parts."""

# ruff: noqa: F401 (what is imported here is what the package exports)
from typing import TYPE_CHECKING

from .. import on_use

if TYPE_CHECKING:
    from .state import TrainState
    from .stopping import Signals
    from .trainer import Trainer
else:
    __getattr__, __dir__ = on_use(__name__, state="TrainState", stopping="Signals", trainer="Trainer")
