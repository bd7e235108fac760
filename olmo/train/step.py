"""One optimizer step: micro-batches, loss, backward, gradient clipping, optimizer.

Nothing here waits for the device; `StepResult.read` does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..config.schema import TrainConfig
from ..data.loader import Batch
from ..distributed.devices import to_device
from ..distributed.ranks import Ranks
from ..model.causal_lm import Model
from .loss import predictions
from .optim import clip_each_gradient, clip_gradients, weight_metrics
from .parallel import gradient_sync
from .schedule import StepSettings


@dataclass(frozen=True)
class StepResult:
    """What a step has computed, as float32 scalars on the device; the losses are those of this rank's rows."""

    step: int
    loss: Tensor  # cross-entropy per token
    z_loss: Tensor  # 0 without softmax_auxiliary_loss
    auxiliary_loss: Tensor  # mean over micro-batches of what balances the experts; 0 for most models
    gradient_norm: Tensor  # of all ranks, before clipping
    clipping_rate: Tensor  # share of the gradients that clipping has scaled
    learning_rates: list[float]  # of each group of the optimizer
    weights: dict[str, Tensor] = field(default_factory=dict)  # metrics of single weights, at some steps on rank 0

    def read(self, ranks: Ranks) -> tuple[float, float, float, float]:
        """Loss, z-loss and auxiliary loss, means over the ranks, and gradient norm; waits for the device. A collective.

        Raises ValueError if loss or norm is not finite: then the weights after this step are not finite either.
        """
        losses = torch.stack((self.loss, self.z_loss, self.auxiliary_loss))
        means = ranks.sum_tensor(losses) / ranks.world_size
        loss, z_loss, auxiliary, norm = torch.cat((means, self.gradient_norm[None])).tolist()
        for name, value in (("loss", loss), ("gradient norm", norm)):
            if not math.isfinite(value):
                raise ValueError(f"{name} {value} at step {self.step}; the checkpoints before it are intact")
        return loss, z_loss, auxiliary, norm


@dataclass(frozen=True)
class TrainStep:
    """The training step of one rank: `module`, whose forward pass is the loss of `model`, and its optimizer."""

    config: TrainConfig
    model: Model
    module: nn.Module
    optimizer: torch.optim.Optimizer
    device: torch.device
    rank: int

    def run(self, batch: Batch, step: int, settings: StepSettings) -> StepResult:
        """Train on this rank's rows (n, T). A collective.

        The loss is the sum over the predictions that count, T - 1 per row, divided by n * T; with `loss_divisor:
        predictions` the mean over micro-batches of the mean over the predictions that count. The loss that balances
        experts is added to it, the mean over micro-batches.
        """
        config, module = self.config, self.module
        torch.manual_seed(((config.seed * 1_000_003 + step) * 65_537 + self.rank) % 2**63)  # for dropout
        settings.temperatures.apply(self.model)
        self.optimizer.zero_grad(set_to_none=True)
        rows, divisor = len(batch.input_ids), batch.input_ids.numel()
        micro_batches = math.ceil(rows / config.device_train_microbatch_size)
        losses = torch.zeros(3, device=self.device)
        for start in range(0, rows, config.device_train_microbatch_size):
            part = slice(start, start + config.device_train_microbatch_size)
            input_ids = batch.input_ids[part]
            label_mask = None if batch.label_mask is None else batch.label_mask[part]
            attention_mask = None if batch.attention_mask is None else batch.attention_mask[part]
            inputs = (input_ids, *predictions(input_ids, label_mask), attention_mask)
            if config.loss_divisor == "predictions":
                divisor = max(len(inputs[1]), 1) * micro_batches
            with gradient_sync(module, config, last_micro_batch=part.stop >= rows):
                with torch.autocast(self.device.type, torch.bfloat16, enabled=config.precision == "amp_bf16"):
                    found = module(*(None if x is None else to_device(x, self.device) for x in inputs))
                    loss, cross_entropy, z_loss, auxiliary = found
                (loss / divisor + auxiliary / micro_batches).backward()
            parts = (cross_entropy / divisor, z_loss / divisor, auxiliary.detach() / micro_batches)
            losses += torch.stack(parts)
        weights = weight_metrics(self.optimizer, self.rank == 0) if measures_weights(config, step) else {}
        if settings.max_grad_norm_ratio is None:
            norm, clipped = clip_gradients(self.model, settings.max_grad_norm)
        else:
            norm, clipped = clip_each_gradient(self.optimizer, settings.max_grad_norm_ratio)
        self.set_learning_rate(settings)
        self.optimizer.step()
        rates = [group["lr"] for group in self.optimizer.param_groups]
        return StepResult(step, losses[0], losses[1], losses[2], norm, clipped, rates, weights)

    def set_learning_rate(self, settings: StepSettings) -> None:
        """Set the optimizer's learning rate."""
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate


def measures_weights(config: TrainConfig, step: int) -> bool:
    """Whether the metrics of single weights are due at a step: as in OLMo only for trackers, since they are many."""
    interval = config.optimizer.metrics_log_interval
    if interval is None or not (config.wandb or config.tensorboard):
        return False
    return step % max(interval, config.wandb.log_interval if config.wandb else 1) == 0
