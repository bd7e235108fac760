"""The device of the tests that are marked gpu: a GPU, or a CPU in a small run of `make gpu`, which shows they work."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import torch

ON_CPU = "GPU_TESTS_ON_CPU"  # set in the environment by scripts/gpu/tests.py


@pytest.fixture
def device() -> torch.device:
    import torch

    if torch.cuda.is_available():
        from olmo.distributed import pick_device

        return pick_device("cuda")
    if ON_CPU not in os.environ:
        pytest.skip("needs a CUDA device: make test-gpu where there is one")
    return torch.device("cpu")


@pytest.fixture
def compiler(device: torch.device) -> None:
    """What torch.compile needs on a GPU."""
    from scripts.gpu.place import cannot_compile

    if device.type == "cuda" and (reason := cannot_compile()):
        pytest.skip(reason)


@pytest.fixture
def cuda(device: torch.device) -> torch.device:
    """The device of tests that only a GPU can run."""
    if device.type != "cuda":
        pytest.skip("needs a CUDA device, also in a small run")
    return device
