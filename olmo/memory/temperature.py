"""The published trainer's two controls of sharpness: temperatures of attention and of the feed-forward memories.

`model.temperature_attention` divides the attention scores before the softmax; `model.temperature_MLP` names a file
with one divisor of the memory coefficient per layer and memory. With `model.temperature_decay` both decay linearly to 1
over the run (method section 5): T(step) = T - (T - 1) step / steps.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..config.model import ModelConfig
from ..distributed.devices import to_device
from ..exceptions import ConfigurationError
from ..files.tensors import read_tensor
from ..model.causal_lm import CausalLM, Model
from ..model.placement import device_of


@dataclass(frozen=True)
class Temperatures:
    """Divisors of attention scores (one number) and of memory coefficients (L, M), float32; None divides nothing."""

    attention: float | None = None
    memories: Tensor | None = None
    decay: bool = True

    @classmethod
    def from_config(cls, config: ModelConfig, folder: Path | None = None) -> Temperatures:
        """The temperatures of a configuration; the file may be named relative to the checkpoint's `folder`.

        Raises ConfigurationError for a file of another shape or of numbers that are not positive.
        """
        attention, memories = config.temperature_attention, None
        if config.temperature_MLP is not None:
            path = Path(config.temperature_MLP)
            if not path.is_file() and folder is not None:
                path = folder / config.temperature_MLP
            memories = read_tensor(path).float()
            wanted = (config.n_layers, config.inner_size)
            if memories.shape != wanted or not (memories > 0).all():
                raise ConfigurationError(
                    f"model.temperature_MLP: {path} must hold positive numbers of shape {wanted}, "
                    f"found shape {tuple(memories.shape)}"
                )
            memories = None if (memories == 1.0).all() else memories
        return cls(None if attention == 1.0 else attention, memories, config.temperature_decay is not False)

    def at(self, done: float) -> Temperatures:
        """The temperatures after a fraction `done` of the run."""
        if not self.decay:
            return self
        left = 1.0 - done
        if left == 0.0:  # comparing the divisors with 1 instead would make the step wait for its device
            return Temperatures()
        attention = None if self.attention is None else 1.0 + (self.attention - 1.0) * left
        memories = None if self.memories is None else 1.0 + (self.memories - 1.0) * left
        return replace(self, attention=attention, memories=memories)

    def to(self, device: torch.device) -> Temperatures:
        """The same with the divisors on a device, where `at` then computes."""
        return self if self.memories is None else replace(self, memories=self.memories.to(device))

    def __bool__(self) -> bool:
        return self.attention is not None or self.memories is not None

    def apply(self, model: Model) -> None:
        """Make the model compute with these temperatures, which other families do not have."""
        if isinstance(model, CausalLM):
            return
        on: dict[torch.device, tuple[Tensor | None, Tensor | None]] = {}
        for layer, block in enumerate(model.blocks):
            if (device := device_of(block)) not in on:
                attention = None if self.attention is None else torch.full((), self.attention, device=device)
                on[device] = (attention, None if self.memories is None else to_device(self.memories, device))
            block.attention_temperature, memories = on[device]
            block.memory_temperature = None if memories is None else memories[layer]
