"""Parameter groups, AdamW, learning-rate schedules and gradient clipping, as OLMo 0.6.0 has them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .config import OptimizerConfig, SchedulerConfig, SchedulerType, TrainConfig
from .model import LayerNorm


def parameter_groups(config: OptimizerConfig, model: nn.Module) -> list[dict]:
    """Two groups, with and without weight decay, each sorted by parameter name.

    Linear weights decay. Biases and norms decay with `decay_norm_and_bias`, embeddings with `decay_embeddings`.
    """
    decayed: dict[str, Tensor] = {}
    kept: dict[str, Tensor] = {}
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            full_name = f"{module_name}.{name}" if module_name else name
            if isinstance(module, LayerNorm) or name == "bias":
                decays = config.decay_norm_and_bias
            elif isinstance(module, nn.Embedding):
                decays = config.decay_embeddings
            else:
                decays = True
            (decayed if decays else kept)[full_name] = parameter
    groups = []
    for parameters, weight_decay in ((decayed, config.weight_decay), (kept, 0.0)):
        if parameters:
            names = sorted(parameters)
            groups.append(
                {
                    "params": [parameters[n] for n in names],
                    "param_names": names,
                    "weight_decay": weight_decay,
                }
            )
    return groups


def build_optimizer(config: OptimizerConfig, model: nn.Module) -> torch.optim.AdamW:
    """AdamW, fused where the device has such a kernel (CPU and CUDA do)."""
    groups = parameter_groups(config, model)
    fused = groups[0]["params"][0].device.type in ("cpu", "cuda")
    return torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=fused, foreach=None
    )


def learning_rate(config: TrainConfig, current: int, total: int) -> float:
    """The learning rate of the optimizer step that ends step `current` (1-based) of `total`.

    `current` and `total` are counted in `scheduler.units`: steps or tokens.
    """
    scheduler = config.scheduler
    if scheduler.name == SchedulerType.max_scheduler:
        inner = (SchedulerType.cosine_with_warmup, SchedulerType.inverse_sqrt_with_warmup)
        return max(_schedule(scheduler, name, config, current, total) for name in inner)
    return _schedule(scheduler, scheduler.name, config, current, total)


def _schedule(scheduler: SchedulerConfig, name: SchedulerType, config: TrainConfig, current: int, total: int) -> float:
    peak, warmup = config.optimizer.learning_rate, int(scheduler.t_warmup)
    if name == SchedulerType.constant:
        return peak
    if current < warmup:
        lowest = scheduler.warmup_min_lr
        if lowest is None:
            lowest = config.optimizer.warmup_min_lr
        if lowest is None:
            lowest = peak * 0.1
        return lowest + (peak - lowest) * current / warmup
    if name == SchedulerType.constant_with_warmup:
        return peak
    if name == SchedulerType.inverse_sqrt_with_warmup:
        return peak * math.sqrt(warmup / max(warmup, current, 1))
    last = total if scheduler.t_max is None else int(scheduler.t_max)
    final = peak * scheduler.alpha_f
    if current >= last:
        return final
    done = (current - warmup) / (last - warmup)
    if name == SchedulerType.linear_with_warmup:
        return peak - (peak - final) * done
    cosine = (peak - final) * (1 + math.cos(math.pi * done)) / 2
    return final + (cosine * (1 - done) if name == SchedulerType.cosine_linear_envelope else cosine)


def clip_gradients(model: nn.Module, max_norm: float | None) -> Tensor:
    """Scale all gradients so that their joint 2-norm is at most `max_norm`; returns the norm before (float32).

    As in OLMo the factor is max_norm / (norm + 1e-6), at most 1; None measures without scaling.
    """
    limit = math.inf if max_norm is None else max_norm
    return torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
