"""The model, a run and its loss on a GPU; `make test-gpu` runs this and every other test_gpu.py."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from olmo.config import ModelConfig
from olmo.distributed import Ranks
from olmo.model import OLMo
from olmo.train import Trainer
from olmo.train.fused_loss import fused_linear_cross_entropy
from olmo.train.loss import linear_cross_entropy
from tests.reference import tiny_config, tiny_olmo2_config
from tests.running import configure, series, write_world

pytestmark = pytest.mark.gpu

MODELS = {
    "OLMo": tiny_config(),
    "OLMo 2": tiny_olmo2_config(n_kv_heads=2),
    "biases, learned positions": tiny_config(include_bias=True, activation_type="gelu", rope=False),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_logits_equal_those_of_the_cpu(device: torch.device, config: ModelConfig, dtype: torch.dtype) -> None:
    """With padding on the left too, whose attention needs a mask."""
    torch.manual_seed(0)
    model = OLMo(config).eval().to(dtype)
    ids = torch.randint(0, model.config.vocab_size, (4, 64))
    seen = torch.arange(64) >= torch.tensor([0, 5, 9, 0])[:, None]
    on_device = copy.deepcopy(model).to(device)
    near = 1e-4 if dtype == torch.float32 else 4e-2
    for mask in (None, seen):
        with torch.no_grad():
            expected = model(ids, mask)
            found = on_device(ids.to(device), None if mask is None else mask.to(device)).cpu()
        scale = float(expected.abs().max())
        torch.testing.assert_close(found[seen], expected[seen], rtol=0, atol=near * scale)


def test_autocast_equals_that_of_the_cpu(device: torch.device) -> None:
    """Weights in float32, products in bfloat16, as in training with amp_bf16."""
    torch.manual_seed(0)
    model = OLMo(tiny_config()).eval()
    ids = torch.randint(0, model.config.vocab_size, (4, 64))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(ids)
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
        found = model.to(device)(ids.to(device)).cpu()
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=0, atol=4e-2 * float(expected.abs().max()))


@pytest.mark.parametrize("precision", ["fp32", "amp_bf16"])
def test_a_run_trains(device: torch.device, tmp_path: Path, precision: str) -> None:
    pytest.importorskip("pyarrow", reason="needs pyarrow, which writes scores of probes")
    world = write_world(tmp_path / "world")
    config = configure(world / "config.yaml", tmp_path / "run", f"--precision={precision}")
    Trainer(config, device, Ranks()).fit()
    assert sorted(series(tmp_path / "run")) == list(range(1, 8))


@pytest.mark.parametrize("precision", ["fp32", "amp_bf16"])
def test_a_step_does_not_wait_for_the_device(cuda: torch.device, tmp_path: Path, precision: str) -> None:
    world = write_world(tmp_path / "world")
    settings = [f"--precision={precision}", "--softmax_auxiliary_loss=true", "--evaluators=[]", "--injection=null"]
    # Divisors of the memories go to the device anew at every step.
    torch.save(torch.full((2, 48), 2.0), tmp_path / "divisors.pt")
    settings += ["--inject_interval=null", f"--model.temperature_MLP={tmp_path / 'divisors.pt'}"]
    trainer = Trainer(configure(world / "config.yaml", tmp_path / "run", *settings), cuda, Ranks())
    batch = trainer.loader.batch(0, 0)
    trainer.train_step.run(batch, 1, trainer.schedule.at(1))  # allocates, and asks the device for what it can do
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.train_step.run(batch, 2, trainer.schedule.at(2))
    finally:
        torch.cuda.set_sync_debug_mode("default")
        trainer.reporter.close()


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_the_loss_in_parts_equals_the_whole(cuda: torch.device, precision: torch.dtype) -> None:
    """10,000 predictions of 50,304 tokens: the loss and both gradients, in less memory."""
    torch.manual_seed(0)
    hidden = torch.randn(10_000, 256, device=cuda, requires_grad=True)
    weight = (torch.randn(50304, 256, device=cuda) / 16).requires_grad_()
    places, targets = torch.arange(10_000, device=cuda), torch.randint(50304, (10_000,), device=cuda)
    found = []
    for in_parts in (False, True):
        hidden.grad = weight.grad = None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.autocast("cuda", torch.bfloat16, enabled=precision == torch.bfloat16):
            if in_parts:
                loss = linear_cross_entropy(hidden, weight, None, places, targets)[0]
            else:
                loss = F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum")
        loss.backward()
        found.append((loss.detach(), hidden.grad, weight.grad, torch.cuda.max_memory_allocated() - before))
    near = 1e-5 if precision == torch.float32 else 2e-2
    for whole, parts in zip(*(values[:3] for values in found)):
        torch.testing.assert_close(parts, whole, rtol=0, atol=near * whole.abs().max().item())
    logits = 10_000 * 50304 * 4
    assert found[1][3] < 1.1 * logits < found[0][3]


@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("z_multiplier", [None, 1e-3])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_the_fused_loss_equals_ours_and_the_whole(
    cuda: torch.device, precision: torch.dtype, z_multiplier: float | None, cap: float | None
) -> None:
    """3,000 predictions among 4,000 hidden states: losses, and gradients of a part of the loss."""
    pytest.importorskip("liger_kernel", reason="needs liger-kernel")
    torch.manual_seed(0)
    hidden = torch.randn(4000, 256, device=cuda, requires_grad=True)
    weight = (torch.randn(50304, 256, device=cuda) / 16).requires_grad_()
    places, targets = torch.randperm(4000)[:3000].sort().values.to(cuda), torch.randint(50304, (3000,), device=cuda)
    found = []
    for function in (None, linear_cross_entropy, fused_linear_cross_entropy):
        hidden.grad = weight.grad = None
        with torch.autocast("cuda", torch.bfloat16, enabled=precision == torch.bfloat16):
            if function is None:
                logits = F.linear(hidden[places], weight)
                logits = (logits if cap is None else torch.tanh(logits / cap) * cap).float()
                cross_entropy = F.cross_entropy(logits, targets, reduction="sum")
                z_loss = (z_multiplier or 0.0) * logits.logsumexp(-1).square().sum()
                losses = (cross_entropy + z_loss, cross_entropy, z_loss)
            else:
                losses = function(hidden, weight, None, places, targets, cap=cap, z_multiplier=z_multiplier)
        (losses[0] / 3000).backward()
        found.append((*(loss.detach() for loss in losses), hidden.grad, weight.grad))
    # Liger takes 16 tokens at a time here; products of so few rows add up the vocabulary in an order of their own.
    near = 5e-5 if precision == torch.float32 else 2e-2
    for whole, parts, fused in zip(*found):
        for other in (parts, fused):
            torch.testing.assert_close(other, whole, rtol=0, atol=near * whole.abs().max().item())


def test_a_run_trains_with_the_fused_loss(cuda: torch.device, tmp_path: Path) -> None:
    pytest.importorskip("liger_kernel", reason="needs liger-kernel")
    plain = write_world(tmp_path / "world") / "plain.yaml"
    for name, settings in {"a": [], "b": ["--fused_loss=true"]}.items():
        Trainer(configure(plain, tmp_path / name, *settings), cuda, Ranks()).fit()
    assert series(tmp_path / "b") == pytest.approx(series(tmp_path / "a"), rel=1e-3)


@pytest.mark.usefixtures("compiler")
def test_compiled_and_recomputed_layers_train_as_plain_ones(cuda: torch.device, tmp_path: Path) -> None:
    plain = write_world(tmp_path / "world") / "plain.yaml"
    for name, settings in {"a": [], "b": ["--compile.mode=default", "--activation_checkpointing=one_in_two"]}.items():
        Trainer(configure(plain, tmp_path / name, *settings), cuda, Ranks()).fit()
    assert series(tmp_path / "b") == pytest.approx(series(tmp_path / "a"), rel=1e-3)
