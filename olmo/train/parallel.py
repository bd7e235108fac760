"""How the model that trains is distributed over the processes: on one process as it is, by DDP, or by FSDP.

DDP keeps the whole model on every device. FSDP (torch's `fully_shard`) keeps a shard of weights, gradients and
optimizer state on each, and gathers the weights of a group of layers when they are needed. Of OLMo's keys

* `fsdp.wrapping_strategy` sets which layers are gathered together: `by_block` each by itself; `by_block_group` those of
  a group of `model.block_group_size`; `one_in_two` to `one_in_five` every second to fifth by itself, all others with
  the embeddings; `size_based` groups of successive layers that reach 100 million weights. The rest (embeddings, last
  norm; without a strategy, everything) is gathered for the whole step, so `..._and_size` changes nothing.
* `fsdp.sharding_strategy`: FULL_SHARD frees gathered weights after the forward pass, SHARD_GRAD_OP keeps them for the
  backward pass; HYBRID_SHARD and _HYBRID_SHARD_ZERO2 do the same within each of
  `fsdp.hybrid_sharding_num_model_replicas` copies of the model (by default one per node); NO_SHARD: every process has a
  copy.
* `fsdp.precision`, with `amp_bf16`: `pure` gathers weights and averages gradients in bfloat16, `mixed` averages
  gradients in float32, null does both in float32. Weights and optimizer state are always float32. With gathered
  weights in bfloat16 so is the residual stream, in training and in evaluation; under DDP, on one process, or with null
  the residual stream is float32.

Models of other families have the same, except `by_block_group`; where one of them computes in a type of its own, such
as float32 in its norms, it does so in training and in evaluation alike.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from ..config.schema import DDPConfig, FSDPConfig, FSDPWrapStrategy, TrainConfig
from ..distributed.devices import full_tensor
from ..distributed.ranks import Ranks
from ..exceptions import ConfigurationError
from ..model.causal_lm import CausalLM, Model
from ..model.olmo import OLMo
from .loss import Objective, predictions


def shards_model(config: TrainConfig, ranks: Ranks) -> bool:
    """Whether each process keeps only a shard of the model."""
    return ranks.world_size > 1 and config.distributed_strategy == "fsdp"


def check_strategy(config: TrainConfig, ranks: Ranks) -> None:
    """Raise ConfigurationError if several processes cannot train by `distributed_strategy`."""
    if ranks.world_size > 1 and config.distributed_strategy not in ("ddp", "fsdp"):
        name = config.distributed_strategy or "null"
        raise ConfigurationError(f"distributed_strategy: {name} runs on one process; use ddp or fsdp on several")


def distribute(objective: Objective, config: TrainConfig, ranks: Ranks, device: torch.device) -> nn.Module:
    """The module whose forward pass trains: the objective itself, DDP around it, or the objective sharded by FSDP.

    Every process calls it with the same weights, or (FSDP) with a model on the meta device; those weights are then on
    `device` and undefined. `check_strategy` has accepted the configuration.
    """
    if ranks.world_size == 1:
        return objective
    if shards_model(config, ranks):
        return _shard(objective, config, ranks, device)
    return DistributedDataParallel(
        objective,
        device_ids=[device] if device.type == "cuda" else None,
        find_unused_parameters=bool(config.ddp and config.ddp.find_unused_params) or leaves_unused(objective),
        gradient_as_bucket_view=True,  # else every gradient is in memory twice, and copied in every step
    )


def leaves_unused(objective: Objective) -> bool:
    """Whether a model of another family has weights that a pass may not use, such as the attention of a decoder to an
    encoder: DDP waits for the gradients of all others. Found by a pass, in evaluation mode, which compiles nothing."""
    if not isinstance(objective.model, CausalLM):
        return False
    ids = torch.zeros(1, 6, dtype=torch.long)
    batch = (x.to(next(objective.parameters()).device) for x in (ids, *predictions(ids)))
    objective.eval()(*batch)[0].backward()
    objective.train()
    unused = any(weight.requires_grad and weight.grad is None for weight in objective.parameters())
    objective.zero_grad(set_to_none=True)
    return unused


def _mesh(fsdp: FSDPConfig, world_size: int, device: torch.device) -> DeviceMesh:
    """Processes by copy of the model (if there are several) and shard of it."""
    replicas = 1
    if fsdp.sharding_strategy == "NO_SHARD":
        replicas = world_size
    elif "HYBRID" in fsdp.sharding_strategy:
        local = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
        replicas = fsdp.hybrid_sharding_num_model_replicas or max(world_size // local, 1)
    if world_size % replicas:
        raise ConfigurationError(
            f"fsdp.hybrid_sharding_num_model_replicas: {replicas} copies do not divide {world_size} processes"
        )
    if replicas == 1:
        return init_device_mesh(device.type, (world_size,), mesh_dim_names=("shard",))
    names = ("replicate", "shard")
    return init_device_mesh(device.type, (replicas, world_size // replicas), mesh_dim_names=names)


def _groups(objective: Objective, strategy: FSDPWrapStrategy | None) -> list[list[nn.Module]]:
    """The layers whose weights are gathered together."""
    blocks: list[nn.Module] = [*objective.model.blocks]
    if strategy is None:
        return []
    if strategy.startswith("one_in_"):
        every = {"two": 2, "three": 3, "four": 4, "five": 5}[strategy.removeprefix("one_in_")]
        return [[block] for block in blocks[::every]]
    if strategy == "size_based":
        groups: list[list[nn.Module]] = [[]]
        for block in blocks:
            groups[-1].append(block)
            if sum(p.numel() for b in groups[-1] for p in b.parameters()) >= 100_000_000:
                groups.append([])
        return groups[:-1]
    size = objective.model.config.block_group_size if strategy.startswith("by_block_group") else 1
    return [blocks[start : start + size] for start in range(0, len(blocks), size)]


def _shard(objective: Objective, config: TrainConfig, ranks: Ranks, device: torch.device) -> nn.Module:
    fsdp = config.fsdp or FSDPConfig()
    mesh = _mesh(fsdp, ranks.world_size, device)
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)  # the angles of the rotary embedding stay float32
    if (gathered := gathered_dtype(config, ranks)) != torch.float32:
        reduced = gathered if fsdp.precision == "pure" else torch.float32
        policy = MixedPrecisionPolicy(gathered, reduced, cast_forward_inputs=False)
    frees_weights = fsdp.sharding_strategy in ("FULL_SHARD", "HYBRID_SHARD")
    groups = _groups(objective, fsdp.wrapping_strategy)
    for group in groups:
        fully_shard(group, mesh=mesh, mp_policy=policy, reshard_after_forward=frees_weights)
    # Most of the rest is needed last in the forward pass and first in the backward pass.
    fully_shard(objective, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    if next(objective.parameters()).is_meta:
        objective.to_empty(device=device)
    return objective


def gradient_sync(module: nn.Module, config: TrainConfig, last_micro_batch: bool) -> Any:
    """Gradients are averaged over ranks once per batch, or per micro-batch with `grad_sync_mode` of ddp or fsdp.

    Under FSDP, once per batch means that until then every process keeps the gradient of all weights.
    """
    chosen: DDPConfig | FSDPConfig | None = config.fsdp if isinstance(module, FSDPModule) else config.ddp
    every = chosen is not None and chosen.grad_sync_mode == "micro_batch"
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(last_micro_batch or every)
    elif isinstance(module, DistributedDataParallel) and not (last_micro_batch or every):
        return module.no_sync()
    return nullcontext()


def gathered_dtype(config: TrainConfig, ranks: Ranks) -> torch.dtype:
    """The type of the weights that a forward pass uses."""
    reduces = config.precision == "amp_bf16" and (config.fsdp or FSDPConfig()).precision is not None
    return torch.bfloat16 if reduces and shards_model(config, ranks) else torch.float32


def gathered_model(model: Model, dtype: torch.dtype = torch.float32) -> Model:
    """The model, or if FSDP has sharded it another one with all weights, on every process. A collective.

    The other one has weights of type `dtype` (`gathered_dtype`), so that it evaluates what training computes.
    An evaluator may call any part of it, any number of times; a sharded one is gathered call by call, by all at once.
    """
    # On its way, state_dict() lets FSDP free what the last forward pass has gathered.
    if not any(isinstance(weight, DTensor) for weight in model.state_dict().values()):
        return model
    gathered = model.empty() if isinstance(model, CausalLM) else OLMo.empty(model.config)
    whole: dict[nn.Parameter, nn.Parameter] = {}  # one that two modules share is shared there, too
    for source, module in zip(model.modules(), gathered.modules(), strict=True):
        for name, weight in source._parameters.items():
            if weight is not None and weight not in whole:
                whole[weight] = nn.Parameter(full_tensor(weight.detach()).to(dtype), requires_grad=False)
            module._parameters[name] = None if weight is None else whole[weight]
        module._buffers.update(source._buffers)  # FSDP leaves them as they are
    if isinstance(model, OLMo) and isinstance(gathered, OLMo):
        for block, trained in zip(gathered.blocks, model.blocks):
            block.attention_temperature = trained.attention_temperature
            block.memory_temperature = trained.memory_temperature
    return gathered
