"""The bench of training, with a tiny model and without what has an environment of its own."""

from __future__ import annotations

import json
import re
from contextlib import nullcontext
from pathlib import Path

import pytest

from olmo.checkpoint import complete
from olmo.config import load
from scripts.benchmarks import training as bench_training


def test_ours_and_a_torch_loop_train_the_same_model(tmp_path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    shape = {"d_model": 32, "n_heads": 2, "n_layers": 1, "max_sequence_length": 16}
    monkeypatch.setattr(bench_training, "SHAPE", shape)
    monkeypatch.setattr(bench_training, "ENVIRONMENTS", dict.fromkeys(bench_training.ENVIRONMENTS, "no-such-folder"))
    bench_training.bench_training(tmp_path, rounds=1)
    without, head, first, ours, summary = capsys.readouterr().out.splitlines()
    assert without.endswith("; make no-such-folder/.ready")
    assert all(bench_training.WHAT[name] in without for name in bench_training.ENVIRONMENTS)
    assert float(head.rpartition(" ")[2]) < 1e-4, head  # how far the losses of three steps are apart
    assert "64 tokens per step" in head and "2 rounds" in head
    assert first.startswith(f"  {bench_training.WHAT['torch']}: 1.00 x (1.00 to 1.00) (")
    assert ours.startswith("  ours: ")
    for line in (first, ours):
        peak, beyond = (int(n.replace(",", "")) for n in re.findall(r"([\d,]+) (?:MiB|beyond)", line))
        assert 0 < beyond < peak, line
    assert f"({bench_training.WHAT['torch']})" in summary


def test_a_contestant_that_dies_says_what_of(tmp_path) -> None:
    (tmp_path / "settings.json").write_text("{}")
    with pytest.raises(RuntimeError, match=r"(?s)a plain torch loop.*ended unexpectedly.*OSError"):
        bench_training.Contestant("torch", tmp_path, threads=1)


class Untrained(nullcontext):
    """A contestant without a process, for what is compared before anything is measured."""

    def __init__(self, name: str, folder: Path, threads: int):
        super().__init__(self)
        self.name, self.answers = name, list[object]()

    def train(self, steps: int) -> None:
        pass


def test_other_losses_are_an_error(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        bench_training, "SHAPE", {"d_model": 32, "n_heads": 2, "n_layers": 1, "max_sequence_length": 16}
    )
    monkeypatch.setattr(bench_training, "ENVIRONMENTS", dict.fromkeys(bench_training.ENVIRONMENTS, "no-such-folder"))
    monkeypatch.setattr(bench_training, "first_losses", lambda contestant, *_: [float(len(contestant.name))] * 3)
    monkeypatch.setattr(bench_training, "Contestant", Untrained)
    with pytest.raises(RuntimeError, match=r"first losses differ: .*torch.*5.0.*ours.*4.0"):
        bench_training.bench_training(tmp_path, rounds=1)


def test_the_bench_of_a_family(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 first, and what ours trains is transformers' own class."""
    small = {"hidden_size": 36, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 128}
    monkeypatch.setattr(bench_training, "SMOLLM2", {**bench_training.SMOLLM2, **small})
    monkeypatch.setattr(bench_training, "first_losses", lambda contestant, *_: [float(len(contestant.name))] * 3)
    monkeypatch.setattr(bench_training, "Contestant", Untrained)
    with pytest.raises(RuntimeError, match=r"first losses differ: .*torch.*5.0.*ours.*4.0"):
        bench_training.bench_family(tmp_path, rounds=1)
    assert (tmp_path / "fp32/tokens").stat().st_size == 2 * 64 * 8 * 256
    settings = json.loads((tmp_path / "fp32/settings.json").read_text())
    config = load(settings["config"], settings["overrides"], complete)
    assert (config.optimizer.name, config.max_grad_norm) == ("adamw", 1.0)  # as the others
    assert config.model.transformers == str(tmp_path / "fp32/hf") and config.model.vocab_size == 128
