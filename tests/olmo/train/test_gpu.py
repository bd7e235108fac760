"""Training on a GPU: as on the CPU, compiled as eager, in groups of one process, and restarted to the bit."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel

from olmo.checkpoint import read_optimizer_state, read_state, sharded
from olmo.checkpoint.optimizer import optimizer_state
from olmo.distributed import Ranks, full_tensor
from olmo.train import Trainer
from olmo.train.loss import Objective
from olmo.train.parallel import _shard, distribute
from olmo.train.step import TrainStep
from tests.running import configure, metrics, write_world

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration without knowledge and evaluators."""
    return write_world(tmp_path_factory.mktemp("world")) / "plain.yaml"


def first_step(plain: Path, folder: Path, device: torch.device, *settings: str) -> tuple[float, float, dict[str, Any]]:
    """Loss, gradient norm and gradients (before they are used, clipped) of a run's first step."""
    trainer = Trainer(configure(plain, folder, *settings), device, Ranks())
    result = trainer.train_step.run(trainer.loader.batch(0, 0), 1, trainer.schedule.at(1))
    trainer.reporter.close()
    loss, *_, norm = result.read(Ranks())
    return loss, norm, {n: w.grad.cpu() for n, w in trainer.model.named_parameters() if w.grad is not None}


def assert_near(found: tuple[float, float, dict[str, Any]], wanted: tuple[float, float, dict[str, Any]], near: float):
    """Loss and norm by `near`, gradients by it times the largest of a weight."""
    assert found[:2] == pytest.approx(wanted[:2], rel=near)
    assert found[2].keys() == wanted[2].keys() != set()
    for name, gradient in wanted[2].items():
        atol = 3 * near * gradient.abs().max().item()
        torch.testing.assert_close(found[2][name], gradient, rtol=0, atol=atol, msg=name)


@pytest.mark.parametrize("precision", ["fp32", "amp_bf16"])
def test_a_step_is_that_of_the_cpu(plain: Path, tmp_path: Path, device: torch.device, precision: str) -> None:
    """Gradients included. Both draw their weights on the CPU."""
    settings = (f"--precision={precision}", "--model.init_device=cpu", "--softmax_auxiliary_loss=true")
    wanted = first_step(plain, tmp_path / "a", torch.device("cpu"), *settings)
    found = first_step(plain, tmp_path / "b", device, *settings)
    assert_near(found, wanted, 1e-4 if precision == "fp32" else 1e-2)


@pytest.mark.usefixtures("compiler")
def test_a_compiled_step_is_the_eager_one(plain: Path, tmp_path: Path, device: torch.device) -> None:
    """In bfloat16, half of the layers recomputed; tests/olmo/test_gpu.py has a run in float32."""
    settings = ("--precision=amp_bf16", "--model.init_device=cpu", "--activation_checkpointing=one_in_two")
    backend = "inductor" if device.type == "cuda" else "aot_eager"  # the other needs a compiler of C++
    wanted = first_step(plain, tmp_path / "a", device, *settings)
    found = first_step(plain, tmp_path / "b", device, *settings, f"--compile.backend={backend}")
    assert_near(found, wanted, 1e-2)


@pytest.fixture
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels that add up in one order: attention's backward pass on a GPU has none by default."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.filterwarnings("ignore:.*does not have a deterministic implementation")
@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("precision", ["fp32", "amp_bf16"])
def test_a_restarted_run_has_the_bits_of_an_unbroken_one(
    plain: Path, tmp_path: Path, device: torch.device, precision: str
) -> None:
    """Restarted from a checkpoint of each kind: losses, weights, and all that the optimizer keeps."""
    settings = (
        f"--precision={precision}",
        "--max_duration=7",
        "--save_interval_unsharded=7",
        "--save_steps_unsharded=[2]",
    )
    settings = (*settings, "--save_interval=4", "--try_load_latest_save")

    def run(name: str, *stops: int) -> tuple[list[float], dict[str, Any], dict[str, Any]]:
        for stop in stops:
            trainer = Trainer(configure(plain, tmp_path / name, *settings, f"--stop_at={stop}"), device, Ranks())
            trainer.fit()
        last = tmp_path / name / "step7-unsharded"
        losses = [
            line["train/CrossEntropyLoss"] for line in metrics(tmp_path / name) if "train/CrossEntropyLoss" in line
        ]
        return losses, read_state(last), read_optimizer_state(last, trainer.optimizer)["state"]

    losses, weights, moments = run("unbroken", 7)
    others, again, kept = run("restarted", 2, 4, 7)
    assert len(losses) == 7 and others == losses
    assert weights.keys() == again.keys() and all(again[name].equal(weight) for name, weight in weights.items())
    assert moments.keys() == kept.keys() != set()
    assert all(kept[name][entry].equal(value) for name, of in moments.items() for entry, value in of.items())


@pytest.fixture
def group_of_one(tmp_path: Path, device: torch.device) -> Iterator[Ranks]:
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        yield Ranks()
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_group_of_one_process_trains_as_none(
    plain: Path, tmp_path: Path, device: torch.device, group_of_one: Ranks, strategy: str
) -> None:
    """Two steps under DDP and FSDP, by nccl on a GPU; the snapshot of a checkpoint has the weights after them."""
    config = configure(plain, tmp_path / "run", "--fsdp.wrapping_strategy=by_block")
    trainer = Trainer(config, device, Ranks())
    trainer.reporter.close()
    model = copy.deepcopy(trainer.model)
    objective = Objective(model)
    if strategy == "ddp":
        module = distribute(objective, config, replace(group_of_one, world_size=2), device)  # one of two, and alone
    else:
        module = _shard(objective, config, group_of_one, device)
    optimizer = torch.optim.AdamW(
        [
            {**group, "params": [dict(model.named_parameters())[name] for name in group["param_names"]]}
            for group in trainer.optimizer.state_dict()["param_groups"]
        ],
        fused=True,
    )
    grouped = TrainStep(config, model, module, optimizer, device, 0)
    for step in (1, 2):
        batch, settings = trainer.loader.batch(0, step - 1), trainer.schedule.at(step)
        wanted, found = (each.run(batch, step, settings).read(Ranks()) for each in (trainer.train_step, grouped))
        assert found == pytest.approx(wanted, rel=1e-5)
    plainly, sharding = (
        sharded.snapshot(m, optimizer_state(o)["state"], Ranks())
        for m, o in ((trainer.model, trainer.optimizer), (model, optimizer))
    )
    assert plainly.keys() == sharding.keys()
    for name, weight in plainly.items():
        torch.testing.assert_close(full_tensor(sharding[name].to(device)).cpu(), weight, rtol=1e-4, atol=1e-5)
