"""A checkpoint on an old site and on the hub, both on this machine, and running `scripts/get_model.sh`."""

from __future__ import annotations

import functools
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from olmo.exceptions import exit_status
from olmo.model import OLMo
from scripts import get_model
from tests.reference import tiny_config
from tests.serving import Server

FOLDER = "/ai2-llm/olmo-small/g4g72enr/step738020-unsharded"
HUB_ID = "allenai/OLMo-1B@step738020-tokens3095B"
CONFIG = b"model: {}\n"
WEIGHTS = random.Random(0).randbytes(3 * 2**20 + 12345)  # three pieces and some
OTHER = random.Random(1).randbytes(len(WEIGHTS))
MODEL = f"{FOLDER}/model.pt"

run = functools.partial(exit_status, get_model.main)


def start(root: Path, server: Server, *arguments: str) -> subprocess.Popen[str]:
    """`bash scripts/get_model.sh ARGUMENTS`, called from elsewhere."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "PYTHONPATH"))}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    hub = {"HF_ENDPOINT": server.url, "HF_HOME": str(root / "hf")}
    return subprocess.Popen(
        ["bash", str(root / "scripts" / "get_model.sh"), *arguments],
        cwd=root.parent,
        env={**inherited, "PATH": path, **hub},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    stdout, stderr = process.communicate(timeout=60)
    return process.returncode, stdout, stderr


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def the_error(capsys: pytest.CaptureFixture[str]) -> str:
    stderr = capsys.readouterr().err
    assert stderr.startswith("error: ") and stderr.count("\n") == 1, stderr
    return stderr


def tiny_model() -> OLMo:
    torch.manual_seed(0)
    return OLMo(tiny_config())
