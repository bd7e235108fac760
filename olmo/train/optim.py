"""Parameter groups, AdamW and LionW, gradient clipping, and metrics of single weights, as in OLMo 0.6.0."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..config.schema import OptimizerConfig
from ..distributed.devices import full_tensor


def parameter_groups(config: OptimizerConfig, model: nn.Module) -> list[dict]:
    """Two groups, with and without weight decay, each sorted by parameter name.

    Linear weights decay. Biases and norms decay with `decay_norm_and_bias`, embeddings with `decay_embeddings`, also
    where the output layer is one of them. Not linear, although they may be matrices, are biases of experts, and what a
    state-space mixer decays by and skips with (as in Mamba).
    """
    embeddings = {p for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    decayed: dict[str, Tensor] = {}
    kept: dict[str, Tensor] = {}
    seen: set[nn.Parameter] = set()  # one that two modules share is named after the first
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter in seen or not parameter.requires_grad:
                continue
            seen.add(parameter)
            full_name = f"{module_name}.{name}" if module_name else name
            linear = parameter.ndim > 1 and not name.endswith(("bias", "A_log", "D"))
            if parameter in embeddings:
                decays = config.decay_embeddings
            elif not linear or "norm" in type(module).__name__.lower():
                decays = config.decay_norm_and_bias
            else:
                decays = True
            (decayed if decays else kept)[full_name] = parameter
    return [
        {"params": [group[n] for n in sorted(group)], "param_names": sorted(group), "weight_decay": weight_decay}
        for group, weight_decay in ((decayed, config.weight_decay), (kept, 0.0))
        if group
    ]


class LionW(torch.optim.Optimizer):
    """Lion (arXiv 2302.06675) with decoupled weight decay, as in OLMo.

    A step moves every weight by the learning rate against the sign of beta_1 m + (1 - beta_1) g, then
    m <- beta_2 m + (1 - beta_2) g; m, of the weight's dtype, is kept as `exp_avg`.
    """

    state_entries = ("exp_avg",)  # of every weight, in checkpoints

    def __init__(self, params: Any, lr: float, betas: tuple[float, float], weight_decay: float):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Update the weights from their gradients."""
        for group in self.param_groups:
            beta_1, beta_2 = group["betas"]
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if "exp_avg" not in state:
                    state["exp_avg"] = torch.zeros_like(weight)
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                direction = torch.sign(state["exp_avg"] * beta_1 + weight.grad * (1 - beta_1))
                weight.add_(direction, alpha=-group["lr"])
                state["exp_avg"].mul_(beta_2).add_(weight.grad, alpha=1 - beta_2)


def build_optimizer(config: OptimizerConfig, model: nn.Module) -> torch.optim.Optimizer:
    """LionW, or AdamW, with torch's fused kernel on devices that have one (CPU and CUDA)."""
    groups = parameter_groups(config, model)
    if config.name == "lionw":
        return LionW(groups, config.learning_rate, config.betas, config.weight_decay)
    fused = groups[0]["params"][0].device.type in ("cpu", "cuda")
    return torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=fused, foreach=None
    )


def clip_gradients(model: nn.Module, max_norm: float | None) -> tuple[Tensor, Tensor]:
    """Scale all gradients so that their joint 2-norm is at most `max_norm`; returns the norm before, and the share of
    gradients that were scaled: 1 or 0 (float32).

    As in OLMo the factor is max_norm / (norm + 1e-6), at most 1; None only measures.
    """
    limit = math.inf if max_norm is None else max_norm
    norm = full_tensor(torch.nn.utils.clip_grad_norm_(model.parameters(), limit))
    return norm, (limit / (norm + 1e-6) < 1).float()


@torch.no_grad()
def clip_each_gradient(optimizer: torch.optim.Optimizer, max_ratio: float) -> tuple[Tensor, Tensor]:
    """Scale the gradient of every parameter whose 2-norm has risen; returns the joint norm before, and the share of
    gradients that were scaled (float32).

    The limit is `max_ratio` times a running average of the parameter's clipped norm, with the larger of the betas, kept
    in the optimizer state as `grad_norm_exp_avg`; the factor is limit / (norm + 1e-6), at most 1, as in OLMo.
    """
    trained = [(w, max(group["betas"])) for group in optimizer.param_groups for w in group["params"]]
    trained = [(weight, beta) for weight, beta in trained if weight.grad is not None]
    norms = full_tensor(
        torch.stack([torch.linalg.vector_norm(weight.grad, dtype=torch.float32) for weight, _ in trained])
    )
    factors = []
    for (weight, beta), norm in zip(trained, norms):
        state = optimizer.state.get(weight)
        average = state.get("grad_norm_exp_avg") if state else None
        if average is None:
            average = norm.clone()
            if state:  # not before the first step: an optimizer initializes only a state that is empty
                state["grad_norm_exp_avg"] = average
        factor = (max_ratio * average / (norm + 1e-6)).clamp(max=1.0)
        weight.grad.mul_(factor.to(weight.grad.dtype))
        average.lerp_(norm * factor, 1 - beta)
        factors.append(factor)
    return torch.linalg.vector_norm(norms), (torch.stack(factors) < 1).float().mean()


@torch.no_grad()
def weight_metrics(optimizer: torch.optim.Optimizer, computes: bool) -> dict[str, Tensor]:
    """What OLMo logs of every weight, before clipping and the step: of its gradient, of itself, and of AdamW's moments
    the smallest and largest absolute value, the mean and the 2-norm; float32 scalars on the device.

    On ranks that do not `compute` it is empty. Weights that FSDP has sharded are gathered one after the other, so it is
    a collective. An optimizer has no moments before its first step.
    """
    metrics = {}
    moments = () if isinstance(optimizer, LionW) else ("exp_avg", "exp_avg_sq")
    for group in optimizer.param_groups:
        for name, weight in zip(group["param_names"], group["params"]):
            state = optimizer.state.get(weight, {})
            parts = {"grad": weight.grad, "param": weight, **{moment: state.get(moment) for moment in moments}}
            for part, value in parts.items():
                if value is None or not (computes or hasattr(value, "full_tensor")):
                    continue
                whole = full_tensor(value.detach())
                if computes:
                    smallest, largest = torch.aminmax(whole.abs())
                    norm = torch.linalg.vector_norm(whole, dtype=torch.float32)
                    measures = {"min": smallest, "max": largest, "avg": whole.mean(), "norm": norm}
                    metrics.update({f"optim/{part}/{name}.{key}": m.float() for key, m in measures.items()})
    return metrics
