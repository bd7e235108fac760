"""One model in OLMo's layout and in transformers'."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from olmo.checkpoint.config_json import to_transformers_config
from olmo.checkpoint.transformers_layout import to_transformers_state
from olmo.config import ModelConfig, save_model_config
from olmo.files.tensors import write_olmo_safetensors, write_safetensors


def write_checkpoints(folder: Path, config: ModelConfig, state: dict[str, Tensor]) -> None:
    """Write `olmo` and `hf` into `folder`, both in float32."""
    for kind in ("olmo", "hf"):
        (folder / kind).mkdir()
    save_model_config(folder / "olmo/config.yaml", config)
    write_olmo_safetensors(folder / "olmo/model.safetensors", state)
    (folder / "hf/config.json").write_text(json.dumps(to_transformers_config(config, torch.float32)))
    write_safetensors(folder / "hf/model.safetensors", to_transformers_state(state, config), {"format": "pt"})
