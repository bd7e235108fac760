"""Where a run starts: which folder it may take, and with which weights, optimizer and state it begins."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from olmo import checkpoint
from olmo.checkpoint import saves
from olmo.distributed import Ranks
from olmo.exceptions import ConfigurationError, MissingPackage
from olmo.train import Trainer
from tests.running import (
    BATCH,
    CPU,
    SHORT,
    checkpoints,
    configure,
    indices,
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


# --- load_path and new weights ---


def test_load_path_with_trainer_state_goes_on_in_another_folder(plain: Path, tmp_path: Path) -> None:
    whole = train(plain, tmp_path / "a", "--save_interval=3")
    other = train(plain, tmp_path / "b", f"--load_path={tmp_path / 'a' / 'step3'}", "--save_interval=100")
    assert same(weights(whole), weights(other))
    assert series(tmp_path / "b") == {s: v for s, v in series(tmp_path / "a").items() if s > 3}
    assert checkpoints(tmp_path / "b") == {"step7"}


def test_load_path_reset_starts_at_step_1_with_these_weights(plain: Path, tmp_path: Path) -> None:
    train(plain, tmp_path / "a", "--save_interval_unsharded=3")
    folder = tmp_path / "a" / "step3-unsharded"
    for name in ("optim.pt", "train.pt"):
        (folder / name).unlink()  # not needed
    reset = ("--reset_optimizer_state", "--reset_trainer_state", f"--load_path={folder}")
    trainer = Trainer(configure(plain, tmp_path / "b", *reset), CPU, Ranks())
    assert trainer.state.step == 0 and not trainer.optimizer.state
    assert same(weights(trainer), checkpoint.read_state(folder))
    trainer.fit()
    assert indices(tmp_path / "b")[1] == sorted(order(11, 0)[:BATCH].tolist())


@pytest.mark.parametrize("missing", ["train.pt", "optim.pt"])
def test_load_path_without_its_state_says_to_reset(plain: Path, tmp_path: Path, missing: str) -> None:
    train(plain, tmp_path / "a", "--save_interval_unsharded=3", "--stop_at=3")
    (tmp_path / "a" / "step3-unsharded" / missing).unlink()
    config = configure(plain, tmp_path / "b", f"--load_path={tmp_path / 'a' / 'step3-unsharded'}")
    with pytest.raises(FileNotFoundError, match=rf"{missing}: missing; set reset_optimizer_state") as caught:
        Trainer(config, CPU, Ranks())
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(("name", "key"), [("optim.pt", "reset_optimizer_state"), ("train.pt", "reset_trainer_state")])
def test_a_damaged_state_names_the_key_that_does_without_it(plain: Path, tmp_path: Path, name: str, key: str) -> None:
    train(plain, tmp_path / "a", "--save_interval_unsharded=3", "--stop_at=3")
    broken = tmp_path / "a" / "step3-unsharded"
    (broken / name).write_bytes((broken / name).read_bytes()[:500])
    with pytest.raises(
        ValueError, match=rf"step3-unsharded/{name}: has 500 bytes, and was written with \d+; without .*manifest"
    ):
        train(plain, tmp_path / "b", f"--load_path={broken}")
    (broken / "manifest.json").unlink()  # as OLMo saves
    with pytest.raises(
        ValueError, match=rf"{name}: damaged, or .* to start without it, set load_path: .*/step3-unsharded and {key}"
    ):
        Trainer(configure(plain, tmp_path / "a", "--try_load_latest_save"), CPU, Ranks())
    train(plain, tmp_path / "b", f"--load_path={broken}", f"--{key}", "--stop_at=4")
    assert series(tmp_path / "b")


def test_a_model_that_would_compute_something_else_is_refused(plain: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(plain, run, "--save_interval=1", "--stop_at=1")
    reset = ("--reset_optimizer_state", "--reset_trainer_state", f"--load_path={run / 'step1'}")
    for key, value in (("n_heads", "2"), ("rope_theta", "500"), ("clip_qkv", "1.0"), ("layer_norm_eps", "0.1")):
        with pytest.raises(ConfigurationError, match=rf"model\.{key}: .* but the checkpoint .* was made with"):
            train(plain, tmp_path / "other", *reset, f"--model.{key}={value}")


def test_trained_weights_are_not_the_files(plain: Path, tmp_path: Path) -> None:
    train(plain, tmp_path / "first", "--stop_at=1", "--save_interval=1")
    trainer = train(plain, tmp_path / "second", f"--load_path={tmp_path / 'first/step1'}", "--dry_run")
    assert all(p.data_ptr() % 64 == 0 for p in trainer.model.parameters())  # torch's own alignment
    maps = Path("/proc/self/maps")
    assert not maps.exists() or "first/step1/model.safetensors" not in maps.read_text(encoding="utf-8")


def test_divisors_beside_the_starting_point_serve_a_restart(
    plain: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Which says nothing of other settings, unless there are some."""
    base = tmp_path / "base"
    train(plain, base, "--stop_at=1", "--save_interval=1", "--max_duration=1")
    torch.save(torch.rand(2, 48) + 0.5, base / "step1/divisors.pt")
    asked = (f"--load_path={base / 'step1'}", "--reset_optimizer_state", "--reset_trainer_state")
    asked = (*asked, "--model.temperature_MLP=divisors.pt", "--save_interval=3")
    whole = train(plain, tmp_path / "whole", *asked)
    train(plain, tmp_path / "parts", *asked, "--stop_at=3")
    caplog.clear()
    parts = train(plain, tmp_path / "parts", *asked, "--try_load_latest_save")
    assert same(weights(parts), weights(whole))
    assert not [message for message in caplog.messages if "other settings" in message]
    with pytest.raises(ConfigurationError, match=r"other settings: model\.temperature_MLP /"):
        train(plain, tmp_path / "parts", "--max_duration=8", "--try_load_latest_save")
    train(plain, tmp_path / "parts", "--max_duration=8", "--try_load_latest_save", "--allow_changed_settings")
    warned = "load_path .* -> null, reset_optimizer_state true -> false, reset_trainer_state .*, max_duration 7 -> 8;"
    assert len([message for message in caplog.messages if re.search(warned, message)]) == 1


def test_new_weights_made_on_meta(plain: Path, tmp_path: Path) -> None:
    trainer = train(plain, tmp_path, "--model.init_device=meta", "--model.init_fn=normal", "--stop_at=1")
    assert all(p.device.type == "cpu" and p.isfinite().all() for p in trainer.model.parameters())
    assert math.isfinite(series(tmp_path)[1])


def test_a_new_model_is_evaluated_with_its_temperatures(world: Path, tmp_path: Path) -> None:
    label = "eval/walk/heldout/CrossEntropyLoss"
    asked = ("--eval_on_load", "--stop_at=1", "--no_pre_train_checkpoint=false", "--save_interval=1")

    def first(*more: str) -> float:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        train(world, folder, *asked, *more)
        return next(line[label] for line in metrics(folder) if line["step"] == 0 and label in line)

    warm, cold = first("--model.temperature_attention=2.5"), first()
    assert warm != cold
    start = (f"--load_path={tmp_path / '1/step0'}", "--reset_optimizer_state", "--reset_trainer_state")
    assert first(*start, "--model.temperature_attention=2.5") == pytest.approx(warm, rel=1e-6)


# --- which folder a run may take ---


def test_a_folder_with_a_run_is_only_overwritten_when_told(
    plain: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(plain, tmp_path, "--save_interval=2", "--stop_at=4")
    before = metrics(tmp_path)
    with pytest.raises(ConfigurationError, match=r"holds a run; add --save_overwrite, or --try_load_latest_save"):
        Trainer(configure(plain, tmp_path), CPU, Ranks())
    assert metrics(tmp_path) == before
    train(plain, tmp_path, "--save_overwrite", "--stop_at=2", "--seed=12")
    assert series(tmp_path).keys() == indices(tmp_path).keys() == {1, 2}
    assert metrics(tmp_path) != before[:2]
    # With both flags it goes on where it can.
    train(plain, tmp_path / "new", "--save_overwrite", "--try_load_latest_save", "--stop_at=1")
    assert series(tmp_path / "new").keys() == {1}


def test_a_finished_run_has_no_steps_to_train(plain: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for flags in ((), ("--try_load_latest_save",)):
        caplog.clear()
        train(plain, tmp_path, "--max_duration=1", "--save_interval=1", *flags)
    assert any("nothing to train: step 1 is done, and the last step is 1" in message for message in caplog.messages)
    assert not any("steps 2 to 1" in message for message in caplog.messages)


def test_a_run_without_checkpoint_cannot_go_on_and_says_so(plain: Path, tmp_path: Path) -> None:
    train(plain, tmp_path, "--stop_at=1")
    with pytest.raises(ConfigurationError, match=r"a run without a checkpoint to resume from; choose .*--save_over"):
        Trainer(configure(plain, tmp_path, "--try_load_latest_save"), CPU, Ranks())
    assert series(tmp_path).keys() == {1}


@pytest.mark.parametrize("began_with", [(), ("--save_overwrite",), ("--try_load_latest_save",)])
def test_a_run_that_ended_before_its_first_checkpoint_begins_anew(
    plain: Path, tmp_path: Path, began_with: tuple[str, ...]
) -> None:
    train(plain, tmp_path, "--max_duration=2", *began_with)
    whole, file = metrics(tmp_path), tmp_path / "metrics.jsonl"
    file.write_text(file.read_text().splitlines(keepends=True)[0])
    train(plain, tmp_path, "--max_duration=2", "--try_load_latest_save")
    assert metrics(tmp_path) == whole and indices(tmp_path).keys() == {1, 2}


def test_a_run_that_overwrites_another_never_goes_on_from_its_checkpoints(plain: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(plain, run, "--save_interval=2", "--stop_at=6")
    assert saves.latest(run) == run / "step6"
    train(plain, run, "--save_interval=2", "--stop_at=2", "--save_overwrite", "--seed=99")
    assert saves.latest(run) == run / "step2"
    assert sorted(series(run)) == [1, 2]


def test_a_run_does_not_clear_the_checkpoint_it_starts_from(plain: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(plain, run, "--save_interval=2", "--stop_at=2")
    with pytest.raises(ConfigurationError, match="is in save_folder, which save_overwrite clears"):
        train(plain, run, f"--load_path={run / 'step2'}", "--save_overwrite")
    assert (run / "step2" / "train.pt").is_file()


def test_an_older_run_stays_where_the_data_of_the_new_one_cannot_be_read(plain: Path, tmp_path: Path) -> None:
    train(plain, tmp_path / "run", "--stop_at=1", "--save_interval_unsharded=1")
    np.full(BATCH * SHORT, 60_000, dtype="<u2").tofile(tmp_path / "foreign.npy")
    with pytest.raises(ValueError, match="holds token 60000"):
        train(plain, tmp_path / "run", "--save_overwrite", f"--data.paths=[{tmp_path / 'foreign.npy'}]")
    assert checkpoints(tmp_path / "run") == {"step1-unsharded"} and series(tmp_path / "run").keys() == {1}


def test_two_runs_do_not_share_a_folder(plain: Path, tmp_path: Path) -> None:
    first = Trainer(configure(plain, tmp_path / "run", "--stop_at=2"), CPU, Ranks())
    for more in ((), ("--save_overwrite",), ("--try_load_latest_save",)):
        with pytest.raises(ConfigurationError, match=r"^save_folder: another run is writing to .*run$"):
            train(plain, tmp_path / "run", *more)
    first.fit()
    assert series(tmp_path / "run").keys() == {1, 2}
    train(plain, tmp_path / "run", "--save_overwrite", "--stop_at=1")
    assert series(tmp_path / "run").keys() == {1}


def test_a_start_that_fails_does_not_stand_in_the_way_of_the_next(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setitem(__import__("sys").modules, "wandb", None)
        with pytest.raises(MissingPackage, match="not installed"):
            train(plain, run, "--wandb.project=demo")
    with pytest.raises(ValueError, match="holds token"):  # in the first batch
        train(plain, run, "--model.vocab_size=2", "--model.embedding_size=2", "--stop_at=1")
    train(plain, run, "--stop_at=1")
    assert series(run).keys() == indices(run).keys() == {1}
    # Nor is an older run gone before the new one has begun.
    before = metrics(run)
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(MissingPackage, match="not installed"):
        train(plain, run, "--wandb.project=demo", "--save_overwrite")
    assert metrics(run) == before
