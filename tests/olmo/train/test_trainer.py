"""The Trainer: its arithmetic against a loop written by hand, restarts bit for bit, checkpoints, and its errors."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet
import pytest
import torch
import torch.nn.functional as F

from olmo import checkpoint
from olmo.checkpoint import fingerprint
from olmo.checkpoint import folder as saves
from olmo.config import TrainConfig, load
from olmo.data.sources import TokenFiles
from olmo.distributed import Ranks
from olmo.exceptions import ConfigurationError
from olmo.files.tensors import read_training_state
from olmo.knowledge.injection import inject
from olmo.memory.rescaling import Multipliers, rescale
from olmo.model import OLMo
from olmo.tokenizer import load_tokenizer
from olmo.train import Trainer
from olmo.train import trainer as train_module
from olmo.train.optim import learning_rate
from tests.reference import tiny_config, to_transformers
from tests.running import (
    BATCH,
    CPU,
    FILES,
    LENGTH,
    SHORT,
    checkpoints,
    configure,
    indices,
    instances,
    metrics,
    order,
    series,
    train,
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


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in trainer.model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two sets of weights are equal bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- one step, and several ---


def next_token_loss(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """As in OLMo: the sum over the T - 1 predictions of every row, divided by rows x T."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum") / ids.numel()


def by_hand(
    config: TrainConfig, model: OLMo, folder: Path, steps: int
) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """The same run in transformers and plain torch: losses, z-losses, and weights under transformers' names."""
    theirs = to_transformers(model).train()
    theirs.model.embed_tokens.padding_idx = None  # OLMo trains the embedding of every token
    named = dict(theirs.named_parameters())
    embedding = {name for name in named if "embed" in name or "lm_head" in name}
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for n, p in named.items() if n not in embedding], "weight_decay": 0.1},
            {"params": [p for n, p in named.items() if n in embedding], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
        eps=1e-8,
        foreach=False,
    )
    texts, losses, z_losses = instances(folder, SHORT), [], []
    for step in range(1, steps + 1):
        epoch, place = divmod(step - 1, 4)
        chosen = order(config.seed, epoch)[place * BATCH : (place + 1) * BATCH]
        ids = torch.from_numpy(texts[chosen])
        logits = theirs(ids).logits
        loss = next_token_loss(logits, ids)
        z_loss = 1e-4 * logits[:, :-1].logsumexp(-1).square().sum() / ids.numel()
        optimizer.zero_grad()
        (loss + (z_loss if config.softmax_auxiliary_loss else 0.0)).backward()
        norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in named.values() if p.grad is not None))
        for parameter in named.values():
            assert parameter.grad is not None
            parameter.grad *= min(1.0, 0.5 / (norm + 1e-6))
        peak, warm, last = 0.01, 2, 7
        rate = 0.1 * peak + 0.9 * peak * (1 + math.cos(math.pi * (step - warm) / (last - warm))) / 2
        if step < warm:
            rate = 0.1 * peak + 0.9 * peak * step / warm
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        losses.append(loss.item())
        z_losses.append(z_loss.item())
    return losses, z_losses, {name: p.detach() for name, p in named.items()}


@pytest.mark.parametrize("z_loss", ["false", "true"])
def test_five_steps_equal_transformers_and_plain_torch(plain: Path, tmp_path: Path, z_loss: str) -> None:
    overrides = ("--stop_at=5", f"--softmax_auxiliary_loss={z_loss}", "--device_train_microbatch_size=6")
    config = configure(plain, tmp_path, *overrides)
    trainer = Trainer(config, CPU, Ranks())
    losses, z_losses, expected = by_hand(config, trainer.model, plain.parent, 5)
    trainer.fit()
    # Both add float32 numbers, in another order: 1e-7 was seen. One embedding row without gradient makes it 1e-4.
    assert list(series(tmp_path).values()) == pytest.approx(losses, rel=1e-6)
    ours = {n: p.detach() for n, p in to_transformers(trainer.model).named_parameters()}
    for name, tensor in expected.items():
        # Adam divides by root second moments, so that rounding counts most where gradients are almost 0: 1.5e-6 was
        # seen after five updates of up to 0.01.
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=2e-5, msg=name)
    if z_loss == "true":
        assert list(series(tmp_path, "train/ZLoss").values()) == pytest.approx(z_losses, rel=1e-6)
    else:
        assert not series(tmp_path, "train/ZLoss")


def test_size_of_micro_batches_changes_no_more_than_rounding(plain: Path, tmp_path: Path) -> None:
    found = {}
    for size in (6, 4, 2, 1):  # 4 leaves a smaller last one
        folder = tmp_path / str(size)
        trainer = train(plain, folder, "--stop_at=3", f"--device_train_microbatch_size={size}")
        found[size] = series(folder), series(folder, "optim/total_grad_norm"), weights(trainer)
    for size in (4, 2, 1):
        for mine, whole in zip(found[size][:2], found[6][:2]):
            # Sums of the same float32 terms in another order; weights as above.
            assert mine == pytest.approx(whole, rel=1e-6)
        for name, tensor in found[6][2].items():
            torch.testing.assert_close(found[size][2][name], tensor, rtol=0, atol=2e-5, msg=name)


def test_compiled_training_gives_the_same_loss(plain: Path, tmp_path: Path) -> None:
    train(plain, tmp_path / "plain", "--stop_at=2")
    train(plain, tmp_path / "compiled", "--stop_at=2", "--compile.backend=eager")
    # The same kernels on the same numbers; `eager` only traces. Rounding alone is allowed.
    assert series(tmp_path / "compiled") == pytest.approx(series(tmp_path / "plain"), rel=1e-6)


def test_only_steps_that_log_or_save_reduce_and_read(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reduced: list[int] = []
    monkeypatch.setattr(Ranks, "sum_tensor", lambda self, value: reduced.append(len(value)) or value)
    train(plain, tmp_path, "--stop_at=7", "--console_log_interval=3", "--save_interval=5")
    assert list(series(tmp_path)) == [3, 6, 7]
    assert reduced == [2] * 5  # cross-entropy and z-loss, when steps 3, 6 and 7 log, and 5 and 7 save


def test_bfloat16_changes_the_loss_a_little(plain: Path, tmp_path: Path) -> None:
    train(plain, tmp_path / "full", "--stop_at=2")
    train(plain, tmp_path / "half", "--stop_at=2", "--precision=amp_bf16")
    full, half = series(tmp_path / "full"), series(tmp_path / "half")
    assert half != full
    assert half == pytest.approx(full, rel=2**-7)  # bfloat16 has 8 significant bits


def test_a_large_seed_trains(plain: Path, tmp_path: Path) -> None:
    train(plain, tmp_path, *DROPOUT, "--seed=4294967295", "--stop_at=1")
    assert series(tmp_path).keys() == {1}


# --- injected knowledge ---


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
    trainer.module.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    trainer.fit()
    assert len(seen) == 12  # 4 steps of 3 micro-batches
    for step in range(1, 5):
        batch = trainer.loader.batch(0, step - 1)
        expected = inject(batch, step, trainer.plan, BATCH)[0].input_ids
        assert torch.equal(torch.cat(seen[3 * step - 3 : 3 * step]), expected)
        changed = (expected != batch.input_ids).any(1).tolist()
        assert changed == ([True] * 4 + [False] * 2 if step % 2 == 0 else [False] * 6)


def test_injections_are_reported_whatever_the_log_interval(
    world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = train(world, tmp_path, "--evaluators=[]", "--console_log_interval=5")
    rounds = [len(texts) for texts in trainer.plan.rounds] if trainer.plan else []
    tokens = [sum(len(t.input_ids) for t in texts) for texts in trainer.plan.rounds] if trainer.plan else []
    assert series(tmp_path).keys() == {2, 4, 5, 6, 7}
    assert series(tmp_path, "injection/round") == {2: 1, 4: 2, 6: 3}
    assert series(tmp_path, "injection/texts") == dict(zip((2, 4, 6), rounds))
    assert series(tmp_path, "injection/tokens") == dict(zip((2, 4, 6), tokens))
    assert "step 4: injection round 2, 4 texts" in caplog.messages
    assert not any("step 4/7" in message for message in caplog.messages)  # the console keeps to its interval


def test_rounds_that_never_come_are_announced(world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(world, tmp_path, "--evaluators=[]", "--stop_at=5")
    assert "only 2 of 3 injection rounds fall within steps 1 to 5" in caplog.messages


def test_rounds_before_the_checkpoint_that_a_run_goes_on_from_are_announced(
    world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    train(world, before, "--evaluators=[]", "--stop_at=2", "--save_interval=1")
    on = ("--evaluators=[]", f"--load_path={before / 'step2'}", "--stop_at=6", "--save_interval=5")
    caplog.clear()
    train(world, after, *on)
    assert "only 2 of 3 injection rounds fall within steps 3 to 6" in caplog.messages
    shutil.rmtree(after / "step6")
    caplog.clear()
    train(world, after, *on, "--try_load_latest_save")  # what this run itself injected is not missing
    assert not any("injection rounds fall within" in message for message in caplog.messages)


# --- stop and start again ---


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


def test_dropout_differs_from_step_to_step_and_matters(plain: Path, tmp_path: Path) -> None:
    train(plain, tmp_path / "a", "--stop_at=2")
    train(plain, tmp_path / "b", *DROPOUT, "--stop_at=2")
    assert series(tmp_path / "a")[1] != series(tmp_path / "b")[1]
    # The same weights and the same rows would give the same masks twice if the seed forgot the step.
    config = configure(plain, tmp_path / "d", *DROPOUT)
    trainer = Trainer(config, CPU, Ranks())
    batch = trainer.loader.batch(0, 0)
    before = weights(trainer)
    first = trainer._train_step(batch, 1, 7)[0][0].item()
    trainer.model.load_state_dict(before)
    second = trainer._train_step(batch, 2, 7)[0][0].item()
    trainer.model.load_state_dict(before)
    assert first != second and first == trainer._train_step(batch, 1, 7)[0][0].item()
    trainer.model.load_state_dict(before)
    trainer.ranks = Ranks(rank=1)  # nor may ranks drop the same of their rows
    assert first != trainer._train_step(batch, 1, 7)[0][0].item()
    trainer.reporter.close()


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


def test_restore_dataloader_false_starts_the_epoch_again(plain: Path, tmp_path: Path) -> None:
    settings = ("--save_interval=2", "--max_duration=3")
    train(plain, tmp_path, *settings, "--stop_after=2")
    train(plain, tmp_path, *settings, "--try_load_latest_save", "--restore_dataloader=false")
    assert indices(tmp_path)[3] == indices(tmp_path)[1]


# --- how long ---


@pytest.mark.parametrize(
    ("duration", "steps"),
    [("3", 3), ("1ep", 4), ("1.5ep", 6), (f"{3 * BATCH * SHORT}T", 3), (f"{3 * BATCH * SHORT + 1}T", 4), ("1e3T", 6)],
)
def test_duration_in_steps_epochs_and_tokens(plain: Path, tmp_path: Path, duration: str, steps: int) -> None:
    trainer = Trainer(configure(plain, tmp_path, "--dry_run", f"--max_duration={duration}"), CPU, Ranks())
    assert trainer.max_steps == trainer.last_step == steps


def test_duration_in_tokens_counts_what_was_seen_before_a_restart(plain: Path, tmp_path: Path) -> None:
    settings = (f"--max_duration={3 * BATCH * SHORT}T", "--save_interval=100")
    train(plain, tmp_path, *settings, "--stop_after=2")
    trainer = train(plain, tmp_path, *settings, "--try_load_latest_save")
    assert trainer.state.step == 3 and series(tmp_path).keys() == {1, 2, 3}


def test_stop_at_and_stop_after_leave_the_schedule_alone(plain: Path, tmp_path: Path) -> None:
    train(plain, tmp_path / "whole")
    train(plain, tmp_path / "at", "--stop_at=3")
    train(plain, tmp_path / "after", "--stop_after=3", "--stop_at=5")
    rates = series(tmp_path / "whole", "optim/learning_rate")
    for name in ("at", "after"):
        assert series(tmp_path / name, "optim/learning_rate") == {step: rates[step] for step in (1, 2, 3)}


def test_schedule_in_tokens_is_the_same_schedule(plain: Path, tmp_path: Path) -> None:
    train(plain, tmp_path / "steps")
    warm = 2 * BATCH * SHORT
    train(plain, tmp_path / "tokens", "--scheduler.units=tokens", f"--scheduler.t_warmup={warm}")
    steps, tokens = (series(tmp_path / name, "optim/learning_rate") for name in ("steps", "tokens"))
    assert tokens == pytest.approx(steps, rel=1e-12)  # the same fractions of other numbers, in float64


# --- checkpoints ---


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("--no_pre_train_checkpoint=false", "--save_interval=3"), "step0 step3 step6 step7"),
        (("--save_interval=3",), "step3 step6 step7"),
        (("--save_interval=3", "--save_num_checkpoints_to_keep=1"), "step7"),
        (("--save_interval=3", "--save_num_checkpoints_to_keep=0"), "step7"),  # never none
        (("--save_interval=3", "--save_num_checkpoints_to_keep=2"), "step6 step7"),
        (("--save_interval_unsharded=4",), "step4-unsharded step7-unsharded"),
        (("--save_interval_unsharded=2", "--save_num_unsharded_checkpoints_to_keep=1"), "step7-unsharded"),
        (("--save_steps_unsharded=[2,5]",), "step2-unsharded step5-unsharded"),
        (("--save_steps_unsharded=[0,2]", "--no_pre_train_checkpoint=false"), "step0-unsharded step2-unsharded"),
        (("--force_save_unsharded",), "step7-unsharded"),
        (
            ("--save_interval=3", "--save_num_checkpoints_to_keep=1", "--save_interval_unsharded=6"),
            "step7 step6-unsharded step7-unsharded",
        ),
        (("--save_interval=3", "--save_interval_unsharded=3", "--dry_run", "--no_pre_train_checkpoint=false"), ""),
        ((), ""),
    ],
)  # fmt: skip
def test_which_checkpoints_a_run_leaves(plain: Path, tmp_path: Path, overrides: tuple[str, ...], expected: str) -> None:
    train(plain, tmp_path / "run", *overrides)
    assert checkpoints(tmp_path / "run") == set(expected.split())


def test_a_restart_still_counts_the_checkpoints_to_keep(plain: Path, tmp_path: Path) -> None:
    settings = ("--save_interval=2", "--save_num_checkpoints_to_keep=2", "--save_steps_unsharded=[1]")
    train(plain, tmp_path, *settings, "--stop_after=4")
    assert checkpoints(tmp_path) == {"step2", "step4", "step1-unsharded"}
    train(plain, tmp_path, *settings, "--try_load_latest_save")
    assert checkpoints(tmp_path) == {"step6", "step7", "step1-unsharded"}


def test_a_checkpoint_holds_the_weights_of_its_step_and_the_position(plain: Path, tmp_path: Path) -> None:
    trainer = train(plain, tmp_path, "--save_interval=5")
    assert same(weights(trainer), checkpoint.read_state(tmp_path / "step7"))
    state = read_training_state(tmp_path / "step5", "train")
    assert state == {
        "epoch": 1,
        "global_step": 5,
        "global_train_examples_seen_this_epoch": BATCH,
        "global_train_tokens_seen": 5 * BATCH * SHORT,
        "world_size": 1,
        "restarted_at": None,
        "checkpoints": [],
        "unsharded_checkpoints": [],
        "ephemeral_checkpoints": [],
    }


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
        ValueError, match=rf"{name}: damaged, or .* a run with load_path: .*/step3-unsharded and {key} goes on"
    ):
        Trainer(configure(plain, tmp_path / "a", "--try_load_latest_save"), CPU, Ranks())
    train(plain, tmp_path / "b", f"--load_path={broken}", f"--{key}", "--stop_at=4")
    assert series(tmp_path / "b")


def test_files_of_a_run_have_the_modes_that_the_umask_gives(plain: Path, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        train(plain, tmp_path / "run", "--save_interval=1", "--save_interval_unsharded=1", "--stop_at=1")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert {"model.safetensors", "__0_0.distcp"} <= modes.keys()
    assert set(modes.values()) == {0o640}, modes


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


def test_a_run_without_checkpoint_cannot_go_on_and_says_so(plain: Path, tmp_path: Path) -> None:
    train(plain, tmp_path, "--stop_at=1")
    with pytest.raises(ConfigurationError, match=r"holds a run without a checkpoint to go on from; add --save_over"):
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


def test_a_dry_run_leaves_the_folder_as_it_is(plain: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(plain, tmp_path / "new", "--dry_run", "--eval_on_load", "--no_pre_train_checkpoint=false")
    assert not (tmp_path / "new").exists()
    assert any("steps 1 to 7" in message for message in caplog.messages)  # and says what would be done
    train(plain, tmp_path / "old", "--stop_at=2", "--save_interval=1")
    before = metrics(tmp_path / "old")
    train(plain, tmp_path / "old", "--dry_run", "--save_overwrite")
    assert metrics(tmp_path / "old") == before


# --- resuscitation ---


@pytest.fixture(scope="module")
def edited(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A checkpoint and an edit of it, as multiplier file and as full state dict."""
    folder = tmp_path_factory.mktemp("edited")
    train(plain, folder, "--save_interval=3", "--stop_at=3")
    state = checkpoint.read_state(folder / "step3")
    factors = 1 + 4 * torch.rand(2, 48, generator=torch.Generator().manual_seed(4)).round()
    Multipliers(factors, factors != 1, {"checkpoint_fingerprint": fingerprint(state)}).save(folder / "edit.safetensors")
    edit = rescale(state, factors)
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
        Trainer(configure(plain, tmp_path, "--model.resuscitation=edit.pt"), CPU, Ranks())


# --- a loss that is not finite ---


@pytest.mark.parametrize("console", [1, 100])
def test_a_loss_that_is_not_finite_ends_the_run_and_is_never_saved(plain: Path, tmp_path: Path, console: int) -> None:
    settings = ("--save_interval=1", f"--console_log_interval={console}", "--scheduler.name=constant")
    train(plain, tmp_path, *settings, "--stop_at=2")
    final = checkpoint.read_state(tmp_path / "step2")
    # Weights near the largest float: the step itself is finite, the next forward pass is not.
    with pytest.raises(ValueError, match=r"loss nan at step 4; the checkpoints before it are intact"):
        train(plain, tmp_path, *settings, "--try_load_latest_save", "--optimizer.learning_rate=1e37")
    assert checkpoints(tmp_path) == {"step1", "step2", "step3"}
    assert same(final, checkpoint.read_state(tmp_path / "step2"))
    assert all(tensor.isfinite().all() for tensor in checkpoint.read_state(tmp_path / "step3").values())
    assert all(math.isfinite(loss) for loss in series(tmp_path).values())


def test_a_gradient_that_is_not_finite_ends_the_run(plain: Path, tmp_path: Path) -> None:
    trainer = Trainer(configure(plain, tmp_path, "--save_interval=2"), CPU, Ranks())
    weight = trainer.model.blocks[0].ff_out.weight
    steps = []

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        steps.append(0)
        return gradient * math.inf if len(steps) > 3 else gradient  # from the second step on: 3 micro-batches each

    weight.register_hook(spoil)
    with pytest.raises(ValueError, match=r"gradient norm (nan|inf) at step 2"):
        trainer.fit()
    assert checkpoints(tmp_path) == set() and series(tmp_path).keys() == {1}


def test_a_run_that_fails_lets_go_of_its_log_file(plain: Path, tmp_path: Path) -> None:
    before = list(logging.getLogger("olmo").handlers)
    with pytest.raises(ValueError):
        train(plain, tmp_path, "--scheduler.name=constant", "--optimizer.learning_rate=1e37")
    assert logging.getLogger("olmo").handlers == before


# --- what a run tells ---


def test_metrics_are_one_object_a_line(world: Path, tmp_path: Path) -> None:
    train(world, tmp_path, "--eval_on_load", "--stop_at=3")
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    kinds = [(line["step"], "eval/K" in line) for line in lines]
    assert kinds == [(0, True), (1, False), (2, False), (3, False), (3, True)]
    assert all(isinstance(value, (int, float)) for line in lines for value in line.values())
    for line in lines[1:4]:
        step, loss = line["step"], line["train/CrossEntropyLoss"]
        assert line["train/Perplexity"] == pytest.approx(math.exp(loss))
        assert line["throughput/total_tokens"] == step * BATCH * LENGTH
        assert line["optim/total_grad_norm"] > 0
        # There is no speed before the first step has ended.
        speed = line.get("throughput/device/tokens_per_second")
        assert speed is None if step == 1 else speed > 0
        if step > 1:
            assert speed == pytest.approx(line["throughput/device/batches_per_second"] * BATCH * LENGTH)
    assert json.loads((tmp_path / "environment.json").read_text())["versions"]["torch"] == torch.__version__
    log = (tmp_path / "train.log").read_text()
    assert "step 2/3: loss" in log and "steps 1 to 3, 1,536 tokens a step" in log
    assert "step 3/3: loss" in log and "eval/K = -" in log


def test_the_configuration_of_a_run_is_saved_and_repeats_it(plain: Path, tmp_path: Path) -> None:
    train(plain, tmp_path / "a", "--stop_at=2", "--optimizer.learning_rate=0.005")
    train(tmp_path / "a" / "config.yaml", tmp_path / "b")
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")


def test_wandb_gets_the_metrics(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[tuple[int, dict[str, float]]] = []

    class Fake:
        id = "abc"

        def init(self, **settings: Any) -> Fake:
            assert settings["project"] == "demo" and settings["name"] == "tiny" and settings["dir"] == str(tmp_path)
            json.dumps(settings["config"])
            return self

        def log(self, values: dict[str, float], step: int) -> None:
            logged.append((step, values))

        def finish(self) -> None:
            logged.append((-1, {}))

    monkeypatch.setitem(__import__("sys").modules, "wandb", Fake())
    train(plain, tmp_path, "--wandb.project=demo", "--wandb.log_interval=2", "--stop_at=4")
    assert [step for step, _ in logged] == [2, 4, -1]
    assert logged[0][1]["train/CrossEntropyLoss"] == series(tmp_path)[2]


def test_wandb_that_cannot_start_says_what_helps(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Fake:
        class Error(Exception):
            pass

        def init(self, **_: Any) -> None:
            raise self.Error("Timed out while retrying\nConsider this\nor that")

    monkeypatch.setitem(__import__("sys").modules, "wandb", Fake())
    said = r"^wandb: Timed out while retrying \(wandb login .* WANDB_MODE=offline .*\)$"
    with pytest.raises(ConfigurationError, match=said):
        Trainer(configure(plain, tmp_path, "--wandb.project=demo"), CPU, Ranks())


def test_wandb_that_is_not_installed_is_named(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(ConfigurationError, match=r"wandb: is configured but not installed; pip install wandb"):
        Trainer(configure(plain, tmp_path, "--wandb.project=demo"), CPU, Ranks())


def test_a_start_that_fails_does_not_stand_in_the_way_of_the_next(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setitem(__import__("sys").modules, "wandb", None)
        with pytest.raises(ConfigurationError, match="not installed"):
            train(plain, run, "--wandb.project=demo")
    with pytest.raises(ValueError, match="holds token"):  # in the first batch
        train(plain, run, "--model.vocab_size=2", "--model.embedding_size=2", "--stop_at=1")
    train(plain, run, "--stop_at=1")
    assert series(run).keys() == indices(run).keys() == {1}
    # Nor is an older run gone before the new one has begun.
    before = metrics(run)
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(ConfigurationError, match="not installed"):
        train(plain, run, "--wandb.project=demo", "--save_overwrite")
    assert metrics(run) == before


def test_wandb_offline(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="pip install wandb to run its test")
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb-home"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    train(plain, tmp_path / "run", "--wandb.project=demo", "--stop_at=2")
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))


# --- what cannot be trained ---


def test_tokens_beyond_the_vocabulary_are_named(plain: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"instance \d+ holds token 1\d\d, the model knows 100: tokenizer and model"):
        train(plain, tmp_path, "--model.vocab_size=100", "--model.embedding_size=100")


def test_a_row_that_overflows_is_an_error_before_anything_is_written(world: Path, tmp_path: Path) -> None:
    crowded = ("--global_train_batch_size=2", "--evaluators=[]")
    with pytest.raises(ValueError, match=r"injection round 1, row 0: \d+ tokens \(paraphrase/0, paraphrase/1\) exceed"):
        train(world, tmp_path / "run", *crowded)
    assert not (tmp_path / "run").exists()


# --- what an older run, or another model, left ---


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
    with pytest.raises(ConfigurationError, match="lies in save_folder, which save_overwrite clears"):
        train(plain, run, f"--load_path={run / 'step2'}", "--save_overwrite")
    assert (run / "step2" / "train.pt").is_file()


def test_another_batch_size_in_the_middle_of_an_epoch_is_refused(plain: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(plain, run, "--save_interval=3", "--stop_at=3")
    with pytest.raises(ConfigurationError, match="global_train_batch_size: 18 instances of this epoch are done"):
        train(plain, run, "--try_load_latest_save", "--global_train_batch_size=4")


def test_a_model_that_would_compute_something_else_is_refused(plain: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(plain, run, "--save_interval=1", "--stop_at=1")
    reset = ("--reset_optimizer_state", "--reset_trainer_state", f"--load_path={run / 'step1'}")
    for key, value in (("n_heads", "2"), ("rope_theta", "500"), ("clip_qkv", "1.0"), ("layer_norm_eps", "0.1")):
        with pytest.raises(ConfigurationError, match=rf"model\.{key}: .* but the checkpoint .* was made with"):
            train(plain, tmp_path / "other", *reset, f"--model.{key}={value}")


def test_a_checkpoint_is_not_resuscitated_again_by_its_own_config(plain: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    trainer = train(plain, run, "--save_interval=1", "--stop_at=1")
    path = run / "step1" / "config.yaml"
    path.write_text(path.read_text().replace("resuscitation: null", "resuscitation: gone.pt"))
    assert same(checkpoint.load_model(run / "step1", CPU).state_dict(), weights(trainer))


# --- OLMo's optimizer settings, end to end ---------------------------------------------------------------------------


def test_lion_and_adaptive_clipping_restart_to_the_same_bits(plain: Path, tmp_path: Path) -> None:
    asked = ("--optimizer.name=lionw", "--optimizer.learning_rate=1e-3", "--max_grad_norm_ratio=1.01")
    whole = train(plain, tmp_path / "whole", *asked)
    train(plain, tmp_path / "parts", *asked, "--stop_at=4", "--save_interval=4")
    parts = train(plain, tmp_path / "parts", *asked, "--try_load_latest_save", "--save_interval=4")
    assert same(weights(parts), weights(whole))
    other = train(plain, tmp_path / "other", *asked[:2])
    assert not same(weights(other), weights(whole))  # the ratio was at work


def test_clipping_warms_up(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit of a step is set at the end of the one before; the first step has the plain one, as in OLMo."""
    limits = []
    real = train_module.clip_gradients

    def seen(model: OLMo, limit: float | None) -> torch.Tensor:
        limits.append(limit)
        return real(model, limit)

    monkeypatch.setattr(train_module, "clip_gradients", seen)
    asked = ("--max_grad_norm=0.5", "--scheduler.grad_clip_warmup_steps=3", "--scheduler.grad_clip_warmup_factor=4")
    train(plain, tmp_path / "steps", *asked)
    assert limits == [0.5, 2.0, 2.0, 2.0, 0.5, 0.5, 0.5]
    limits.clear()
    by_tokens = (*asked, "--scheduler.units=tokens", f"--scheduler.grad_clip_warmup_steps={3 * BATCH * SHORT}")
    train(plain, tmp_path / "tokens", *by_tokens)
    assert limits == [0.5, 2.0, 2.0, 2.0, 0.5, 0.5, 0.5]


def test_bolt_on_warm_up_where_only_the_optimizer_is_reset(plain: Path, tmp_path: Path) -> None:
    train(plain, tmp_path / "first", "--stop_at=2", "--save_interval=2")
    asked = (f"--load_path={tmp_path / 'first/step2'}", "--reset_optimizer_state", "--scheduler.t_warmup=4")
    trainer = train(plain, tmp_path / "second", *asked)
    rates = series(tmp_path / "second", "optim/learning_rate")
    config = trainer.config
    end = learning_rate(config, 6, 7)
    assert [rates[step] for step in (3, 4, 5, 6)] == pytest.approx([end / 4, end / 2, end * 3 / 4, end])
    assert rates[7] == learning_rate(config, 7, 7)
    # Stopped within the warm-up and gone on: it still knows where it began.
    train(plain, tmp_path / "third", *asked, "--stop_at=4", "--save_interval=4")
    train(plain, tmp_path / "third", *asked, "--try_load_latest_save", "--save_interval=4")
    assert series(tmp_path / "third", "optim/learning_rate") == rates
    both = train(plain, tmp_path / "fourth", *asked, "--reset_trainer_state")
    assert series(tmp_path / "fourth", "optim/learning_rate")[1] == learning_rate(both.config, 1, 7)


def test_temperatures_decay_over_the_run(plain: Path, tmp_path: Path) -> None:
    train(plain, tmp_path / "start", "--stop_at=1", "--save_interval=1", "--max_duration=1")
    load_path = f"--load_path={tmp_path / 'start/step1'}"
    fresh = (load_path, "--reset_optimizer_state", "--reset_trainer_state")
    asked = (*fresh, "--model.temperature_attention=8.0", "--save_interval=3")
    whole = train(plain, tmp_path / "whole", *asked)
    kept = [checkpoint.read_config(tmp_path / f"whole/step{step}").temperature_attention for step in (3, 6, 7)]
    assert kept == [pytest.approx(1 + 7 * 4 / 7), pytest.approx(1 + 7 * 1 / 7), None]
    train(plain, tmp_path / "parts", *asked, "--stop_at=3")
    parts = train(plain, tmp_path / "parts", *asked, "--try_load_latest_save")
    assert same(weights(parts), weights(whole))
    assert not same(weights(train(plain, tmp_path / "without", *fresh)), weights(whole))
    constant = train(plain, tmp_path / "constant", *asked, "--model.temperature_decay=false")
    assert checkpoint.read_config(tmp_path / "constant/step7").temperature_attention == 8.0
    assert not same(weights(constant), weights(whole))


def test_new_weights_made_on_meta(plain: Path, tmp_path: Path) -> None:
    trainer = train(plain, tmp_path, "--model.init_device=meta", "--model.init_fn=normal", "--stop_at=1")
    assert all(p.device.type == "cpu" and p.isfinite().all() for p in trainer.model.parameters())
    assert math.isfinite(series(tmp_path)[1])


def test_instances_that_repeat_themselves_are_left_out_of_the_loss(plain: Path, tmp_path: Path) -> None:
    rows = np.random.default_rng(0).integers(0, 128, (BATCH, SHORT))
    rows[1:4, 3:13] = 5
    rows.astype("<u2").tofile(tmp_path / "tokens.npy")
    asked = (f"--data.paths=[{tmp_path / 'tokens.npy'}]", "--max_duration=1", "--save_interval=1")
    asked = (*asked, "--no_pre_train_checkpoint=false")
    trainer = train(plain, tmp_path / "run", *asked, "--data.instance_filter={repetition_max_count: 8}")
    start = checkpoint.load_model(tmp_path / "run/step0", torch.device("cpu"))
    kept = torch.from_numpy(rows[[0, 4, 5]])
    with torch.no_grad():
        logits = start(kept)[:, :-1]
    expected = F.cross_entropy(logits.flatten(0, 1), kept[:, 1:].flatten(), reduction="sum") / rows.size
    assert series(tmp_path / "run")[1] == pytest.approx(expected.item(), rel=1e-5)
    assert not same(weights(trainer), weights(train(plain, tmp_path / "all", *asked)))


def test_what_is_injected_counts_in_an_instance_that_repeats_itself(world: Path, tmp_path: Path) -> None:
    """Also in what inspect_data shows: nothing of these rows counts but the texts in front of them."""
    np.full(BATCH * LENGTH, 5, dtype="<u2").tofile(tmp_path / "tokens.npy")
    asked = (f"--data.paths=[{tmp_path / 'tokens.npy'}]", "--data.instance_filter={}", "--evaluators=[]")
    trainer = Trainer(configure(world, tmp_path / "run", *asked, "--max_duration=2"), CPU, Ranks())
    injected, entered = inject(trainer.loader.batch(0, 0), 2, trainer.plan, BATCH)
    assert injected.label_mask is not None and len(entered) == 4
    lengths = [len(text.input_ids) for _, text in entered] + [0, 0]
    assert injected.label_mask.sum(1).tolist() == lengths
    assert all(row[:length].all() for row, length in zip(injected.label_mask, lengths))
    trainer.fit()
    assert series(tmp_path / "run")[1] == 0 and series(tmp_path / "run")[2] > 0


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


@pytest.mark.parametrize("side", ["right", "left"])
def test_short_rows_train_on_their_tokens_alone(plain: Path, tmp_path: Path, side: str) -> None:
    """The loss of a step over rows of 3 to 30 tokens is that of each row by itself, over n x T."""
    rng = np.random.default_rng(8)
    rows = [rng.integers(0, 128, length).tolist() for length in (30, 3, 17, 32, 1, 9)]
    datasets.Dataset.from_dict({"input_ids": rows}).save_to_disk(tmp_path / "data")
    data = ("--data.paths=null", f"--data.dataset_path={tmp_path / 'data'}", f"--data.pad_direction={side}")
    asked = (*data, "--stop_at=2", "--no_pre_train_checkpoint=false", "--save_interval_unsharded=1")
    train(plain, tmp_path / "run", *asked)
    start = checkpoint.load_model(tmp_path / "run/step0-unsharded", CPU)
    with torch.no_grad():
        each = [
            F.cross_entropy(start(torch.tensor([row]))[0, :-1], torch.tensor(row[1:]), reduction="sum")
            for row in rows
            if len(row) > 1
        ]
    assert series(tmp_path / "run")[1] == pytest.approx(sum(each).item() / (6 * 32), rel=1e-5)  # type: ignore[union-attr]


def test_label_masks_of_a_run(plain: Path, tmp_path: Path) -> None:
    """One token in three counts: the loss is the sum over those, and the others do not train anything."""
    source = TokenFiles([plain.parent / f"{name}{SHORT}.npy" for name in FILES], SHORT)
    masks = []
    for name, count in FILES.items():
        mask = np.random.default_rng(count).random(count * SHORT + 7) < 1 / 3
        mask.tofile(tmp_path / f"{name}.npy")
        masks.append(mask[: count * SHORT].reshape(count, SHORT))
    paths = f"--data.label_mask_paths=[{', '.join(str(tmp_path / f'{name}.npy') for name in FILES)}]"
    asked = (paths, "--stop_at=1", "--no_pre_train_checkpoint=false", "--save_interval_unsharded=1")
    train(plain, tmp_path / "run", *asked)
    first = order(11, 0)[:BATCH]
    ids, counted = torch.from_numpy(source.read(first)), torch.from_numpy(np.concatenate(masks)[first])
    with torch.no_grad():
        logits = checkpoint.load_model(tmp_path / "run/step0-unsharded", CPU)(ids)
    each = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(BATCH, -1)
    expected = each[counted[:, 1:]].sum() / ids.numel()
    assert series(tmp_path / "run")[1] == pytest.approx(expected.item(), rel=1e-5)


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


def test_temperatures_of_each_step(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """During step s of n the temperature is 1 + (T - 1)(1 - s / n), as published; a checkpoint keeps it."""
    seen = []
    real = train_module.clip_gradients

    def noted(model: OLMo, limit: float | None) -> torch.Tensor:
        temperature = model.blocks[0].attention_temperature
        seen.append(1.0 if temperature is None else float(temperature))
        return real(model, limit)

    monkeypatch.setattr(train_module, "clip_gradients", noted)
    train(plain, tmp_path, "--model.temperature_attention=8.0", "--save_interval=3")
    assert seen == pytest.approx([1 + 7 * (1 - step / 7) for step in range(1, 8)])
    kept = checkpoint.read_config(tmp_path / "step3")
    assert kept.temperature_attention == pytest.approx(5.0) and kept.temperature_decay is False


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
    assert not [message for message in caplog.messages if "all the same" in message]
    train(plain, tmp_path / "parts", "--max_duration=8", "--try_load_latest_save")
    warned = r"load_path, reset_optimizer_state, reset_trainer_state, model\.temperature_MLP, max_duration; it goes on"
    assert len([message for message in caplog.messages if re.search(warned, message)]) == 1


def test_limits_of_ratios_and_of_the_first_step_after_a_reset(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = []
    real = train_module.clip_each_gradient

    def noted(optimizer: torch.optim.Optimizer, ratio: float) -> torch.Tensor:
        limits.append(ratio)
        return real(optimizer, ratio)

    monkeypatch.setattr(train_module, "clip_each_gradient", noted)
    asked = (
        "--max_grad_norm_ratio=1.5",
        "--scheduler.grad_clip_warmup_steps=4",
        "--scheduler.grad_clip_warmup_factor=2",
    )
    train(plain, tmp_path / "first", *asked, "--stop_at=3", "--save_interval=3")
    assert limits == [1.5, 3.0, 3.0]
    limits.clear()
    # A new optimizer in mid-run begins with the plain limit, as OLMo's does.
    train(plain, tmp_path / "second", *asked, f"--load_path={tmp_path / 'first/step3'}", "--reset_optimizer_state")
    assert limits == [1.5, 3.0, 1.5, 1.5]


def test_bolt_on_warm_up_in_tokens(plain: Path, tmp_path: Path) -> None:
    train(plain, tmp_path / "first", "--stop_at=2", "--save_interval=2")
    asked = (f"--load_path={tmp_path / 'first/step2'}", "--reset_optimizer_state")
    train(plain, tmp_path / "steps", *asked, "--scheduler.t_warmup=4")
    by_tokens = ("--scheduler.units=tokens", f"--scheduler.t_warmup={4 * BATCH * SHORT}")
    train(plain, tmp_path / "tokens", *asked, *by_tokens)
    rates = [series(tmp_path / name, "optim/learning_rate") for name in ("steps", "tokens")]
    assert rates[0] == pytest.approx(rates[1]) and rates[0][3] < rates[0][4] < rates[0][6]


@pytest.mark.parametrize(
    "saved", [{}, {"global_step": "a"}, {"global_step": -5}, [1], {"global_step": 1, "epoch": "x"}]
)
def test_a_trainers_state_that_is_none_is_named(plain: Path, tmp_path: Path, saved: Any) -> None:
    train(plain, tmp_path / "first", "--stop_at=2", "--save_interval=2")
    torch.save(saved, tmp_path / "first/step2/train.pt")
    (tmp_path / "first/step2/manifest.json").unlink()
    with pytest.raises(ValueError, match=r"its training state .*; set reset_trainer_state"):
        train(plain, tmp_path / "second", f"--load_path={tmp_path / 'first/step2'}")


def test_trained_weights_are_not_the_files(plain: Path, tmp_path: Path) -> None:
    train(plain, tmp_path / "first", "--stop_at=1", "--save_interval=1")
    trainer = train(plain, tmp_path / "second", f"--load_path={tmp_path / 'first/step1'}", "--dry_run")
    assert all(p.data_ptr() % 64 == 0 for p in trainer.model.parameters())  # torch's own alignment
    maps = Path("/proc/self/maps")
    assert not maps.exists() or "first/step1/model.safetensors" not in maps.read_text(encoding="utf-8")


def test_less_than_one_step_is_refused(plain: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"max_duration: 0\.1ep is less than one step"):
        train(plain, tmp_path, "--max_duration=0.1ep")
