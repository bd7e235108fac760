"""Operations of a training step against torch's own count; the peak of a device; memory."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from olmo.config import ModelConfig, TrainConfig, load
from olmo.memory.locate import find_layers
from olmo.model import OLMo
from olmo.model.causal_lm import CausalLM
from olmo.train.throughput import peak_bytes, peak_memory, peak_operations, training_operations
from tests.architectures import built
from tests.reference import tiny_config, tiny_olmo2_config
from tests.running import BATCH, CPU, SHORT, train, write_world

GPU = torch.device("cuda", 0)


@pytest.mark.parametrize(
    "config",
    [
        tiny_config(),
        tiny_config(embedding_size=160, n_layers=3, activation_type="gelu", rope=False, include_bias=True),
        tiny_olmo2_config(n_kv_heads=2),
    ],
    ids=["tied", "more embeddings", "grouped queries"],
)
def test_operations_are_three_times_those_of_a_forward_pass(config: ModelConfig) -> None:
    """Two products on the way back for each on the way forward; torch counts attention to all tokens, too."""
    model, ids = OLMo(config), torch.zeros((2, 48), dtype=torch.int64)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(ids)
    assert training_operations(model, 48) * ids.numel() == 3 * counter.get_total_flops()


@pytest.mark.parametrize("name", ["Gemma 2", "GPT-2", "DeepSeek-V3", "GPT-OSS"])
def test_operations_of_other_families(name: str) -> None:
    """Heads wider than the model's width, transposed matrices, experts of which a token has two, shared ones, and
    values narrower than keys."""
    narrow = {"v_head_dim": 4} if name == "DeepSeek-V3" else {}
    network = built(name, **narrow)
    network.set_attn_implementation("eager")
    if name in ("DeepSeek-V3", "GPT-OSS"):
        network.set_experts_implementation("eager")  # torch does not count the products of the others
    model = CausalLM(network, ModelConfig(), [layer.module for layer in find_layers(network)])
    ids = torch.randint(2, 128, (2, 48))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(input_ids=ids, use_cache=False)
    assert training_operations(model, 48) * ids.numel() == 3 * counter.get_total_flops()


def test_operations_of_olmo_1b() -> None:
    """16 layers of 4 x 2048^2 + 3 x 2048 x 8192 weights, 50,304 x 2048 of the vocabulary, and attention to 2048."""
    model = OLMo.empty(load("configs/official/OLMo-1B.yaml").model)
    assert (
        training_operations(model, 2048)
        == 6 * (16 * (4 * 2048**2 + 3 * 2048 * 8192) + 50304 * 2048) + 12 * 16 * 2048**2
    )


@pytest.mark.parametrize(
    "name, precision, peak",
    [
        ("NVIDIA H100 80GB HBM3", "amp_bf16", 989.4e12),
        ("NVIDIA H100 PCIe", "amp_bf16", 756e12),
        ("NVIDIA A100-SXM4-80GB", "amp_bf16", 312e12),
        ("NVIDIA A100-SXM4-80GB", "fp32", 19.5e12),
        ("NVIDIA A100-SXM4-80GB", None, 19.5e12),
        ("NVIDIA L4", "amp_bf16", 121e12),
        ("NVIDIA L40", "amp_bf16", None),  # no L4
        ("NVIDIA GeForce GTX 1080", "amp_bf16", None),
    ],
)
def test_peak_of_a_known_gpu(monkeypatch: pytest.MonkeyPatch, name: str, precision: str | None, peak: float) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_operations(TrainConfig(precision=precision), GPU) == peak


def test_a_given_peak_goes_before_the_table() -> None:
    config = TrainConfig()
    assert peak_operations(config, CPU) is None
    config.speed_monitor.gpu_flops_available = 10**12
    assert peak_operations(config, CPU) == peak_operations(config, GPU) == 1e12


def test_memory_of_the_gpu_of_a_mac_is_its_drivers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 12345)
    assert peak_memory(torch.device("mps")) == 12345


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="this system does not tell what a process holds")
def test_the_most_that_a_process_held_is_in_bytes() -> None:
    """At least what it holds now, at most what the system says of it and its parent."""
    few, now = 2**20, int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert now - few <= peak_bytes() <= most + few


def test_what_a_run_logs(tmp_path: Path) -> None:
    plain = write_world(tmp_path / "world") / "plain.yaml"
    before = peak_memory(CPU)
    trainer = train(plain, tmp_path / "a", "--stop_at=2", "--speed_monitor.gpu_flops_available=1e9")
    first, second = map(json.loads, (tmp_path / "a" / "metrics.jsonl").read_text().splitlines())
    names = ["throughput/device/operations_per_second", "throughput/device/mfu"]
    assert not any(name in first for name in names)  # there is no speed before the first step has ended
    each = training_operations(trainer.model, SHORT)
    assert second[names[0]] == pytest.approx(second["throughput/device/tokens_per_second"] * each)
    assert second[names[0]] == pytest.approx(second["throughput/device/batches_per_second"] * each * BATCH * SHORT)
    assert second[names[1]] == pytest.approx(second[names[0]] / 1e9)
    # The kernel sums up its counters of pages late: a peak may be a few pages lower when asked again.
    few = 2**20
    assert before - few <= first["throughput/device/peak_memory_bytes"] <= peak_memory(CPU) + few
    train(plain, tmp_path / "b", "--stop_at=2")
    assert "mfu" not in (tmp_path / "b" / "metrics.jsonl").read_text()  # what a CPU could do, nobody knows
