"""Metrics for programs outside the run's folder: Weights & Biases and TensorBoard."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..config.schema import TrainConfig
from ..console import printable
from ..exceptions import ConfigurationError, needs


def start_wandb(config: TrainConfig, id_file: Path, resumed: bool) -> Any:
    """Start a Weights & Biases run. A resumed run continues the one whose id is in `id_file`.

    Raises MissingPackage where wandb is not installed, ConfigurationError where it has no key or cannot reach its
    server.
    """
    wandb = needs("wandb", "wandb", "wandb")
    chosen = config.wandb
    assert chosen is not None
    known = id_file.read_text(encoding="utf-8") if resumed and id_file.is_file() else None
    try:
        run = wandb.init(
            project=chosen.project,
            entity=chosen.entity,
            group=chosen.group,
            name=chosen.name or config.run_name,
            tags=list(chosen.tags or []),
            dir=config.save_folder,
            config=_without_secrets(asdict(config)),
            id=known,
            resume="allow" if known else None,
        )
    except wandb.Error as error:
        raise ConfigurationError(
            f"wandb: {str(error).splitlines()[0]} (wandb login stores a key; the environment variable "
            "WANDB_MODE=offline keeps the run on this machine)"
        ) from error
    id_file.write_text(run.id, encoding="utf-8")
    return run


def _without_secrets(value: Any) -> Any:
    """A configuration in which no text has passwords, signed queries of URLs, or secrets of the environment."""
    if isinstance(value, dict):
        return {key: _without_secrets(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_secrets(item) for item in value]
    return printable(value) if isinstance(value, str) else value


def summary_writer() -> Any:
    """torch's class that writes events for TensorBoard. Raises MissingPackage where tensorboard is missing."""
    needs("tensorboard", "tensorboard", "tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter
