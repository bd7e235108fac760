"""The measurement: coefficients, precision, tolerance, standard errors, and any number of processes."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from analysis import measure as measure_module
from analysis.measure import measure
from analysis.models import open_model
from olmo.distributed import Ranks
from olmo.memory import GroupedMeans, forward
from olmo.model import OLMo
from tests.analysis.measuring import (
    INSTANCES,
    LENGTH,
    check,
    coefficients_in,
    command,
    direct,
    entropies,
    made_model,
    olmo_places,
    result_in,
    rows_of,
    run,
)
from tests.reference import tiny_config, to_transformers
from tests.running import CPU


def test_the_standard_error_is_the_jackknife_over_64_groups(tmp_path: Path, shared: Path, tokens: Path) -> None:
    run("--checkpoint", shared, "--data", tokens, "--data_size", INSTANCES, "--output", tmp_path)
    theirs, rows = to_transformers(made_model(0)), rows_of(tokens)
    each = torch.stack([direct(theirs, olmo_places(), [row]) for row in rows])
    groups = torch.arange(INSTANCES) % 64
    left_out = torch.tensor([entropies(each[groups != g].mean(0)) for g in range(64)])
    spread = (left_out.sum(1) - left_out.sum(1).mean()).square().sum().item()
    result = result_in(tmp_path)
    assert result["standard_error"] == pytest.approx(math.sqrt(63 / 64 * spread), rel=1e-3)
    for layer in range(2):
        spread = (left_out[:, layer] - left_out[:, layer].mean()).square().sum().item()
        assert result["layer_standard_errors"][layer] == pytest.approx(math.sqrt(63 / 64 * spread), rel=1e-3)


def test_relu_coefficients(tmp_path: Path, shared: Path, tokens: Path) -> None:
    run("--checkpoint", shared, "--data", tokens, "--data_size", 9, "--coefficient", "relu", "--output", tmp_path)
    theirs = to_transformers(made_model(0))
    # relu(gate) * up with negatives set to 0, by the modules' own outputs
    heard: dict[str, Tensor] = {}
    for number, layer in enumerate(theirs.model.layers):
        for name in ("gate_proj", "up_proj"):

            def hook(_: Any, __: Any, output: Tensor, key: str = f"{number}.{name}") -> None:
                heard[key] = output[0].double()

            getattr(layer.mlp, name).register_forward_hook(hook)
    total: Any = 0.0
    for row in rows_of(tokens)[:9]:
        with torch.no_grad():
            theirs(torch.as_tensor(row)[None])
        one = [(heard[f"{n}.gate_proj"].clamp(min=0) * heard[f"{n}.up_proj"]).clamp(min=0).mean(0) for n in (0, 1)]
        total = total + torch.stack(one)
    check(tmp_path, total / 9)
    assert result_in(tmp_path)["coefficient"] == "relu"


def test_bfloat16(tmp_path: Path, shared: Path, tokens: Path) -> None:
    argv = ["--checkpoint", shared, "--data", tokens, "--data_size", 20]
    run(*argv, "--output", tmp_path / "fp32")
    run(*argv, "--precision", "bf16", "--output", tmp_path / "bf16")
    first, second = result_in(tmp_path / "fp32"), result_in(tmp_path / "bf16")
    assert second["precision"] == "bf16"
    assert first["knowledge_entropy"] != second["knowledge_entropy"]
    assert first["knowledge_entropy"] == pytest.approx(second["knowledge_entropy"], abs=0.01)


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_the_batch_size_changes_nothing(tmp_path: Path, shared: Path, tokens: Path, batch_size: int) -> None:
    argv = ["--checkpoint", shared, "--data", tokens, "--data_size", 30, "--batch_size", batch_size]
    run(*argv, "--output", tmp_path)
    check(tmp_path, direct(to_transformers(made_model(0)), olmo_places(), rows_of(tokens)[:30]))


def test_a_tolerance_stops_as_soon_as_it_is_reached(tmp_path: Path, shared: Path, tokens: Path) -> None:
    argv = ["--checkpoint", shared, "--data", tokens, "--data_size", INSTANCES, "--batch_size", 4]
    run(*argv, "--tolerance", 10, "--output", tmp_path / "early")
    early = result_in(tmp_path / "early")
    assert early["number_of_instances"] == 64 and early["number_of_tokens"] == 64 * LENGTH
    assert early["standard_error"] < 10
    check(tmp_path / "early", direct(to_transformers(made_model(0)), olmo_places(), rows_of(tokens)[:64]))
    run(*argv, "--tolerance", 1e-9, "--output", tmp_path / "never")
    assert result_in(tmp_path / "never")["number_of_instances"] == INSTANCES


def test_two_processes_measure_what_one_does(tmp_path: Path, shared: Path, tokens: Path) -> None:
    """An odd number of instances, and a tolerance that both must agree about."""
    launch = ["torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
    argv = ["analysis.entropy", "--checkpoint", shared, "--data", tokens, "--batch_size", 4, "--device", "cpu"]
    argv += ["--data_size", 99, "--tolerance", 10]
    done = command(*launch, *argv, "--output", tmp_path / "two")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("H = ") == 1
    run(*argv[1:], "--output", tmp_path / "one")
    one, two = result_in(tmp_path / "one"), result_in(tmp_path / "two")
    assert one["number_of_instances"] == two["number_of_instances"] == 64
    assert two["knowledge_entropy"] == pytest.approx(one["knowledge_entropy"], abs=1e-6)
    assert two["standard_error"] == pytest.approx(one["standard_error"], rel=1e-3)
    torch.testing.assert_close(coefficients_in(tmp_path / "two"), coefficients_in(tmp_path / "one"))


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("family", ["ours", "OLMoE"])
def test_ranks_share_odd_numbers_of_instances_out(shared: Path, tokens: Path, family: str, world_size: int) -> None:
    """Ranks one after another, without tolerance: their sums are those of one process."""
    if family == "ours":
        model = open_model(shared, torch.device("cpu"), torch.float32)
    else:
        torch.manual_seed(0)
        shape = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = transformers.OlmoeConfig(**shape, intermediate_size=48, num_experts=4, num_experts_per_tok=2)
        model = transformers.OlmoeForCausalLM(config).eval()
    rows = [row[: 5 + number % 7] for number, row in enumerate(rows_of(tokens)[:17])]

    class Alone(Ranks):
        def sum(self, values: np.ndarray) -> np.ndarray:
            return values

    def measured(ranks: Ranks) -> GroupedMeans:
        return measure(model, rows, 2, "abs", torch.device("cpu"), ranks).knowledge

    parts = [measured(Alone(rank, world_size)) for rank in range(world_size)]
    alone = measured(Ranks())
    assert sum(part.instances for part in parts) == 17
    np.testing.assert_array_equal(sum(part.counts for part in parts), alone.counts)
    np.testing.assert_allclose(sum(part.sums for part in parts), alone.sums, rtol=1e-5, atol=1e-8)


def test_fewer_instances_than_processes_are_an_error_on_all_of_them(shared: Path) -> None:
    model, rows = open_model(shared, CPU, torch.float32), [np.arange(4), np.arange(4)]
    for rank in range(3):
        with pytest.raises(ValueError, match="2 instances, fewer than the 3 processes"):
            measure(model, rows, 1, "abs", CPU, Ranks(rank, 3))


def test_the_progress_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens per second, and H with its standard error once there are enough instances."""
    model = OLMo(tiny_config()).eval()
    clock = SimpleNamespace(monotonic=iter(np.arange(0.0, 1e6, 4.0)).__next__)
    monkeypatch.setattr(measure_module, "time", clock)
    notes: list[str] = []

    def advance(progress: Any, count: int) -> None:
        progress.started = 0.0
        notes.append(progress.note)

    monkeypatch.setattr(measure_module.Progress, "advance", advance)
    rows = list(np.random.default_rng(0).integers(0, 100, (130, 400)))
    measure(model, rows, 10, "abs", CPU, Ranks())
    # 4000 tokens every 4 s; before the first batch the clock of the progress had not been set.
    assert notes[1] == ", 2,000 tokens/s"
    assert notes[2] == ", 1,500 tokens/s" and notes[6].startswith(", 1,167 tokens/s") and "H " not in notes[6]
    assert ", H " in notes[-1] and " +- " in notes[-1]


def test_estimates_for_the_progress_line_are_rare(monkeypatch: pytest.MonkeyPatch) -> None:
    """They keep a GPU waiting; a tolerance needs every one of them."""
    model, estimates = OLMo(tiny_config()).eval(), []
    rows = list(np.random.default_rng(0).integers(0, 100, (130, 4)))
    error = measure_module.jackknife_error
    monkeypatch.setattr(measure_module, "jackknife_error", lambda left: estimates.append(len(left)) or error(left))
    for pause, tolerance, expected in ((0, None, 3), (1e6, None, 1), (1e6, 1e-9, 3)):  # after 70, 90 and 120
        monkeypatch.setattr(measure_module, "_PAUSE", pause)
        measure(model, rows, 10, "abs", CPU, Ranks(), tolerance)
        assert len(estimates) == expected
        estimates.clear()


@pytest.mark.parametrize(
    ("lengths", "batches"), [([9] * 11, 2), ([9] * 8 + [3] * 3, 2), ([9] * 5 + [3] * 6, 0), ([*range(1, 12)], 0)]
)
def test_full_batches_of_the_usual_length_are_compiled(
    monkeypatch: pytest.MonkeyPatch, lengths: list[int], batches: int
) -> None:
    """Every other shape would be compiled anew, for tens of seconds each; the result is the same."""
    torch.manual_seed(0)
    model, shapes = OLMo(tiny_config(n_layers=2)).eval(), []

    def compiled(block: Any, stream: Tensor, *rest: Any) -> Any:
        shapes.append(stream.shape[:2])
        return forward._layer(block, stream, *rest)

    monkeypatch.setattr(forward, "_compiled_layer", lambda: compiled)
    rows = [np.arange(length) for length in lengths]
    found = measure(model, rows, 4, "abs", CPU, Ranks(), compiled=True)
    assert shapes == [(4, 9)] * (2 * batches)
    np.testing.assert_allclose(found.layers, measure(model, rows, 4, "abs", CPU, Ranks()).layers, rtol=1e-6)
