"""Learning rates, limits of clipping, temperatures and lengths, each against its definition written out."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import get_args

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from olmo import checkpoint
from olmo.config import OptimizerConfig, SchedulerConfig, SchedulerType, TrainConfig
from olmo.distributed import Ranks
from olmo.exceptions import ConfigurationError
from olmo.model import OLMo
from olmo.train import Trainer
from olmo.train import step as step_module
from olmo.train.schedule import clip_limit, learning_rate
from tests.running import (
    BATCH,
    CPU,
    SHORT,
    configure,
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
def plain(folder: Path) -> Path:
    """The configuration with neither: the least that trains."""
    return folder / "plain.yaml"


# --- learning rates ---


def expected_rate(name: str, step: int, *, peak: float, warmup: int, last: int, alpha: float, lowest: float) -> float:
    """The learning rate of a step in words: a ramp, and then the named curve down to alpha * peak."""
    if name == "max_scheduler":
        shared = {"peak": peak, "warmup": warmup, "last": last, "alpha": alpha, "lowest": lowest}
        return max(expected_rate(n, step, **shared) for n in ("cosine_with_warmup", "inverse_sqrt_with_warmup"))
    if name == "constant":
        return peak
    if step < warmup:
        share = step / warmup
        return (1 - share) * lowest + share * peak
    if name == "constant_with_warmup":
        return peak
    if name == "inverse_sqrt_with_warmup":
        return peak * (warmup / step) ** 0.5
    end = alpha * peak
    if step >= last:
        return end
    left = (last - step) / (last - warmup)  # 1 after the ramp, 0 at the end
    hill = (1 - math.cos(math.pi * left)) / 2
    curve = {
        "linear_with_warmup": left,
        "cosine_with_warmup": hill,
        "cosine_linear_envelope": hill * left,
    }[name]
    return end + (peak - end) * curve


@given(
    name=st.sampled_from(get_args(SchedulerType)),
    peak=st.floats(1e-6, 1.0),
    warmup=st.integers(1, 60),
    total=st.integers(1, 200),
    t_max=st.none() | st.integers(1, 200),
    alpha=st.floats(0, 1),
    in_scheduler=st.none() | st.floats(0, 1e-6),
    in_optimizer=st.none() | st.floats(0, 1e-6),
)
def test_schedules(name, peak, warmup, total, t_max, alpha, in_scheduler, in_optimizer) -> None:
    last = total if t_max is None else t_max
    assume(warmup < last)
    config = TrainConfig(
        optimizer=OptimizerConfig(learning_rate=peak, warmup_min_lr=in_optimizer),
        scheduler=SchedulerConfig(name, t_warmup=warmup, t_max=t_max, alpha_f=alpha, warmup_min_lr=in_scheduler),
    )
    given_lowest = [value for value in (in_scheduler, in_optimizer) if value is not None]
    lowest = given_lowest[0] if given_lowest else peak / 10
    for step in range(1, 211):
        wanted = expected_rate(name, step, peak=peak, warmup=warmup, last=last, alpha=alpha, lowest=lowest)
        assert learning_rate(config, step, total) == pytest.approx(wanted, rel=1e-9, abs=1e-15), step


def test_the_papers_schedule() -> None:
    """1600 steps to 4e-4, 80 of them warm-up, cosine to a tenth: the points one can compute by heart."""
    config = TrainConfig(
        optimizer=OptimizerConfig(learning_rate=4e-4),
        scheduler=SchedulerConfig("cosine_with_warmup", t_warmup=80, alpha_f=0.1),
    )
    rates = {step: learning_rate(config, step, 1600) for step in (40, 80, 80 + 760, 1600, 1601)}
    assert rates == pytest.approx({40: 2.2e-4, 80: 4e-4, 840: 2.2e-4, 1600: 4e-5, 1601: 4e-5})


@pytest.mark.parametrize("name", get_args(SchedulerType))
def test_no_warmup(name: SchedulerType) -> None:
    config = TrainConfig(
        optimizer=OptimizerConfig(learning_rate=1.0), scheduler=SchedulerConfig(name, t_warmup=0, alpha_f=0.0)
    )
    rates = [learning_rate(config, step, 10) for step in range(1, 12)]
    assert all(0 <= rate <= 1 for rate in rates)
    if name == "linear_with_warmup":
        assert rates == pytest.approx([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0, 0.0])


def test_tokens_are_just_another_unit() -> None:
    by_steps = TrainConfig(scheduler=SchedulerConfig(t_warmup=10))
    by_tokens = TrainConfig(scheduler=SchedulerConfig(t_warmup=10 * 512))
    for step in range(1, 60):
        assert learning_rate(by_tokens, step * 512, 50 * 512) == pytest.approx(learning_rate(by_steps, step, 50))


@pytest.mark.parametrize("name", get_args(SchedulerType))
def test_bolt_on_warm_up(name: SchedulerType) -> None:
    """From 0 where the run restarted, in a line, to where the schedule is when the warm-up ends; then the schedule."""
    config = TrainConfig(optimizer=OptimizerConfig(learning_rate=1e-2), scheduler=SchedulerConfig(name, t_warmup=10))
    end = learning_rate(config, 50, 100)
    assert learning_rate(config, 40, 100, restarted_at=40) == 0
    assert learning_rate(config, 43, 100, restarted_at=40) == pytest.approx(0.3 * end)
    for current in (50, 77, 100):
        assert learning_rate(config, current, 100, restarted_at=40) == learning_rate(config, current, 100)


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


def test_bolt_on_warm_up_in_tokens(plain: Path, tmp_path: Path) -> None:
    train(plain, tmp_path / "first", "--stop_at=2", "--save_interval=2")
    asked = (f"--load_path={tmp_path / 'first/step2'}", "--reset_optimizer_state")
    train(plain, tmp_path / "steps", *asked, "--scheduler.t_warmup=4")
    by_tokens = ("--scheduler.units=tokens", f"--scheduler.t_warmup={4 * BATCH * SHORT}")
    train(plain, tmp_path / "tokens", *asked, *by_tokens)
    rates = [series(tmp_path / name, "optim/learning_rate") for name in ("steps", "tokens")]
    assert rates[0] == pytest.approx(rates[1]) and rates[0][3] < rates[0][4] < rates[0][6]


def test_schedule_in_tokens_is_the_same_schedule(plain: Path, tmp_path: Path) -> None:
    train(plain, tmp_path / "steps")
    warm = 2 * BATCH * SHORT
    train(plain, tmp_path / "tokens", "--scheduler.units=tokens", f"--scheduler.t_warmup={warm}")
    steps, tokens = (series(tmp_path / name, "optim/learning_rate") for name in ("steps", "tokens"))
    assert tokens == pytest.approx(steps, rel=1e-12)  # the same fractions of other numbers, in float64


# --- limits of clipping ---


def test_limits_while_clipping_warms_up() -> None:
    scheduler = SchedulerConfig(grad_clip_warmup_steps=10, grad_clip_warmup_factor=5.0)
    config = TrainConfig(scheduler=scheduler)
    assert [clip_limit(config, 0.5, current) for current in (0, 10, 11, 1000)] == [2.5, 2.5, 0.5, 0.5]
    assert clip_limit(config, None, 3) is None
    for missing in ("grad_clip_warmup_steps", "grad_clip_warmup_factor"):
        assert clip_limit(TrainConfig(scheduler=dataclasses.replace(scheduler, **{missing: None})), 0.5, 3) == 0.5


def test_clipping_warms_up(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit of a step is set at the end of the one before; the first step has the plain one, as in OLMo."""
    limits = []
    real = step_module.clip_gradients

    def seen(model: OLMo, limit: float | None) -> torch.Tensor:
        limits.append(limit)
        return real(model, limit)

    monkeypatch.setattr(step_module, "clip_gradients", seen)
    asked = ("--max_grad_norm=0.5", "--scheduler.grad_clip_warmup_steps=3", "--scheduler.grad_clip_warmup_factor=4")
    train(plain, tmp_path / "steps", *asked)
    assert limits == [0.5, 2.0, 2.0, 2.0, 0.5, 0.5, 0.5]
    limits.clear()
    by_tokens = (*asked, "--scheduler.units=tokens", f"--scheduler.grad_clip_warmup_steps={3 * BATCH * SHORT}")
    train(plain, tmp_path / "tokens", *by_tokens)
    assert limits == [0.5, 2.0, 2.0, 2.0, 0.5, 0.5, 0.5]


def test_limits_of_ratios_and_of_the_first_step_after_a_reset(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = []
    real = step_module.clip_each_gradient

    def noted(optimizer: torch.optim.Optimizer, ratio: float) -> torch.Tensor:
        limits.append(ratio)
        return real(optimizer, ratio)

    monkeypatch.setattr(step_module, "clip_each_gradient", noted)
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


# --- temperatures ---


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


def test_temperatures_of_each_step(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """During step s of n the temperature is 1 + (T - 1)(1 - s / n), as published; a checkpoint keeps it."""
    seen = []
    real = step_module.clip_gradients

    def noted(model: OLMo, limit: float | None) -> torch.Tensor:
        temperature = model.blocks[0].attention_temperature
        seen.append(1.0 if temperature is None else float(temperature))
        return real(model, limit)

    monkeypatch.setattr(step_module, "clip_gradients", noted)
    train(plain, tmp_path, "--model.temperature_attention=8.0", "--save_interval=3")
    assert seen == pytest.approx([1 + 7 * (1 - step / 7) for step in range(1, 8)])
    kept = checkpoint.read_config(tmp_path / "step3")
    assert kept.temperature_attention == pytest.approx(5.0) and kept.temperature_decay is False


# --- how long ---


@pytest.mark.parametrize(
    ("duration", "steps"),
    [("3", 3), ("1ep", 4), ("1.5ep", 6), (f"{3 * BATCH * SHORT}T", 3), (f"{3 * BATCH * SHORT + 1}T", 4), ("1e3T", 6)],
)
def test_duration_in_steps_epochs_and_tokens(plain: Path, tmp_path: Path, duration: str, steps: int) -> None:
    trainer = Trainer(configure(plain, tmp_path, "--dry_run", f"--max_duration={duration}"), CPU, Ranks())
    assert trainer.schedule.max_steps == trainer.schedule.last_step == steps


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


def test_less_than_one_step_is_refused(plain: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"max_duration: 0\.1ep is less than one step"):
        train(plain, tmp_path, "--max_duration=0.1ep")
