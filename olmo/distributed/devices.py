"""The device of this process, and tensors on their way to it, and from the shards of FSDP."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from ..exceptions import ConfigurationError


def pick_device(name: str | None = None) -> torch.device:
    """The device by name, or else this process's CUDA device, or Apple's GPU (mps) for a process alone, or the CPU.

    From here on CUDA multiplies float32 as float32. That is torch's default, on which OLMo's trainer relies; but some
    containers turn TF32 on (TORCH_ALLOW_TF32_CUBLAS_OVERRIDE). Sums inside bfloat16 products stay as torch has them.
    """
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    default = "mps" if alone and torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name if name is not None else "cuda" if torch.cuda.is_available() else default)
    except RuntimeError as error:
        raise ConfigurationError(f"no such device: {name}; use cpu, cuda, cuda:1 or mps") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError(f"{name}: torch sees no CUDA device here")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigurationError(f"{name}: torch sees no GPU of Apple's here")
    if device.type == "mps" and not alone:
        raise ConfigurationError(f"{name}: one process only; start one, or add --device=cpu")
    if device.type == "cuda":
        torch.set_float32_matmul_precision("highest")
        if device.index is None:
            one_visible = torch.cuda.device_count() == 1  # srun --gpus-per-task=1 shows each process its own as 0
            return torch.device("cuda", 0 if one_visible else int(os.environ.get("LOCAL_RANK", "0")))
    return device


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on the device; CUDA copies it while this process continues."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return (tensor if tensor.is_pinned() else tensor.pin_memory()).to(device, non_blocking=True)


def full_tensor(tensor: Tensor) -> Tensor:
    """A DTensor that FSDP has sharded, gathered on every process (a collective); any other tensor as it is."""
    gather = getattr(tensor, "full_tensor", None)  # by name: importing DTensor takes longer than reading a checkpoint
    return tensor if gather is None else gather()


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's shard of a tensor that every process holds in full, sharded as `like` is; all of it where `like`
    is not sharded."""
    if not hasattr(like, "full_tensor"):
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, DTensor) or isinstance(tensor, DTensor):
        return tensor
    tensor = tensor.to(like.to_local().device)
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
