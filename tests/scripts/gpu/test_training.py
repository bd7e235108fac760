"""The measurements of training of `make gpu`, at tiny size on the processor at hand."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from scripts.gpu import loss, saves, training
from scripts.gpu.place import Place
from scripts.gpu.rows import Row, Skipped
from scripts.gpu.runs import open_trainer, release


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return Place(tmp_path, small=True, peak=1e12)


def by_name(rows: Any) -> dict[str, Row]:
    return {row.name: row for row in rows}


def test_training_has_a_rate_an_mfu_and_memory(place: Place) -> None:
    rows = by_name(training.measure(place))
    kinds = {"compiled", "plain torch loop", "eager", "eager, fine_grained", "compiled, whole_layer"}
    assert {name.partition(":")[0] for name in rows} == {*kinds, "compiled / plain torch loop"}
    # 6 a weight: of two layers of width 32 (MLP 8 x 32, half of it the gate's), and 128 rows; and 12 x 2 x 32 x 16.
    operations = 6 * (2 * (32 * 96 + 32 * 32 + 32 * 256 + 128 * 32) + 128 * 32) + 12 * 2 * 32 * 16
    for kind in kinds:
        rate, mfu = rows[f"{kind}: rate"], rows[f"{kind}: MFU"]
        assert len(rate.samples) == training.STEPS
        assert mfu.value == pytest.approx(100 * rate.value * operations / 1e12)
        assert rows[f"{kind}: peak memory"].value > 0
    ratio = rows["compiled: rate"].value / rows["plain torch loop: rate"].value
    assert rows["compiled / plain torch loop"].value == pytest.approx(ratio, rel=0.5)  # medians of times and of rates


def test_all_rows_of_full_size_have_their_bars(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "cannot_compile", lambda: "")
    monkeypatch.setattr(training, "run", lambda *_: ([1.0], 9.0, 1024, 1e9))
    monkeypatch.setattr(training, "plain_loop", lambda *_: ([1.0], 9.0))
    rows = by_name(training.measure(Place(place.folder, peak=1e15)))
    bars = {name: row.at_least or row.at_most for name, row in rows.items() if row.margin is not None}
    peaks = {"compiled: peak memory": 80, "eager, fine_grained: peak memory": 80}
    assert bars == {"compiled: MFU": 50, "compiled / plain torch loop": 1, **peaks}


def test_eager_rows_are_measured_without_a_compiler(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: list[dict[str, str]] = []
    monkeypatch.setattr(training, "cannot_compile", lambda: "no gcc")
    monkeypatch.setattr(training, "run", lambda *given: settings.append(given[-1]) or ([1.0], 9.0, 1024, 1e9))
    monkeypatch.setattr(training, "plain_loop", lambda *_: ([1.0], 9.0))
    found: list[Row] = []
    with pytest.raises(Skipped, match=r"^compiled: no gcc$"):
        for row in training.measure(Place(place.folder, peak=1e15)):
            found.append(row)
    assert settings == [{}, training.RECOMPUTED]
    kinds = {row.name.partition(":")[0] for row in found}
    assert kinds == {"eager", "plain torch loop", "eager / plain torch loop", "eager, fine_grained"}
    assert [row.name for row in found if row.margin is not None] == ["eager, fine_grained: peak memory"]


def test_nothing_of_a_run_is_left_when_the_next_one_begins(place: Place) -> None:
    """Else its memory would be measured with the next one's."""
    trainer = open_trainer(place, 4, 2, stop_at=1, **training.COMPILED_SMALL)
    trainer.fit()
    model = weakref.ref(trainer.model)
    del trainer
    release()
    assert model() is None


def test_losses_have_time_and_memory(place: Place) -> None:
    rows = by_name(loss.measure(place))
    assert rows["ours, in parts: loss and gradients"].value > 0
    assert "all at once: memory" in rows
    assert rows["all at once / ours: time"].value > 0


def test_saves_of_both_kinds(place: Place) -> None:
    rows = by_name(saves.measure(place))
    ratio = rows["asynchronous: training waits"].value / rows["blocking: training waits"].value
    assert rows["asynchronous / blocking"].value == pytest.approx(ratio) and ratio > 0
    assert len(rows["blocking: training waits"].samples) == 1 + saves.SAVES
    assert len(rows["a step beside the thread / without"].samples) == (1 + saves.SAVES) * saves.BESIDE
    kept = [folder.name for folder in (place.folder / "run").glob("step*")]
    assert len(kept) == 2  # one of each kind
