"""The measurements of `make gpu` at tiny size on the processor at hand, and the command itself."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from olmo.exceptions import ConfigurationError, exit_status
from olmo.memory import forward
from scripts.gpu import __main__ as command
from scripts.gpu import entropy, entropy_7b, entropy_ways, peak, probes
from scripts.gpu.models import entropy_operations, random_model, shape
from scripts.gpu.place import Place, cannot_compile
from scripts.gpu.rows import Skipped


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return Place(tmp_path, small=True, peak=1e12)


def test_entropy_of_compiled_layers(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(forward, "_compiled_layer", lambda: calls.append(0) or forward._layer)
    rows = {row.name: row for row in entropy.measure(place)}
    assert len(calls) == 2 * (2 + 4 + 23)  # of two layers: two batches, four, and 23 passes alone
    model = random_model(place, shape(place, "OLMo-1B"), torch.bfloat16)
    # 2 a weight of two layers of width 64 without the last down projection, and 4 x 2 x 64 x 64 for attention.
    assert entropy_operations(model) == 2 * (2 * (4 * 64 * 64 + 3 * 64 * 64) - 64 * 64) + 4 * 2 * 64 * 64
    mfu = 100 * rows[entropy.RATE].value * entropy_operations(model) / 1e12
    assert rows["MFU, compiled"].value == pytest.approx(mfu)
    assert all(row.margin is None and row.value > 0 for row in rows.values())


def test_ways_to_entropy_agree_and_have_ratios(place: Place) -> None:
    earlier = {f"entropy: {entropy.RATE}": 1e6}
    rows = {row.name: row for row in entropy_ways.measure(Place(place.folder, True, 1e12, earlier))}
    assert rows["H of a layer, largest difference"].met and rows["H of a layer, largest difference"].at_most == 1e-3
    for name in ("obvious script", "transformers with hooks"):
        assert rows[f"compiled / {name}"].value == pytest.approx(1e6 / rows[f"tokens/s, {name}"].value)


def test_only_compiled_layers_have_bars_of_ratios(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Place, "bar", lambda self, value: value)
    for earlier, bars in (({}, {"eager": [None, None]}), ({f"entropy: {entropy.RATE}": 1e6}, {"compiled": [10, 1]})):
        rows = list(entropy_ways.measure(Place(place.folder, True, 1e12, earlier)))
        assert {name: [row.at_least for row in rows if row.name.startswith(f"{name} / ")] for name in bars} == bars


def test_on_a_cpu_no_compiler_is_needed(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(place.folder / "inductor"))
    forward._compiled_layer.cache_clear()
    assert next(entropy.measure(place)).value > 0
    forward._compiled_layer.cache_clear()


def test_without_a_compiler_on_a_gpu_the_reason_is_stated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(shutil, "which", {"clang": "/usr/bin/clang"}.get)
    assert cannot_compile() == ""
    monkeypatch.setenv("CC", "gcc")
    assert cannot_compile() == "CC=gcc: no such program"
    monkeypatch.delenv("CC")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert cannot_compile().startswith("no gcc or clang here")
    with pytest.raises(Skipped, match=r"^no gcc or clang here"):
        next(entropy.measure(SimpleNamespace(device=torch.device("cuda"))))


def test_memory_of_7b(place: Place) -> None:
    names = [row.name for row in entropy_7b.measure(place)]
    assert names == ["peak memory, 4 instances", "peak memory, 16 instances", "MFU, eager"]


def test_probes_in_both_ways(place: Place) -> None:
    rows = {row.name: row for row in probes.measure(place)}
    assert rows["diluted loss, largest difference"].met
    assert rows["packed"].note.startswith("195 probes, ")


def test_bars_are_of_full_size(place: Place) -> None:
    full = Place(place.folder, peak=1e12)
    row = full.mfu(5e11, [1.0], "MFU", 60, "")
    assert (row.value, row.at_least, row.met) == (50.0, 60, False) and full.bar(80) == 80
    assert place.mfu(5e11, [1.0], "MFU", 60, "").at_least is None and place.bar(80) is None


def test_without_a_gpu_only_small_runs(place: Place) -> None:
    with pytest.raises(ConfigurationError, match="torch sees no CUDA device here; --small runs on a CPU"):
        _ = Place(place.folder).device


def test_the_rate_of_a_product_of_matrices(place: Place) -> None:
    (row,) = peak.measure(place)
    assert row.value > 0 and len(row.samples) == 50


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert exit_status(command.main, ["--small", "--only", "peak", "--output", str(tmp_path)]) == 0
    assert "peak  matmul bf16" in capsys.readouterr().out
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["small"] and found["torch"] == torch.__version__ and found["boxes"][0]["status"] == "done"
