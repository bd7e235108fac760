"""The loop: injection, the order of the data, and runs that are stopped or killed and resumed, bit for bit."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pyarrow.parquet
import pytest
import torch

from olmo.distributed import Ranks
from olmo.knowledge.injection import inject
from olmo.tokenizer import load_tokenizer
from olmo.train import Trainer
from tests.running import (
    BATCH,
    CPU,
    LENGTH,
    checkpoints,
    configure,
    indices,
    instances,
    metrics,
    order,
    same,
    series,
    train,
    weights,
    write_world,
)

DROPOUT = tuple(f"--model.{place}_dropout=0.1" for place in ("attention", "residual", "embedding"))


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


@pytest.mark.parametrize("step", [2, 4, 6, 8, 3])
def test_injected_batch_is_json_and_tokenizer_in_front_of_the_data(world: Path, tmp_path: Path, step: int) -> None:
    config = configure(world, tmp_path, "--evaluators=[]", "--dry_run")
    trainer = Trainer(config, CPU, Ranks())
    batch = trainer.loader.batch(*divmod(step - 1, 4))
    found, entered = inject(batch, step, trainer.plan, BATCH)

    epoch, place = divmod(step - 1, 4)
    expected = instances(world.parent, LENGTH)[order(config.seed, epoch)[place * BATCH : (place + 1) * BATCH]]
    paraphrase, once = (json.loads((world.parent / f"{n}.json").read_text()) for n in ("paraphrase", "once"))
    tokenizer = load_tokenizer(config.tokenizer.identifier)
    if step % 2 == 0:
        number = (step // 2 - 1) % 3  # three rounds, then the first again
        texts = [[e["train_context"], *e["paraphrases"]][number] for e in paraphrase] + [once[number]["train_context"]]
        for row, text in enumerate(texts):
            ids = [*tokenizer.encode(text, add_special_tokens=False).ids, 0]
            expected[row] = (ids + expected[row].tolist())[:LENGTH]
    assert found.input_ids.tolist() == expected.tolist()
    assert [row for row, _ in entered] == ([0, 1, 2, 3] if step % 2 == 0 else [])


def test_the_model_trains_on_the_injected_batch(world: Path, tmp_path: Path) -> None:
    trainer = Trainer(configure(world, tmp_path, "--evaluators=[]", "--stop_at=4"), CPU, Ranks())
    seen: list[torch.Tensor] = []
    trainer.train_step.module.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    trainer.fit()
    assert len(seen) == 12  # 4 steps of 3 micro-batches
    for step in range(1, 5):
        batch = trainer.loader.batch(0, step - 1)
        expected = inject(batch, step, trainer.plan, BATCH)[0].input_ids
        assert torch.equal(torch.cat(seen[3 * step - 3 : 3 * step]), expected)
        changed = (expected != batch.input_ids).any(1).tolist()
        assert changed == ([True] * 4 + [False] * 2 if step % 2 == 0 else [False] * 6)


def test_rounds_that_never_come_are_announced(world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(world, tmp_path, "--evaluators=[]", "--stop_at=5")
    assert "only 2 of 3 injection rounds are within steps 1 to 5" in caplog.messages


def test_rounds_before_the_checkpoint_that_a_run_goes_on_from_are_announced(
    world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    train(world, before, "--evaluators=[]", "--stop_at=2", "--save_interval=1")
    on = ("--evaluators=[]", f"--load_path={before / 'step2'}", "--stop_at=6", "--save_interval=5")
    caplog.clear()
    train(world, after, *on)
    assert "only 2 of 3 injection rounds are within steps 3 to 6" in caplog.messages
    shutil.rmtree(after / "step6")
    caplog.clear()
    train(world, after, *on, "--try_load_latest_save")  # what this run itself injected is not missing
    assert not any("injection rounds are within" in message for message in caplog.messages)


@pytest.fixture(scope="module")
def unbroken(world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A run of 9 steps (2 epochs and a bit) with dropout, knowledge and evaluators, never stopped."""
    folder = tmp_path_factory.mktemp("unbroken")
    return folder, weights(train(world, folder, *DROPOUT, "--max_duration=9", "--save_interval=3"))


@pytest.mark.parametrize("stop", [1, 2, 4])  # before and after an injection step, at the border of an epoch
def test_a_run_that_was_stopped_ends_with_the_same_bits(
    world: Path, tmp_path: Path, unbroken: tuple[Path, dict[str, torch.Tensor]], stop: int
) -> None:
    whole, final = unbroken
    settings = (*DROPOUT, "--max_duration=9", "--save_interval=3")
    train(world, tmp_path, *settings, f"--stop_after={stop}")
    assert max(series(tmp_path)) == stop
    trainer = train(world, tmp_path, *settings, "--try_load_latest_save")
    assert same(weights(trainer), final)
    for name in ("train/CrossEntropyLoss", "optim/total_grad_norm", "optim/learning_rate", "throughput/total_tokens"):
        assert series(tmp_path, name) == series(whole, name)
    assert series(tmp_path, "injection/tokens") == series(whole, "injection/tokens")
    assert indices(tmp_path) == indices(whole)
    # The last step of every process is evaluated, so the stopped run has one evaluation more.
    expected = [line for line in metrics(whole) if "eval/K" in line]
    found = [line for line in metrics(tmp_path) if "eval/K" in line and line["step"] in (3, 6, 9)]
    assert found == expected
    steps = {3, 6, 9, stop}
    assert {p.name for p in tmp_path.glob("probes/*")} == {f"step{step}.parquet" for step in steps}


@pytest.mark.parametrize("at_save", [False, True])
def test_a_run_that_was_killed_goes_on_from_its_last_checkpoint(
    world: Path, tmp_path: Path, unbroken: tuple[Path, dict[str, torch.Tensor]], at_save: bool
) -> None:
    whole, final = unbroken
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "step9")  # killed before the last checkpoint: step 6 is the newest
    if at_save:  # killed while it wrote that checkpoint
        (folder / ".step9.partial").mkdir()
        (folder / ".step9.partial" / "train.pt").write_bytes(b"half")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "train/Cro')  # and in the middle of a line
    trainer = train(world, folder, *DROPOUT, "--max_duration=9", "--save_interval=3", "--try_load_latest_save")
    assert same(weights(trainer), final)
    assert metrics(folder) == metrics(whole)  # series() would find a step twice, this finds anything
    assert indices(folder) == indices(whole)
    for table in whole.glob("*/*.parquet"):
        mine = pyarrow.parquet.read_table(folder / table.parent.name / table.name)
        assert mine.equals(pyarrow.parquet.read_table(table))
    assert checkpoints(folder) == {"step3", "step6", "step9"}


def test_a_finished_run_has_nothing_left_to_do(
    world: Path, tmp_path: Path, unbroken: tuple[Path, dict[str, torch.Tensor]]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(unbroken[0], folder)
    before = {p.name: p.stat().st_mtime_ns for p in folder.glob("step*")}
    trainer = train(world, folder, *DROPOUT, "--max_duration=9", "--save_interval=3", "--try_load_latest_save")
    assert trainer.state.step == 9 and same(weights(trainer), unbroken[1])
    assert metrics(folder) == metrics(unbroken[0])
    assert {p.name: p.stat().st_mtime_ns for p in folder.glob("step*")} == before


def test_every_epoch_has_an_order_of_its_own(plain: Path, tmp_path: Path) -> None:
    train(plain, tmp_path, "--max_duration=2ep")
    found = indices(tmp_path)
    for epoch in (0, 1):
        expected = order(11, epoch)[: 4 * BATCH].reshape(4, BATCH)
        assert [found[4 * epoch + i] for i in range(1, 5)] == [sorted(row) for row in expected.tolist()]
    assert found[1] != found[5]


def test_data_in_the_order_of_the_files(plain: Path, tmp_path: Path) -> None:
    train(plain, tmp_path, "--data_shuffling=false", "--max_duration=5")
    assert indices(tmp_path)[1] == indices(tmp_path)[5] == list(range(6))
    assert indices(tmp_path)[4] == list(range(18, 24))


def test_data_seed_decides_the_order_alone(plain: Path, tmp_path: Path) -> None:
    train(plain, tmp_path / "a", "--data.seed=5", "--stop_at=1")
    train(plain, tmp_path / "b", "--data.seed=5", "--stop_at=1", "--seed=12")
    expected = sorted(order(5, 0)[:BATCH].tolist())
    assert indices(tmp_path / "a")[1] == indices(tmp_path / "b")[1] == expected
    assert series(tmp_path / "a") != series(tmp_path / "b")  # other weights


def test_a_dry_run_leaves_the_folder_as_it_is(plain: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(plain, tmp_path / "new", "--dry_run", "--eval_on_load", "--no_pre_train_checkpoint=false")
    assert not (tmp_path / "new").exists()
    assert any("steps 1 to 7" in message for message in caplog.messages)  # and says what would be done
    train(plain, tmp_path / "old", "--stop_at=2", "--save_interval=1")
    before = metrics(tmp_path / "old")
    train(plain, tmp_path / "old", "--dry_run", "--save_overwrite")
    assert metrics(tmp_path / "old") == before


def test_a_run_that_fails_lets_go_of_its_log_file(plain: Path, tmp_path: Path) -> None:
    before = list(logging.getLogger("olmo").handlers)
    with pytest.raises(ValueError):
        train(plain, tmp_path, "--scheduler.name=constant", "--optimizer.learning_rate=1e37")
    assert logging.getLogger("olmo").handlers == before


def test_the_configuration_of_a_run_is_saved_and_repeats_it(plain: Path, tmp_path: Path) -> None:
    train(plain, tmp_path / "a", "--stop_at=2", "--optimizer.learning_rate=0.005")
    train(tmp_path / "a" / "config.yaml", tmp_path / "b")
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")


def test_tokens_beyond_the_vocabulary_are_named(plain: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"instance \d+ holds token 1\d\d, the model's vocabulary has 100: tokenizer and model"
    ):
        train(plain, tmp_path, "--model.vocab_size=100", "--model.embedding_size=100")


def test_a_row_that_overflows_is_an_error_before_anything_is_written(world: Path, tmp_path: Path) -> None:
    crowded = ("--global_train_batch_size=2", "--evaluators=[]")
    with pytest.raises(
        ValueError, match=r"injection round 1, row 0: \d+ tokens \(paraphrase/0, paraphrase/1\).* exceed the sequence"
    ):
        train(world, tmp_path / "run", *crowded)
    assert not (tmp_path / "run").exists()


def test_lion_and_adaptive_clipping_restart_to_the_same_bits(plain: Path, tmp_path: Path) -> None:
    asked = ("--optimizer.name=lionw", "--optimizer.learning_rate=1e-3", "--max_grad_norm_ratio=1.01")
    whole = train(plain, tmp_path / "whole", *asked)
    train(plain, tmp_path / "parts", *asked, "--stop_at=4", "--save_interval=4")
    parts = train(plain, tmp_path / "parts", *asked, "--try_load_latest_save", "--save_interval=4")
    assert same(weights(parts), weights(whole))
    other = train(plain, tmp_path / "other", *asked[:2])
    assert not same(weights(other), weights(whole))  # the ratio was at work


def test_a_large_order_lies_in_the_runs_folder(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(plain, tmp_path / "small")
    monkeypatch.setattr("olmo.data.order.LARGE", 10)
    train(plain, tmp_path / "large")
    assert indices(tmp_path / "small") == indices(tmp_path / "large")
    names = sorted(path.name for path in (tmp_path / "large/train_data").glob("*.npy"))
    assert names == ["global_indices_25_seed11.npy", "global_indices_25_seed12.npy"]
    assert not (tmp_path / "small/train_data").exists()
    # Nothing is read beyond the last step, so the order of another epoch is not made.
    train(plain, tmp_path / "epoch", "--max_duration=1ep", "--data.num_workers=2")
    names = [path.name for path in (tmp_path / "epoch/train_data").glob("*.npy")]
    assert names == ["global_indices_25_seed11.npy"]


def test_the_log_names_what_the_seed_varies_and_warns_if_that_is_nothing(
    plain: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Two seeds differ in their losses exactly if the log names something."""
    train(plain, tmp_path / "new", "--no_pre_train_checkpoint=false", "--save_interval_unsharded=1", "--stop_at=1")
    loaded = (f"--load_path={tmp_path / 'new' / 'step0-unsharded'}", "--reset_trainer_state", "--reset_optimizer_state")
    fixed = (*loaded, "--data_shuffling=false")
    cases = {
        (): "initial weights, order of the data",
        loaded: "order of the data",
        (*fixed, "--model.residual_dropout=0.1"): "dropout",
        (*loaded, "--data.seed=3"): None,
        fixed: None,
    }
    for number, (settings, varied) in enumerate(cases.items()):
        caplog.clear()
        runs = [tmp_path / f"{number}-{seed}" for seed in (1, 2)]
        for seed, run in enumerate(runs, start=1):
            train(plain, run, *settings, f"--seed={seed}", "--stop_at=2")
        assert (metrics(runs[0]) == metrics(runs[1])) == (varied is None), settings
        expected = (logging.INFO, f"seed 2 varies: {varied}")
        if varied is None:
            expected = (logging.WARNING, "seed: 2 changes nothing in this run: its weights are loaded")
        assert any(r.levelno == expected[0] and r.getMessage().startswith(expected[1]) for r in caplog.records)
