"""The bench of saving, with a tiny model."""

from __future__ import annotations

import re

import pytest

from scripts.benchmarks import saves as bench_saves
from scripts.benchmarks import training as bench_training


def test_both_kinds_of_saves_hold_up_training(tmp_path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    shape = {"d_model": 32, "n_heads": 2, "n_layers": 1, "max_sequence_length": 16}
    monkeypatch.setattr(bench_training, "SHAPE", shape)
    bench_saves.bench_saves(
        tmp_path, 5, interval=40
    )  # short steps: enough of them that no save waits for the one before
    line = capsys.readouterr().out
    ratio, asynchronous, blocking = map(
        float, re.findall(r"delayed ([\d.]+) x as long \(([\d.]+) s.*?, ([\d.]+) s,", line)[0]
    )
    assert 0 <= asynchronous < blocking, line
    assert ratio == pytest.approx(asynchronous / blocking, abs=0.1)
