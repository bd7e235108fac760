"""The trainer and its parts."""

# ruff: noqa: F401 (what is imported here is what the package exports)
from .state import TrainState
from .trainer import Trainer
