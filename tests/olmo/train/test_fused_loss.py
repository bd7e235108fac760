"""Liger Kernel's loss against the definitions in float64 and against ours: on a CPU, through Triton's interpreter.

Skipped without liger-kernel; tests/olmo/test_gpu.py has what its compiled kernels give.
"""

from __future__ import annotations

import itertools
import math
import sys
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from olmo.exceptions import ConfigurationError, MissingPackage
from olmo.train.fused_loss import fused_linear_cross_entropy, loss_function
from olmo.train.loss import LossFunction, linear_cross_entropy
from scripts.benchmarks.processes import run_in_subprocess
from tests.running import CPU

NAMES = ("loss", "cross-entropy", "z-loss", "of hidden", "of weight", "of bias")


def whole(hidden: Tensor, weight: Tensor, bias: Any, places: Tensor, targets: Tensor, **options: Any) -> list[Tensor]:
    """As `linear_cross_entropy`, by its definition."""
    logits = F.linear(hidden[places], weight, bias) / options["divisor"]
    cross_entropy = F.cross_entropy(logits, targets, reduction="sum")
    z_loss = (options["z_multiplier"] or 0.0) * logits.logsumexp(-1).square().sum()
    return [cross_entropy + z_loss, cross_entropy, z_loss]


def computed(function: LossFunction, dtype: torch.dtype, biased: bool, count: int, **options: Any) -> list[Tensor]:
    """Losses, and gradients of a third of the loss, of 20 hidden states, `count` of which predict one of 70 tokens."""
    generator = torch.Generator().manual_seed(count)
    leaves = [
        torch.randn(*shape, generator=generator).to(dtype).requires_grad_() for shape in ((20, 16), (70, 16), (70,))
    ]
    places = torch.randperm(20, generator=generator)[:count].sort().values
    targets = torch.randint(70, (count,), generator=generator)
    losses = function(leaves[0], leaves[1], leaves[2] if biased else None, places, targets, **options)
    (losses[0] / 3).backward()
    return [loss.detach() for loss in losses] + [leaf.grad for leaf in leaves if leaf.grad is not None]


def far(found: list[Tensor], wanted: list[Tensor]) -> list[float]:
    """Largest difference of each, in parts of its largest number."""
    assert len(found) == len(wanted) and all(f.dtype == torch.float32 for f in found)
    return [float((f - w).abs().max() / w.abs().max().clamp(min=1e-6)) for f, w in zip(found, wanted)]


def compare(queue: Any) -> None:
    """(case, type, differences from the definition and from ours)."""
    report = []
    for (biased, divisor), z, count in itertools.product(((False, 1.0), (True, math.sqrt(7))), (None, 0.1), (0, 13)):
        case = {"biased": biased, "divisor": divisor, "z_multiplier": z, "count": count}
        for narrow in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
                found = computed(fused_linear_cross_entropy, torch.float32, **case)
                ours = computed(linear_cross_entropy, torch.float32, **case)
            expected = computed(whole, torch.float64, **case)  # type: ignore[arg-type]
            report.append((case, narrow, far(found, expected), far(found, ours)))
    queue.put(report)


@pytest.mark.skipif(not (find_spec("liger_kernel") and find_spec("triton")), reason="needs liger-kernel")
def test_equals_the_definition_and_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    report = run_in_subprocess(compare)
    assert len(report) == 16
    for case, narrow, *differences in report:
        for name, *both in zip(NAMES, *differences):
            # Sums of 70 numbers of 8 bits, rounded more than once on the way.
            assert max(both) < (3e-2 if narrow else 2e-6), (case, narrow, name)


def test_the_key_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda", 0)
    for fused in (None, False):
        assert loss_function(fused, CPU) is loss_function(fused, cuda) is linear_cross_entropy
    with pytest.raises(ConfigurationError, match="fused_loss: Liger Kernel needs a CUDA device, not cpu; leave"):
        loss_function(True, CPU)
    monkeypatch.setitem(sys.modules, "liger_kernel", None)  # as where it is not installed
    with pytest.raises(MissingPackage, match=r"fused_loss: liger_kernel .* pip install 'knowledge-entropy\[liger\]'"):
        loss_function(True, cuda)
