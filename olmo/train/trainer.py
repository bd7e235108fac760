"""The Trainer: order -> loader -> inject -> forward, loss, backward -> optimizer -> metrics; now and then evaluate."""

from __future__ import annotations

import json
import math
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import checkpoint
from ..checkpoint import folder as saves
from ..checkpoint import sharded
from ..checkpoint.manifest import is_ephemeral
from ..checkpoint.remote_saves import RemoteSaves
from ..config.schema import EvaluatorConfig, TrainConfig
from ..console import clock
from ..data.loader import Batch, run_loader
from ..distributed import Ranks, to_device
from ..eval.evaluators import Evaluators
from ..exceptions import ConfigurationError
from ..files.tensors import read_training_state
from ..knowledge.build import plan_from_config
from ..knowledge.injection import inject
from ..knowledge.plan import Text
from ..memory.temperature import Temperatures
from ..model import OLMo
from ..report.reporter import Reporter, log
from ..report.run_folder import append_indices
from ..tokenizer import encode, run_tokenizer
from .layer_runner import layer_runner
from .loss import Objective, loss_function, predictions
from .optim import build_optimizer, clip_each_gradient, clip_gradients, clip_limit, learning_rate
from .parallel import distribute, gathered_model, gradient_sync, is_sharded
from .stopping import Signals, Tags, Watch
from .throughput import peak_memory, peak_operations, training_operations

CPU = torch.device("cpu")


@dataclass
class TrainState:
    """All that a restart needs beside weights and optimizer. Dropout is seeded from (seed, step, rank)."""

    step: int = 0  # optimizer steps done
    epoch: int = 0
    batch: int = 0  # global batches of this epoch done
    tokens: int = 0  # tokens seen by all ranks
    restarted_at: int | None = None  # steps (or tokens) when the optimizer's state was reset in mid-run
    lowest_loss: float = math.inf  # of all steps, where early_stopping_factor asks for it

    @classmethod
    def read(cls, folder: Path, config: TrainConfig) -> TrainState:
        """Where the run that wrote a checkpoint folder stood, OLMo's or ours, in the batches of `config`."""
        saved = read_training_state(folder, "train", "other")
        names = ("global_step", "epoch", "global_train_examples_seen_this_epoch", "global_train_tokens_seen")
        if not isinstance(saved, dict) or "global_step" not in saved:
            raise ValueError(f"{folder}: its training state tells no global_step; set reset_trainer_state")
        for name in (*names, "restarted_at"):
            if not isinstance(saved.get(name) or 0, int) or (saved.get(name) or 0) < 0:
                raise ValueError(f"{folder}: its training state has {name} {saved[name]!r}; set reset_trainer_state")
        seen = saved.get("global_train_examples_seen_this_epoch", 0) if config.restore_dataloader else 0
        if seen % config.global_train_batch_size:
            raise ConfigurationError(
                f"global_train_batch_size: {seen} instances of this epoch are done, no multiple of "
                f"{config.global_train_batch_size}; keep the batch size, or set --restore_dataloader=false"
            )
        return cls(
            saved["global_step"],
            saved.get("epoch") or 0,
            seen // config.global_train_batch_size,
            saved.get("global_train_tokens_seen", 0),
            saved.get("restarted_at"),
            float(saved.get("lowest_loss", math.inf)),
        )

    @classmethod
    def at_start(cls, config: TrainConfig) -> TrainState:
        """Where a run of this configuration begins, but for checkpoints of its own."""
        if config.load_path is None or config.reset_trainer_state:
            return cls(epoch=config.epoch or 0)
        return cls.read(checkpoint.resolve(config.load_path), config)

    def max_steps(self, config: TrainConfig, batches_per_epoch: int) -> int:
        """Steps of the whole schedule, from `max_duration` in steps, epochs ('1ep') or tokens ('2e9T')."""
        duration = str(config.max_duration)
        if duration.endswith("ep"):
            return math.floor(float(duration[:-2]) * batches_per_epoch)
        if duration.endswith("T"):
            left = max(int(float(duration[:-1])) - self.tokens, 0)
            return self.step + math.ceil(left / (config.global_train_batch_size * config.model.max_sequence_length))
        return int(float(duration))


def _check_finite(step: int, loss: float, norm: float) -> None:
    """Raise ValueError where the step's loss or gradient is not finite: then neither are the weights after it."""
    for name, value in (("loss", loss), ("gradient norm", norm)):
        if not math.isfinite(value):
            raise ValueError(f"{name} {value} at step {step}; the checkpoints before it are intact")


def _inside(path: Path, folder: Path) -> bool:
    return folder.resolve() in path.resolve().parents


class Trainer:
    """A run from configuration to last checkpoint; `Trainer(config, device, ranks).fit()`.

    A signal that `signals` has received ends it early.
    """

    def __init__(self, config: TrainConfig, device: torch.device, ranks: Ranks, signals: Signals | None = None):
        divisors = config.model.temperature_MLP
        if divisors and config.load_path and not Path(divisors).is_file():  # it may lie beside the starting point
            beside = checkpoint.resolve(config.load_path) / divisors
            config = replace(config, model=replace(config.model, temperature_MLP=str(beside)))
        self.config, self.device, self.ranks, self.signals = config, device, ranks, signals or Signals()
        self.folder = Path(config.save_folder)
        self._unread: Path | None = None  # checkpoint whose weights are still to be read
        self.remote: RemoteSaves | None = None
        if config.remote_save_folder is not None:
            self.remote = ranks.run_on_first(partial(self._remote_saves, config.remote_save_folder))
        # A downstream task reads the tokenizer by itself; here it is checked.
        asks = (e.type == "downstream" or (e.type == "lm" and e.data.dataset_path) for e in config.evaluators)
        tokenizer = run_tokenizer(config) if config.injection or any(asks) else None
        self.plan = plan_from_config(config, partial(encode, tokenizer) if tokenizer else None)
        self.loader = run_loader(
            config,
            ranks.rank,
            ranks.world_size,
            pin_memory=device.type == "cuda",
            order_folder=self.folder / "train_data",
            keep=False,  # hardly ever the same again, it would push out what is
        )
        self.evaluators = Evaluators(config, tokenizer, device, ranks)
        self.state = TrainState(epoch=config.epoch or 0)
        resumed = self._newest() if config.try_load_latest_save else None
        used = (self.folder / "metrics.jsonl").is_file()
        used_there = self.remote is not None and resumed is None and self.remote.holds_run()
        if resumed is None and not config.save_overwrite and (used_there or (used and not self._has_only_begun())):
            taken = f"remote_save_folder: {config.remote_save_folder}" if used_there else f"save_folder: {self.folder}"
            holds = "a run without a checkpoint to go on from" if config.try_load_latest_save else "a run"
            otherwise = "" if config.try_load_latest_save else ", or --try_load_latest_save to go on"
            raise ConfigurationError(f"{taken} holds {holds}; add --save_overwrite{otherwise}")
        if used and resumed is None and config.load_path and _inside(Path(config.load_path), self.folder):
            raise ConfigurationError(
                f"load_path: {config.load_path} lies in save_folder, which save_overwrite clears; choose another folder"
            )
        self.saver = sharded.Saver(ranks, device)
        self.model = self._load(resumed)
        self.temperatures = Temperatures.from_config(config.model).to(device)
        z_multiplier = config.auxiliary_loss_multiplier if config.softmax_auxiliary_loss else None
        objective = Objective(
            self.model, z_multiplier, layer_runner(config, device), loss_function(config.fused_loss, device)
        )
        self.module = distribute(objective, config, ranks, device)
        self._operations = training_operations(self.model, config.model.max_sequence_length)
        self._peak_operations = peak_operations(config, device)
        self.optimizer = build_optimizer(config.optimizer, self.model)
        self._restore(resumed)
        if self.max_steps < 1:
            raise ConfigurationError(f"max_duration: {config.max_duration} is less than one step")
        self._set_temperatures()
        self._warn_about_rounds_missed(1 if resumed is not None else self.state.step + 1)
        self._first_step = self.state.step
        if (used or used_there) and resumed is None and self.state.step < self.last_step:
            # Before the older run is gone: where the data cannot be read, nothing is lost.
            self.loader.batch(self.state.epoch, self.state.batch)
        # An older run's files are gone before any process writes its own.
        report = partial(Reporter, config, resume_step=self.state.step if resumed is not None else None)
        self.reporter = ranks.run_on_first(partial(report, active=True)) or report(active=False)
        self._resumed = resumed
        self._saved: dict[str, list[int]] = {kind: [] for kind in ("", "-unsharded", "ephemeral")}  # steps by kind
        for step, kind in saves.saved_steps(self.folder) if resumed is not None else ():
            if step <= self.state.step:  # later ones are damaged, and come again
                ephemeral = is_ephemeral(self.folder / f"step{step}{kind}")
                self._saved["ephemeral" if ephemeral else kind].append(step)
        if self.remote is not None:
            self.remote.begin(self.state.step if resumed is not None else None)
            self._count_remote(self.remote)

    # --- starting point ---

    def _remote_saves(self, remote: str) -> RemoteSaves | None:
        """Where checkpoints are copied to, once that is known to work; None for a dry run."""
        saves = RemoteSaves(remote, self.folder)
        saves.check()
        return None if self.config.dry_run else saves

    def _newest(self) -> Path | None:
        """The run's own checkpoint from which all ranks go on: what the first one finds."""
        kinds = (None, "damaged", "still coming", "", "-unsharded")
        if self.ranks.is_first:
            look = self.remote.latest if self.remote is not None else partial(saves.latest, self.folder)
            with ThreadPoolExecutor(1) as pool:
                found = pool.submit(look)
                # It may take longer than the others would wait.
                while wait([found], self.config.collective_timeout / 4).not_done:
                    self.ranks.broadcast_int(kinds.index("still coming"))
            try:
                newest = found.result()
            except ValueError:
                self.ranks.broadcast_int(kinds.index("damaged"))
                raise
            step, kind = saves.step_and_kind(newest) if newest is not None else (0, None)
            self.ranks.broadcast_int(len(kinds) * step + kinds.index(kind))
            return newest
        step, number = divmod(self.ranks.broadcast_int(0), len(kinds))
        while kinds[number] == "still coming":
            step, number = divmod(self.ranks.broadcast_int(0), len(kinds))
        if kinds[number] == "damaged":  # the first rank says which
            raise ConfigurationError(f"save_folder: no checkpoint in {self.folder} is whole")
        return self.folder / f"step{step}{kinds[number]}" if number else None

    def _count_remote(self, remote: RemoteSaves) -> None:
        """Let checkpoints that lie in the remote folder alone count among those to keep."""
        for step, kind in remote.steps():
            if step < self.state.step and not self._path(kind, step).is_dir():
                ephemeral = remote.is_ephemeral(self._path(kind, step).name)
                self._saved["ephemeral" if ephemeral else kind].append(step)
        for steps in self._saved.values():
            steps.sort()

    def _has_only_begun(self) -> bool:
        """Whether the folder holds this very run, ended before its first checkpoint: then it begins anew.

        It may have begun without the flag that lets it go on, or with the one that let it take the folder.
        """
        config, saved = self.config, self.folder / "config.yaml"
        if not (config.try_load_latest_save and saved.is_file()):
            return False
        flags = product((True, False), repeat=2)
        begun = (replace(config, try_load_latest_save=goes_on, save_overwrite=takes) for goes_on, takes in flags)
        if saved.read_text("utf-8") not in [other.as_yaml() for other in begun]:
            return False
        self.state = TrainState.at_start(config)
        told = (self.folder / "metrics.jsonl").read_text("utf-8").splitlines(keepends=True)
        steps = (json.loads(line)["step"] for line in told if line.endswith("\n"))
        return max(steps, default=0) < self.last_step

    def _load(self, resumed: Path | None) -> OLMo:
        """The weights: of the run's own newest checkpoint, of load_path (edited where asked), or new ones.

        From a checkpoint in parts a model of that shape, whose weights `_restore` reads.
        """
        config, folder = self.config, resumed
        # What was resuscitated at the start has been trained since; it must not be edited again.
        wanted = config.model if resumed is None else replace(config.model, resuscitation=None)
        if folder is None and config.load_path is not None:
            folder = checkpoint.resolve(config.load_path)
            resets = {"optim.pt": config.reset_optimizer_state, "train.pt": config.reset_trainer_state}
            unused = [name for name, reset in resets.items() if reset]
            self.ranks.run_on_first(partial(saves.check_whole, folder, unused))  # one reads all of it
        cut = is_sharded(config, self.ranks)
        if folder is not None and saves.is_sharded(folder) and not wanted.resuscitation:
            checkpoint.check_behaviour(wanted, folder)
            self._unread, model = folder, OLMo.empty(wanted)
            return model if cut else model.to_empty(device=self.device)
        if folder is not None:
            # Where each process will keep a part, all read the same pages, and copy what they keep.
            return checkpoint.load_model(folder, CPU if cut else self.device, config=wanted, mapped=cut)
        if config.model.resuscitation:
            raise ConfigurationError("model.resuscitation: needs load_path, the checkpoint that it edits")
        torch.manual_seed(config.seed)
        if config.model.init_device != "meta":
            return OLMo(config.model).to(CPU if cut else self.device)
        model = OLMo.empty(config.model).to_empty(device=self.device)
        model.reset_parameters()
        return model

    def _restore(self, resumed: Path | None) -> None:
        """Weights that `_load` has left to be read; optimizer and trainer state, unless they are to be reset."""
        config = self.config
        if self._unread is not None:
            sharded.read_weights(self._unread, self.model)
        folder = resumed
        if folder is None and config.load_path is not None:
            folder = checkpoint.resolve(config.load_path)
        if folder is None:
            return
        if resumed is not None or not config.reset_trainer_state:
            self.state = TrainState.read(folder, config)
        if resumed is not None or not config.reset_optimizer_state:
            saved = checkpoint.read_optimizer_state(folder, self.optimizer)
            unused = isinstance(saved, dict) and not saved.get("state")  # as an optimizer is before its first step
            if not (unused and self.state.step == 0 and (resumed is not None or not config.reset_trainer_state)):
                checkpoint.load_optimizer_state(self.optimizer, saved, str(folder))
        if resumed is None and config.reset_optimizer_state and not config.reset_trainer_state:
            self.state.restarted_at = self.state.tokens if self._by_tokens else self.state.step

    def _warn_about_rounds_missed(self, first_step: int) -> None:
        if self.plan is None or not self.ranks.is_first:
            return
        rounds, held = len(self.plan.rounds), self.plan.rounds_within(first_step, self.last_step)
        if held < rounds:
            missed = "only %d of %d injection rounds fall within steps %d to %d"
            log.warning(missed, held, rounds, first_step, self.last_step)

    # --- how long ---

    @property
    def tokens_per_batch(self) -> int:
        return self.config.global_train_batch_size * self.config.model.max_sequence_length

    @property
    def _by_tokens(self) -> bool:
        return self.config.scheduler.units == "tokens"

    @property
    def max_steps(self) -> int:
        return self.state.max_steps(self.config, self.loader.batches_per_epoch)

    @property
    def schedule_length(self) -> int:
        """Length of the whole schedule in `scheduler.units`."""
        if not self._by_tokens:
            return self.max_steps
        duration = str(self.config.max_duration)
        if duration.endswith("T"):
            return int(float(duration[:-1]))
        return self.state.tokens + (self.max_steps - self.state.step) * self.tokens_per_batch

    @property
    def last_step(self) -> int:
        """Where this process stops."""
        limits = [self.max_steps]
        if self.config.stop_at is not None:
            limits.append(self.config.stop_at)
        if self.config.stop_after is not None:
            limits.append(self.state.step + self.config.stop_after)
        return min(limits)

    # --- the loop ---

    def fit(self) -> None:
        """Train to the last step. Raises ValueError on a loss that is not finite, or too high (early stopping);
        checkpoints stay intact. Raises Interrupted where a signal or the time limit came first, and all is saved."""
        last_step, max_steps = self.last_step, self.max_steps
        self._announce(last_step)
        with closing(self.reporter), ExitStack() as self._reading:
            if not self.config.dry_run:
                try:
                    self._fit(last_step, max_steps)
                except Exception as error:
                    self.reporter.ended(error)
                    # What is being saved can be saved, unless another process, which that takes, has failed.
                    if self.ranks.world_size == 1 or isinstance(error, ValueError):
                        with suppress(OSError):
                            self.saver.wait()
                            if self.remote is not None:
                                self.remote.wait()
                    raise

    def _fit(self, last_step: int, max_steps: int) -> None:
        config, state, schedule_length = self.config, self.state, self.schedule_length
        if self._resumed is None:
            self._evaluate_on_load()
            if config.load_path is None and not config.no_pre_train_checkpoint:
                self._save(self._checkpoints_due(final=False))
        else:
            if state.step > 0:  # as it was saved
                self._set_learning_rate(state.tokens if self._by_tokens else state.step, schedule_length)
            self._finish_saving(final=state.step == last_step)

        watch, cancelled = Watch(config, self.ranks, self.signals, Tags(self.reporter.wandb)), None
        mean = lowest = torch.tensor(state.lowest_loss, device=self.device)
        # Of steps on a GPU only those that log take their time; the window always holds one in so many of them.
        between = config.console_log_interval
        window: deque[float] = deque(maxlen=between * math.ceil(config.speed_monitor.window_size / between))
        batches = self.loader.batches(state.epoch, state.batch, last_step - state.step)
        self._bar = self.reporter.bar(state.step, last_step)
        self._reading.callback(batches.close)  # type: ignore[attr-defined]
        self.model.train()
        while state.step < last_step:
            started = time.perf_counter()
            batch = next(batches)
            step = state.step + 1
            batch, entered = inject(batch, step, self.plan, config.global_train_batch_size)
            self._set_temperatures(step)
            results, rate = self._train_step(batch, step, schedule_length)
            self.reporter.begin()
            self._bar.advance()
            state.step, state.batch = step, state.batch + 1
            state.tokens += self.tokens_per_batch
            if state.batch == self.loader.batches_per_epoch:
                state.epoch, state.batch = state.epoch + 1, 0
            if config.save_data_indices:
                append_indices(self.folder, self.ranks.rank, step, batch.instances.tolist())
            injected = self.plan is not None and self.plan.round_of(step) is not None
            if injected or step % config.console_log_interval == 0 or step == last_step:
                loss, z_loss, norm = self._read(results)
                self._log(step, last_step, loss, z_loss, norm, rate, window, entered)
            window.append(time.perf_counter() - started)
            if config.early_stopping_factor is not None:  # it wants every step's loss, the mean over the ranks
                mean = self.ranks.sum_tensor(results[0].clone()) / self.ranks.world_size
                lowest = torch.minimum(lowest, mean)
            if cancelled is not None:  # a step beyond the saved one, which a restart does again
                if watch.signalled():
                    break
                continue

            self.saver.look()
            # Once in a while: evaluate.
            due = config.evaluators if step == last_step else self.evaluators.due(step)
            if self._in_probing_window(step):
                self._evaluate(f"evaluating at step {step}", self.evaluators.with_probes(due), brief=not due)
            elif due:
                self._evaluate(f"evaluating at step {step}", due)

            # Once in a while: save. After evaluating, so that a restart from here has all of its metrics.
            if step < last_step:
                done = state.tokens if self._by_tokens else step
                cancelled = watch.asked(step) or watch.diverged(step, done, mean, lowest)
            kinds = self._checkpoints_due(final=step == last_step, cancelled=cancelled is not None)
            if kinds:
                loss, _, norm = self._read(results)
                _check_finite(step, loss, norm)
                state.lowest_loss = lowest.item()
                saved = self._save(kinds)
            if cancelled is not None:
                last_step = min(step + cancelled.extra_steps, last_step - 1)
                if self.ranks.is_first and last_step > step:
                    log.info("%s: %d steps more, which a restart does again", cancelled.reason, last_step - step)
        batches.close()  # type: ignore[attr-defined]
        self.saver.wait()
        if self.remote is not None:
            self._finish_uploads(self.remote, last=cancelled is None)
        if cancelled is not None:
            raise cancelled.end(saved)

    def _train_step(self, batch: Batch, step: int, schedule_length: int) -> tuple[Tensor, float]:
        """One optimizer step on this rank's rows (n, T); returns loss, z-loss and gradient norm, (3,), and the rate.

        As in OLMo the loss is the sum over the predictions that count, of T - 1 a row, divided by n * T. Nothing here
        waits for the device; `_read` does.
        """
        config = self.config
        torch.manual_seed(((config.seed * 1_000_003 + step) * 65_537 + self.ranks.rank) % 2**63)
        self.optimizer.zero_grad(set_to_none=True)
        rows, tokens = len(batch.input_ids), batch.input_ids.numel()
        losses = torch.zeros(2, device=self.device)
        for start in range(0, rows, config.device_train_microbatch_size):
            part = slice(start, start + config.device_train_microbatch_size)
            input_ids, label_mask, attention_mask = (
                None if all_rows is None else all_rows[part]
                for all_rows in (batch.input_ids, batch.label_mask, batch.attention_mask)
            )
            assert input_ids is not None
            arguments = (input_ids, *predictions(input_ids, label_mask), attention_mask)
            with gradient_sync(self.module, config, last_micro_batch=part.stop >= rows):
                with torch.autocast(self.device.type, torch.bfloat16, enabled=config.precision == "amp_bf16"):
                    loss, *parts = self.module(*(self._sent(argument) for argument in arguments))
                (loss / tokens).backward()
            losses += torch.stack(parts) / tokens
        scale = self.tokens_per_batch if self._by_tokens else 1
        before = self.state.tokens if self._by_tokens else step - 1
        norm = self._clip_gradients(before)
        rate = self._set_learning_rate(before + scale, schedule_length)
        self.optimizer.step()
        return torch.cat((losses, norm[None])), rate

    def _set_learning_rate(self, done: int, schedule_length: int) -> float:
        """Give the optimizer the rate of a step by the steps (or tokens) done with it; returns the rate."""
        rate = learning_rate(self.config, done, schedule_length, self.state.restarted_at)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def _sent(self, tensor: Tensor | None) -> Tensor | None:
        """On the device, without waiting until it is there."""
        return None if tensor is None else to_device(tensor, self.device)

    def _read(self, results: Tensor) -> list[float]:
        """Loss and z-loss, means over the ranks, and gradient norm of a step: where a step waits for the device."""
        means = self.ranks.sum_tensor(results[:2].clone()) / self.ranks.world_size
        return torch.cat((means, results[2:])).tolist()

    def _set_temperatures(self, step: int | None = None) -> Temperatures:
        """Let the model compute with the temperatures of a step, by default of the last one done; returns them."""
        now = self.temperatures.at((self.state.step if step is None else step) / self.max_steps)
        now.apply(self.model)
        return now

    def _clip_gradients(self, before: int) -> Tensor:
        """Clip by `max_grad_norm_ratio` or else `max_grad_norm`; returns the norm before.

        OLMo sets the limits of a step at the end of the one before; the first step of an optimizer has the plain ones.
        """
        config, ratio, limit = self.config, self.config.max_grad_norm_ratio, self.config.max_grad_norm
        if before not in (0, self.state.restarted_at):
            ratio, limit = clip_limit(config, ratio, before), clip_limit(config, limit, before)
        return clip_gradients(self.model, limit) if ratio is None else clip_each_gradient(self.optimizer, ratio)

    # --- rare work ---

    def _announce(self, last_step: int) -> None:
        if self.ranks.is_first:
            parameters = sum(p.numel() for p in self.model.parameters())
            log.info(
                "%s: %s parameters on %s, %d process(es), steps %d to %d, %s tokens a step",
                self.config.run_name or self.folder,
                f"{parameters:,}",
                self.device,
                self.ranks.world_size,
                self.state.step + 1,
                last_step,
                f"{self.tokens_per_batch:,}",
            )
            start = self._resumed or self.config.load_path
            if start is not None:
                log.info("%s %s", "going on from" if self._resumed else "starting from", start)
            if not self._saves_anything():
                log.info("no checkpoint will be saved: neither save_interval nor another key asks for one")

    def _saves_anything(self) -> bool:
        config = self.config
        intervals = (config.save_interval, config.save_interval_unsharded, config.save_interval_ephemeral)
        return any(i is not None for i in intervals) or bool(config.save_steps_unsharded or config.force_save_unsharded)

    def _evaluate_on_load(self) -> None:
        """Evaluate the starting point, and where it was resuscitated also the weights as they were before."""
        config = self.config
        if not (config.eval_on_load and config.evaluators):
            if self._in_probing_window(self.state.step):
                self._evaluate("probing the starting point", self.evaluators.with_probes([]), brief=True)
            return
        if config.model.resuscitation and config.load_path:
            folder = checkpoint.resolve(config.load_path)
            original = checkpoint.load_model(folder, self.device, config=replace(config.model, resuscitation=None))
            result = self.evaluators.run(original, config.evaluators, "evaluating the original weights")
            self.reporter.evaluation(self.state.step, result, prefix="original")
        self._evaluate("evaluating the starting point", config.evaluators)

    def _in_probing_window(self, step: int) -> bool:
        """Whether probes are to be scored after this step because of an injection near it (`ProbingConfig`)."""
        probing, plan = self.config.probing, self.plan
        if probing is None or plan is None:
            return False
        since = range(0, probing.steps, probing.interval)
        return plan.round_of(step + 1) is not None or any(plan.round_of(step - n) is not None for n in since)

    def _evaluate(self, description: str, chosen: Sequence[EvaluatorConfig], brief: bool = False) -> None:
        result = self.evaluators.run(gathered_model(self.model), chosen, description)
        self.reporter.evaluation(self.state.step, result, brief=brief)

    def _log(
        self,
        step: int,
        last_step: int,
        loss: float,
        z_loss: float,
        norm: float,
        rate: float,
        window: deque[float],
        entered: list[tuple[int, Text]],
    ) -> None:
        """Check the step's numbers, and report them."""
        _check_finite(step, loss, norm)
        metrics = {
            "train/CrossEntropyLoss": loss,
            "train/Perplexity": math.exp(min(loss, 700.0)),
            "optim/total_grad_norm": norm,
            "optim/learning_rate": rate,
            "throughput/total_tokens": float(self.state.tokens),
            "throughput/device/peak_memory_bytes": float(peak_memory(self.device)),
        }
        if self.config.softmax_auxiliary_loss:
            metrics["train/ZLoss"] = z_loss
        speed = left = ""
        if window:
            seconds = sum(window) / len(window)
            tokens_per_second = self.tokens_per_batch / self.ranks.world_size / seconds
            metrics["throughput/device/tokens_per_second"] = tokens_per_second
            metrics["throughput/device/operations_per_second"] = self._operations * tokens_per_second
            if self._peak_operations is not None:
                metrics["throughput/device/mfu"] = self._operations * tokens_per_second / self._peak_operations
            metrics["throughput/device/batches_per_second"] = 1 / seconds
            speed = f", {self.tokens_per_batch / seconds:,.0f} tokens/s"
            left = f", {clock(seconds * (last_step - step))} left"
        injection_round = self.plan.round_of(step) if self.plan is not None else None
        if self.plan is not None and injection_round is not None:
            counts = torch.tensor([len(entered), sum(len(t.input_ids) for _, t in entered)], device=self.device)
            texts, tokens = self.ranks.sum_tensor(counts).tolist()
            metrics["injection/round"] = float(injection_round)
            metrics["injection/texts"], metrics["injection/tokens"] = float(texts), float(tokens)
            of_all_ranks = self.plan.texts_of_batch(injection_round, self.config.global_train_batch_size)
            assert texts == len(of_all_ranks)
            self.reporter.injection(step, injection_round, of_all_ranks)
            if self.ranks.is_first:
                log.info("step %d: injection round %d, %d texts", step, injection_round, texts)
        self.reporter.metrics(step, metrics)
        self._bar.note = f": loss {loss:.4f}{speed}"
        if self.ranks.is_first and (step % self.config.console_log_interval == 0 or step == last_step):
            log.info("step %d/%d: loss %.4f%s%s", step, last_step, loss, speed, left)

    def _checkpoints_due(self, final: bool, cancelled: bool = False) -> list[str]:
        """The kinds of checkpoint that the step asks for: by the end of their names, or "ephemeral"."""
        config, step = self.config, self.state.step
        due = {
            "": config.save_interval is not None and (final or step % config.save_interval == 0),
            "-unsharded": step in (config.save_steps_unsharded or ())
            or (final and config.force_save_unsharded)
            or (config.save_interval_unsharded is not None and (final or step % config.save_interval_unsharded == 0)),
        }
        # What is saved in a thread comes last: training goes on meanwhile, and `latest` leads to it.
        kinds = [kind for kind in ("-unsharded", "") if due[kind]]
        interval = config.save_interval_ephemeral
        if not kinds and (cancelled or (interval is not None and step % interval == 0)):
            return ["ephemeral"]
        return kinds

    def _finish_saving(self, final: bool) -> None:
        """Do what a process that was killed after saving a checkpoint of this step may have left undone."""
        due = [kind for kind in self._checkpoints_due(final) if kind != "ephemeral"]
        there = {kind: self.ranks.broadcast_int(self._path(kind).is_dir()) for kind in ("-unsharded", "")}
        for kind in there:
            if there[kind] and self.ranks.is_first:
                saves.link_latest(self._path(kind))
        self._save([kind for kind in due if not there[kind]])
        for path in self._spare():
            self._remove(path)

    def _finish_uploads(self, remote: RemoteSaves, last: bool) -> None:
        """Wait for uploads; where one fails, raise OSError, unless this process is not the run's last."""
        try:
            remote.finish()
        except OSError as error:
            if last:
                raise
            log.warning("%s", error)

    def _path(self, kind: str, step: int | None = None) -> Path:
        """The folder of a checkpoint, by default of the step just done."""
        return self.folder / f"step{self.state.step if step is None else step}{kind.removeprefix('ephemeral')}"

    def _spare(self) -> list[Path]:
        """Checkpoints beyond the numbers to keep, and ephemeral ones older than the newest; they count as gone."""
        config, saved = self.config, self._saved
        keep = {"": config.save_num_checkpoints_to_keep, "-unsharded": config.save_num_unsharded_checkpoints_to_keep}
        newest = max((step for steps in saved.values() for step in steps), default=0)
        spare = {kind: saved[kind][: -max(number, 1)] for kind, number in keep.items() if number >= 0}
        spare["ephemeral"] = [step for step in saved["ephemeral"] if step < newest]
        for kind, steps in spare.items():
            saved[kind] = [step for step in saved[kind] if step not in steps]
        return [self._path(kind, step) for kind, steps in spare.items() for step in steps]

    def _remove(self, path: Path) -> None:
        if self.ranks.is_first:
            saves.remove(path)
        if self.remote is not None:
            self.remote.removed(path.name)

    def _save(self, kinds: Sequence[str]) -> Path:
        """Save the step just done; returns the folder of the last of `kinds`.

        An unsharded checkpoint is there when this returns. Of any other, a copy is: a thread writes it (`Saver`).
        """
        config, state, path = self.config, self.state, self.folder
        # These weights have been edited and trained since; who loads them must not edit them again.
        written = replace(config, model=replace(config.model, resuscitation=None, resuscitation_force=False))
        trainer: dict[str, Any] = {
            "epoch": state.epoch,
            "global_step": state.step,
            "global_train_examples_seen_this_epoch": state.batch * config.global_train_batch_size,
            "global_train_tokens_seen": state.tokens,
            "world_size": self.ranks.world_size,
            "restarted_at": state.restarted_at,
            # What OLMo's trainer wants to find; it takes the lists for checkpoints that it may remove.
            **{f"{kind}checkpoints": [] for kind in ("", "unsharded_", "ephemeral_")},
        }
        if config.early_stopping_factor is not None:
            trainer["lowest_loss"] = state.lowest_loss
        first = self.ranks.is_first
        for kind in kinds:
            self.saver.wait()  # its checkpoint is older, and so is where it lets `latest` lead
            path, temperatures = self._path(kind), self._set_temperatures()
            self._saved[kind].append(state.step)
            if first:
                self.reporter.on_disk()
            if kind == "-unsharded":
                checkpoint.save(path, self.model, written, self.optimizer, trainer, temperatures, first=first)
                self._saved_whole(path, self._spare())
                self.ranks.barrier()
                continue
            tensors = sharded.snapshot(self.model, checkpoint.optimizer_state(self.optimizer)["state"], self.ranks)
            about = (written, trainer, temperatures, kind == "ephemeral", self.ranks)
            self.saver.start(partial(self._write, path, tensors, about, self._spare()))
        return path

    def _write(self, path: Path, tensors: dict[str, Tensor], about: tuple[Any, ...], spare: list[Path]) -> None:
        """What the thread does: write a checkpoint in parts, then remove others."""
        checkpoint.save_sharded(path, tensors, *about)
        self._saved_whole(path, spare)

    def _saved_whole(self, path: Path, spare: list[Path]) -> None:
        """After a checkpoint has got its name."""
        if self.ranks.is_first:
            saves.link_latest(path)
            log.info("saved %s", path)
        if self.remote is not None:
            self.remote.saved(path)
        for other in spare:
            self._remove(other)
