"""The trainer and what it is made of."""

from .trainer import CPU, Trainer, TrainState

__all__ = ["CPU", "TrainState", "Trainer"]
