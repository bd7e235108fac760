"""Models of OLMo's shapes with random weights, made where they compute, and the operations of their entropy."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from olmo.config import ModelConfig, load
from olmo.model import OLMo
from scripts.gpu.place import Place

SMALL: dict[str, Any] = {
    **{"d_model": 64, "n_heads": 4, "n_layers": 2, "mlp_hidden_size": 128, "max_sequence_length": 64},
    **{"vocab_size": 128, "embedding_size": 128, "eos_token_id": 0},
}


def shape(place: Place, name: str, **small: Any) -> ModelConfig:
    """The configuration of a model of configs/official, or of a tiny one of its kind, with the settings `small`."""
    config = load(f"configs/official/{name}.yaml").model
    return replace(config, **{**SMALL, **small}) if place.small else config


@torch.no_grad()
def random_model(place: Place, config: ModelConfig, dtype: torch.dtype) -> OLMo:
    """Weights drawn on the device in `dtype`: nothing else ever has their size."""
    model = OLMo.empty(config).to(dtype).to_empty(device=place.device).eval()
    generator = torch.Generator(place.device).manual_seed(0)
    for weight in model.parameters():
        if weight.ndim > 1:
            weight.normal_(std=1 / math.sqrt(weight.shape[1]), generator=generator)
        else:
            weight.fill_(1.0)
    return model


def random_rows(config: ModelConfig, instances: int) -> list[NDArray[np.int64]]:
    """Token ids of instances of the model's context."""
    drawn = np.random.default_rng(0).integers(0, config.vocab_size, (instances, config.max_sequence_length))
    return list(drawn)


def entropy_operations(model: OLMo) -> float:
    """Floating-point operations on one token in an instance of the model's context, up to its last coefficient: 2 a
    weight of the linear maps, but for the last down projection and the vocabulary, which are not computed, and
    4 x layers x D x length for attention, masked positions counted as in `training_operations`."""
    weights = sum(m.weight.numel() for block in model.blocks for m in block.modules() if isinstance(m, nn.Linear))
    weights -= model.blocks[-1].ff_out.weight.numel()
    config = model.config
    return 2.0 * weights + 4.0 * config.n_layers * config.d_model * config.max_sequence_length
