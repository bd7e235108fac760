"""One optimizer step: its arithmetic against a loop written by hand, in transformers and plain torch."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from olmo import checkpoint
from olmo.config import TrainConfig
from olmo.data.sources import TokenFiles
from olmo.distributed import Ranks
from olmo.knowledge.injection import inject
from olmo.model import OLMo
from olmo.train import Trainer
from tests.reference import to_transformers
from tests.running import (
    BATCH,
    CPU,
    FILES,
    LENGTH,
    SHORT,
    checkpoints,
    configure,
    instances,
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


@pytest.mark.parametrize("masked", [False, True])
def test_the_published_divisor(plain: Path, tmp_path: Path, masked: bool) -> None:
    """The published trainer (kaistAI/Knowledge-Entropy, `train_batch`, as OLMo 0.3.0) takes the mean over the
    predictions of each micro-batch, and of those the mean; OLMo >= 0.4 divides the sum by the number of tokens."""
    found = {}
    for divisor in ("tokens", "predictions"):
        trainer = Trainer(configure(plain, tmp_path / divisor, f"--loss_divisor={divisor}"), CPU, Ranks())
        batch = trainer.loader.batch(0, 0)
        ids, mask = batch.input_ids, torch.ones_like(batch.input_ids, dtype=torch.bool)
        if masked:
            mask = torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < 0.5
            batch = replace(batch, label_mask=mask)
        theirs = to_transformers(trainer.model)
        theirs.model.embed_tokens.padding_idx = None  # OLMo trains the embedding of every token
        loss = torch.zeros(())
        for rows in torch.arange(BATCH).split(2):
            labels = ids[rows].masked_fill(~mask[rows], -100)[:, 1:]
            logits = theirs(ids[rows]).logits[:, :-1]
            loss = loss + F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100) / 3
        loss.backward()
        norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in theirs.parameters() if p.grad is not None))
        result = trainer.train_step.run(batch, 1, trainer.schedule.at(1))
        found[divisor] = result.loss.item(), result.gradient_norm.item()
        trainer.reporter.close()
    assert found["predictions"] == pytest.approx((loss.item(), norm), rel=1e-5)
    if not masked:
        ratios = np.divide(found["tokens"], found["predictions"])
        assert ratios == pytest.approx((SHORT - 1) / SHORT, rel=1e-5)  # 0.098 % for 1,024 tokens
    else:
        assert found["tokens"][0] < 0.6 * found["predictions"][0]


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


def test_bfloat16_changes_the_loss_a_little(plain: Path, tmp_path: Path) -> None:
    train(plain, tmp_path / "full", "--stop_at=2")
    train(plain, tmp_path / "half", "--stop_at=2", "--precision=amp_bf16")
    full, half = series(tmp_path / "full"), series(tmp_path / "half")
    assert half != full
    assert half == pytest.approx(full, rel=2**-7)  # bfloat16 has 8 significant bits


def test_a_large_seed_trains(plain: Path, tmp_path: Path) -> None:
    train(plain, tmp_path, *DROPOUT, "--seed=4294967295", "--stop_at=1")
    assert series(tmp_path).keys() == {1}


def test_dropout_differs_from_step_to_step_and_matters(plain: Path, tmp_path: Path) -> None:
    train(plain, tmp_path / "a", "--stop_at=2")
    train(plain, tmp_path / "b", *DROPOUT, "--stop_at=2")
    assert series(tmp_path / "a")[1] != series(tmp_path / "b")[1]
    # The same weights and the same rows would give the same masks twice if the seed forgot the step.
    config = configure(plain, tmp_path / "d", *DROPOUT)
    trainer = Trainer(config, CPU, Ranks())
    batch = trainer.loader.batch(0, 0)
    before, train_step = weights(trainer), trainer.train_step
    first = train_step.run(batch, 1, trainer.schedule.at(1)).loss.item()
    trainer.model.load_state_dict(before)
    second = train_step.run(batch, 2, trainer.schedule.at(2)).loss.item()
    trainer.model.load_state_dict(before)
    assert first != second and first == train_step.run(batch, 1, trainer.schedule.at(1)).loss.item()
    trainer.model.load_state_dict(before)
    train_step = replace(train_step, rank=1)  # nor may ranks drop the same of their rows
    assert first != train_step.run(batch, 1, trainer.schedule.at(1)).loss.item()
    trainer.reporter.close()


# --- masks and short rows ---


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


@pytest.mark.parametrize("side", ["right", "left"])
def test_short_rows_train_on_their_tokens_alone(plain: Path, tmp_path: Path, side: str) -> None:
    """The loss of a step over rows of 3 to 30 tokens is that of each row by itself, over n x T."""
    rng = np.random.default_rng(8)
    rows = [rng.integers(0, 128, length).tolist() for length in (30, 3, 17, 32, 1, 9)]
    datasets.Dataset.from_dict({"input_ids": rows}).save_to_disk(tmp_path / "data")
    data = ("--data.paths=null", f"--data.dataset_path={tmp_path / 'data'}", f"--data.pad_direction={side}")
    asked = (*data, "--data.pad_rows", "--stop_at=2", "--no_pre_train_checkpoint=false", "--save_interval_unsharded=1")
    train(plain, tmp_path / "run", *asked)
    start = checkpoint.load_model(tmp_path / "run/step0-unsharded", CPU)
    with torch.no_grad():
        each = [
            F.cross_entropy(start(torch.tensor([row]))[0, :-1], torch.tensor(row[1:]), reduction="sum")
            for row in rows
            if len(row) > 1
        ]
    assert series(tmp_path / "run")[1] == pytest.approx(sum(each).item() / (6 * 32), rel=1e-5)  # type: ignore[union-attr]
    assert series(tmp_path / "run", "data/padded_share")[1] == pytest.approx(1 - 92 / (6 * 32))


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


# --- a loss that is not finite ---


@pytest.mark.parametrize("console", [1, 100])
def test_a_loss_that_is_not_finite_ends_the_run_and_is_never_saved(plain: Path, tmp_path: Path, console: int) -> None:
    settings = ("--save_interval=1", f"--console_log_interval={console}", "--scheduler.name=constant")
    train(plain, tmp_path, *settings, "--stop_at=2")
    final = checkpoint.read_state(tmp_path / "step2")
    # Weights near the largest float: the step itself is finite, the next forward pass is not.
    resumed = ("--try_load_latest_save", "--allow_changed_settings")
    with pytest.raises(ValueError, match=r"loss nan at step 4; the checkpoints before it are intact"):
        train(plain, tmp_path, *settings, *resumed, "--optimizer.learning_rate=1e37")
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
