"""Runs from resuscitated weights: evaluated before and after the edit, trained, saved, and resumed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
import torch.nn.functional as F

from olmo import checkpoint
from olmo.checkpoint import fingerprint
from olmo.config import load
from olmo.exceptions import ConfigurationError
from olmo.memory.rescaling import Multipliers, rescale
from olmo.model import OLMo
from tests.reference import by_layer, tiny_config
from tests.running import (
    BATCH,
    CPU,
    LENGTH,
    configure,
    instances,
    metrics,
    order,
    same,
    series,
    train,
    weights,
    write_world,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def world(folder: Path) -> Path:
    """The configuration with knowledge and evaluators."""
    return folder / "config.yaml"


@pytest.fixture(scope="module")
def plain(folder: Path) -> Path:
    """The configuration with neither: the least that trains."""
    return folder / "plain.yaml"


def next_token_loss(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """As in OLMo: the sum over the T - 1 predictions of every row, divided by rows x T."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum") / ids.numel()


@pytest.fixture(scope="module")
def edited(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A checkpoint and an edit of it, as multiplier file and as full state dict."""
    folder = tmp_path_factory.mktemp("edited")
    train(plain, folder, "--save_interval=3", "--stop_at=3")
    state = checkpoint.read_state(folder / "step3")
    factors = by_layer(1 + 4 * torch.rand(2, 48, generator=torch.Generator().manual_seed(4)).round())
    marked = {number: values != 1 for number, values in factors.items()}
    Multipliers(factors, marked, {"checkpoint_fingerprint": fingerprint(state)}).save(folder / "edit.safetensors")
    edit = dict(rescale(state, factors))
    torch.save(edit, folder / "edit.pt")
    return {"folder": folder / "step3", "state": state, "edit": edit}


RESET = ("--reset_optimizer_state", "--reset_trainer_state", "--eval_on_load", "--save_interval=100")


@pytest.fixture(scope="module")
def resuscitated(world: Path, edited: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs of 2 steps from that checkpoint: as it is, with the multiplier file, with the state dict."""
    folder, source = tmp_path_factory.mktemp("resuscitated"), edited["folder"]
    settings = (*RESET, f"--load_path={source}", "--stop_at=2")
    train(world, folder / "none", *settings)
    for suffix in ("safetensors", "pt"):
        train(world, folder / suffix, *settings, f"--model.resuscitation={source.parent / 'edit'}.{suffix}")
    return {name: folder / name for name in ("none", "safetensors", "pt")}


def test_resuscitation_evaluates_the_original_and_the_edited_weights(resuscitated: dict[str, Path]) -> None:
    none, mine = metrics(resuscitated["none"]), metrics(resuscitated["pt"])
    original = {k.removeprefix("original/"): v for k, v in mine[0].items()}
    assert mine[0]["step"] == 0 and any(k.startswith("original/eval/once_semantic/") for k in mine[0])
    assert original == none[0]
    assert mine[1].keys() == none[0].keys() and mine[1]["eval/K"] != none[0]["eval/K"]
    for table in ("probes", "losses"):
        read = pyarrow.parquet.read_table
        assert read(resuscitated["pt"] / table / "original.parquet").equals(
            read(resuscitated["none"] / table / "step0.parquet")
        )
        assert not (resuscitated["none"] / table / "original.parquet").exists()
    assert pyarrow.parquet.read_table(resuscitated["pt"] / "probes" / "step0.parquet").num_rows == 6 * 15 + 6


def test_training_starts_from_exactly_the_edited_weights(
    world: Path, edited: dict[str, Any], resuscitated: dict[str, Path]
) -> None:
    losses = {}
    for name, state in (("none", edited["state"]), ("pt", edited["edit"])):
        model = OLMo(tiny_config(max_sequence_length=LENGTH))
        model.load_state_dict(state)
        ids = torch.from_numpy(instances(world.parent, LENGTH)[order(11, 0)[:BATCH]])
        with torch.no_grad():
            losses[name] = next_token_loss(model(ids), ids).item()
        # A sum over 1,530 float32 terms, in three micro-batches or at once.
        assert series(resuscitated[name])[1] == pytest.approx(losses[name], rel=1e-6)
    assert abs(losses["none"] - losses["pt"]) > 1e-3
    assert metrics(resuscitated["pt"]) == metrics(resuscitated["safetensors"])


def test_what_is_saved_after_resuscitation_is_not_edited_again(
    world: Path, edited: dict[str, Any], resuscitated: dict[str, Path], tmp_path: Path
) -> None:
    for name in ("pt", "safetensors"):
        saved = resuscitated[name] / "step2"
        loaded = checkpoint.load_model(saved, CPU).state_dict()  # as analysis.entropy does
        assert same(dict(loaded), checkpoint.read_state(saved))
    edit = f"--model.resuscitation={edited['folder'].parent / 'edit.pt'}"
    settings = (*RESET, f"--load_path={edited['folder']}", edit, "--model.resuscitation_force")
    whole = train(world, tmp_path / "whole", *settings, "--stop_at=3")
    shutil.copytree(resuscitated["pt"], tmp_path / "again")
    again = train(world, tmp_path / "again", *settings, "--stop_at=3", "--try_load_latest_save")
    assert same(weights(again), weights(whole))
    assert (tmp_path / "again" / "probes" / "original.parquet").is_file()
    written = load(tmp_path / "again" / "step3" / "config.yaml").model
    assert written.resuscitation is None and not written.resuscitation_force


def test_resuscitation_needs_a_checkpoint(plain: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"model\.resuscitation: needs load_path"):
        configure(plain, tmp_path, "--model.resuscitation=edit.pt")


def test_a_checkpoint_is_not_resuscitated_again_by_its_own_config(plain: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    trainer = train(plain, run, "--save_interval=1", "--stop_at=1")
    path = run / "step1" / "config.yaml"
    path.write_text(path.read_text().replace("resuscitation: null", "resuscitation: gone.pt"))
    assert same(checkpoint.load_model(run / "step1", CPU).state_dict(), weights(trainer))
