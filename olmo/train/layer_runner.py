"""How a training step runs the layers: compiled, or with activations that the backward pass recomputes.

`activation_checkpointing` has OLMo's strategies. `whole_layer` keeps only the input of every layer; `one_in_two`,
`one_in_three`, `one_in_four` and `one_in_eight` do so in layers whose number, counted from 0, is a multiple of 2, 3, 4
or 8, `two_in_three` and `three_in_four` in layers whose number is not a multiple of 3 or 4. `fine_grained` recomputes
in every layer the norms, attention from the output of `att_proj` to that of `attn_out`, and the memory coefficients;
only models of ours have it. Losses and gradients are equal bit for bit.

Evaluation does neither: it keeps no activations, and its batches have many shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..config.schema import ActivationCheckpointingStrategy, TrainConfig
from ..exceptions import ConfigurationError
from ..model.causal_lm import CausalLM, Model, dropouts
from ..model.olmo import Block, LayerRunner, Table

# Strategy -> (k, whether the layers that are multiples of k are recomputed, or all others).
_CHOSEN = {
    "whole_layer": (1, True),
    "one_in_two": (2, True),
    "one_in_three": (3, True),
    "one_in_four": (4, True),
    "one_in_eight": (8, True),
    "two_in_three": (3, False),
    "three_in_four": (4, False),
}


def recomputes(strategy: ActivationCheckpointingStrategy | None, number: int) -> bool:
    """Whether the backward pass recomputes all activations of a layer, numbered from 0."""
    if strategy not in _CHOSEN:
        return False
    every, multiples = _CHOSEN[strategy]
    return (number % every == 0) == multiples


def layer_runner(config: TrainConfig, model: Model, device: torch.device | None = None) -> LayerRunner | None:
    """The function that runs the layers of a training step in place of `Block.compute`; None if none is needed.

    The layers of other families get a forward method instead that does the same in training mode. Call it before the
    model is distributed, so that FSDP gathers the weights of a layer outside of what is compiled and recomputed.

    Raises ConfigurationError for recomputed activations with dropout on MPS, where torch would draw new dropout masks.
    """
    strategy = config.activation_checkpointing
    if strategy is None and config.compile is None:
        return None
    drops = dropouts(model)
    if drops and strategy is not None and device is not None and device.type == "mps":
        keys = "all of model.attention_dropout, residual_dropout and embedding_dropout"
        raise ConfigurationError(
            "activation_checkpointing: on MPS torch computes wrong gradients with dropout (its issue 127676); "
            f"leave it out, or set {'the dropouts of its config.json' if isinstance(model, CausalLM) else keys} to 0"
        )
    draws = drops or isinstance(model, CausalLM)  # some families add noise elsewhere
    again: Callable[..., Any] = partial(checkpoint, use_reentrant=False, preserve_rng_state=draws)
    if isinstance(model, CausalLM):
        for number, layer in enumerate(model.blocks):
            _train_with(layer, config, again if recomputes(strategy, number) else None)
        return None
    run: Callable[..., Tensor] = Block.compute
    if strategy == "fine_grained":
        run = partial(Block.compute, call=again)
    run = _compiled(run, config)  # one graph for all layers

    def run_layer(number: int, block: Block, x: Tensor, table: Table, seen: Tensor | None) -> Tensor:
        return again(run, block, x, table, seen) if recomputes(strategy, number) else run(block, x, table, seen)

    return run_layer


def _compiled(run: Callable[..., Any], config: TrainConfig) -> Callable[..., Any]:
    if config.compile is None:
        return run
    try:
        return torch.compile(run, **asdict(config.compile))
    except RuntimeError as error:  # a backend or mode that torch does not have
        raise ConfigurationError(f"compile: {str(error).splitlines()[0]}") from error


def _train_with(layer: nn.Module, config: TrainConfig, again: Callable[..., Any] | None) -> None:
    """Let a layer of transformers' compile its forward pass, or recompute it, where it trains."""
    plain = layer.forward
    run = _compiled(plain, config)

    @wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if not layer.training:
            return plain(*args, **kwargs)
        return run(*args, **kwargs) if again is None else again(run, *args, **kwargs)

    layer.forward = forward
