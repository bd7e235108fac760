"""The training loop: inject, step, log, evaluate, save."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from ..checkpoint import families
from ..checkpoint.saver import CheckpointSaver, open_remote
from ..config.check import idle_settings
from ..config.schema import EvaluatorConfig, TrainConfig
from ..console import log
from ..data.loader import run_loader
from ..data.sources import TokenDataset
from ..distributed.ranks import Ranks
from ..eval.evaluators import Evaluators
from ..knowledge.build import needs_tokenizer, plan_from_config
from ..knowledge.injection import inject
from ..memory.temperature import Temperatures
from ..model.causal_lm import CausalLM, dropouts
from ..report.environment import seed_effects
from ..report.reporter import Reporter
from ..tokenizer import encode, run_tokenizer
from . import start
from .parallel import gathered_dtype, gathered_model
from .schedule import Schedule
from .step import TrainStep
from .step_log import StepLog
from .stopping import Cancellation, Signals, Tags, Watch


class Trainer:
    """A run from its configuration to its last checkpoint: `Trainer(config, device, ranks).fit()`.

    The first signal that `signals` receives ends it early. Raises ConfigurationError or ValueError for what cannot be
    trained, before an older run in the same folder is deleted.
    """

    def __init__(self, config: TrainConfig, device: torch.device, ranks: Ranks, signals: Signals | None = None):
        config = start.resolve_divisors(config)
        self.config, self.device, self.ranks, self.signals = config, device, ranks, signals or Signals()
        remote = open_remote(config, ranks)
        tokenizer = run_tokenizer(config) if _needs_tokenizer(config) else None
        self.plan = plan_from_config(config, partial(encode, tokenizer) if tokenizer else None)
        order, pinned = Path(config.save_folder) / "train_data", device.type == "cuda"
        # keep=False: remote data are not cached, since hardly any run reads the same again.
        self.loader = run_loader(
            config, ranks.rank, ranks.world_size, pin_memory=pinned, order_folder=order, keep=False
        )
        self.evaluators = Evaluators(config, tokenizer, device, ranks)
        self.start = start.find(config, ranks, remote, self.loader.batches_per_epoch)
        self.model, module, self.optimizer, self.state = self.start.build(config, ranks, device)
        self.train_step = TrainStep(config, self.model, module, self.optimizer, device, ranks.rank)
        temperatures = Temperatures.from_config(config.model).to(device)
        self.schedule = Schedule(config, self.state, self.loader.batches_per_epoch, temperatures)
        self.saver = CheckpointSaver(config, self.model, self.optimizer, ranks, remote)
        self.resumed_at = self.state.step if self.start.kind == "resumed" else None
        self.reporter = self._open_reporter()

    def fit(self) -> None:
        """Train to the last step.

        Raises ValueError for a loss that is not finite, or too high (early stopping); checkpoints stay intact. Raises
        Interrupted if a signal, the time limit or a tag ended the run early; then it is saved.
        """
        self._announce()
        watch = Watch(self.config, self.ranks, self.signals, Tags(self.reporter.wandb), self.state.lowest_loss)
        with closing(self.reporter):
            if self.config.dry_run:
                return
            try:
                self.saver.begin(self.resumed_at)
                self.schedule.at(self.state.step).temperatures.apply(self.model)
                if self.start.kind == "resumed":
                    self._complete_save()
                else:
                    self._evaluate_and_save_start()
                self._train(watch)
            except Exception as error:
                self.reporter.ended(error)
                # A save that has begun can be completed, unless it needs another rank, and that one has failed.
                if self.ranks.world_size == 1 or isinstance(error, ValueError):
                    with suppress(OSError):
                        self.saver.wait()
                raise

    def _train(self, watch: Watch) -> None:
        """The loop. A step in it is a whole optimizer step of all ranks."""
        config, ranks, state, schedule, saver = self.config, self.ranks, self.state, self.schedule, self.saver
        step_log = StepLog(config, self.model, self.plan, schedule, ranks, self.reporter)
        cancelled: Cancellation | None = None
        last_step = schedule.last_step
        self.model.train()
        with closing(self.loader.batches(state.epoch, state.batch, last_step - state.step)) as batches:
            while state.step < last_step:
                step = state.step + 1
                with step_log.timer:
                    batch, entered = inject(next(batches), step, self.plan, config.global_train_batch_size)
                    result = self.train_step.run(batch, step, schedule.at(step))
                    state.advance(schedule.tokens_per_batch, self.loader.batches_per_epoch)
                    step_log.write(result, batch, entered, state.tokens, last_step)
                watch.track(result.loss)
                if cancelled is not None:  # a step beyond the saved one, which a restart repeats
                    if watch.signalled():
                        break
                    continue
                saver.raise_error()

                # Now and then: evaluate.
                self._evaluate(config.evaluators if step == last_step else self.evaluators.due(step))

                # Now and then: save. After logging and evaluating, so that a restart from here has all metrics.
                if step < last_step:
                    cancelled = watch.asked(step) or watch.diverged(step, schedule.elapsed(step))
                kinds = saver.due(step, final=step == last_step, cancelled=cancelled is not None)
                if kinds:
                    result.read(ranks)  # weights that are not finite are never saved
                    state.lowest_loss = watch.lowest_loss
                    saved = self._save(kinds)
                if cancelled is not None:
                    last_step = min(step + cancelled.extra_steps, last_step - 1)
                    if ranks.is_first and last_step > step:
                        log.info("%s: %d more steps, which a restart repeats", cancelled.reason, last_step - step)
        saver.finish(completes_run=cancelled is None)
        if cancelled is not None:
            raise cancelled.error(saved)

    # --- evaluating and saving ---

    def _evaluate(self, due: Sequence[EvaluatorConfig]) -> None:
        """Run the evaluators that are due, and in a probing window around an injection those that have probes."""
        step, probing = self.state.step, self._in_probing_window(self.state.step)
        if due or probing:
            chosen = self.evaluators.with_probes(due) if probing else due
            model = gathered_model(self.model, gathered_dtype(self.config, self.ranks))
            result = self.evaluators.run(model, chosen, f"evaluating at step {step}")
            self.reporter.evaluation(step, result, brief=not due)

    def _in_probing_window(self, step: int) -> bool:
        """Whether `probing` scores probes after this step: before an injection, and at times in the steps after it."""
        probing, plan = self.config.probing, self.plan
        if probing is None or plan is None:
            return False
        since = range(0, probing.steps, probing.interval)
        return plan.round_of(step + 1) is not None or any(plan.round_of(step - n) is not None for n in since)

    def _save(self, kinds: Sequence[str]) -> Path:
        """Save the step just done; returns the folder of the last of `kinds`."""
        self.reporter.on_disk()  # before the checkpoint: a restart from it needs the metrics of all steps up to it
        state = self.state.as_saved(self.config, self.ranks.world_size)
        return self.saver.save(kinds, state, self.schedule.at(self.state.step).temperatures)

    # --- before the first step ---

    def _open_reporter(self) -> Reporter:
        """The reporter of this rank. On the first one it deletes an older run, before any rank writes."""
        if self.start.replaces_run and self.state.step < self.schedule.last_step:
            self.loader.batch(self.state.epoch, self.state.batch)  # if the data are unreadable, the older run stays
        left = self.state.step < self.schedule.last_step
        drops = dropouts(self.model)
        reporter = partial(Reporter, self.config, resume_step=self.resumed_at, has_steps_left=left, drops=drops)
        return self.ranks.run_on_first(partial(reporter, active=True)) or reporter(active=False)

    def _announce(self) -> None:
        """Log what will be trained, and warn of what this run leaves out."""
        if not self.ranks.is_first:
            return
        config, schedule, first_step = self.config, self.schedule, self.state.step + 1
        steps = f"steps {first_step} to {schedule.last_step}"
        if first_step > schedule.last_step:
            steps = f"nothing to train: step {self.state.step} is done, and the last step is {schedule.last_step}"
        log.info(
            "%s: %s parameters on %s, %d process(es), %s, %s tokens per step",
            config.run_name or config.save_folder,
            f"{sum(p.numel() for p in self.model.parameters()):,}",
            self.device,
            self.ranks.world_size,
            steps,
            f"{schedule.tokens_per_batch:,}",
        )
        if isinstance(self.model, CausalLM):
            shown = (self.model.family, config.model.vocab_size, config.model.eos_token_id, config.model.pad_token_id)
            about = "model: %s, a vocabulary of %d tokens, EOS %d, padding %d; tokenizer: %s"
            log.info(about, *shown, config.tokenizer.identifier)
            tokens = config.device_train_microbatch_size * config.model.max_sequence_length
            for warning in families.remarks(self.model, tokens):
                log.warning("%s", warning)
        for remark in self.loader.remarks():
            log.info("data: %s", remark)
        source, eos = self.loader.source, config.model.eos_token_id
        if isinstance(source, TokenDataset) and (end := source.document_end()) not in (None, eos):
            about = (
                "%s: documents end with token %s (about.json), but model.eos_token_id is %d; use rows made with the %s"
            )
            log.warning(about, source.path, end, eos, "tokenizer of this model (scripts.prepare_pubmed --tokenizer)")
        if self.start.kind == "resumed":
            log.info("resuming from %s", self.start.folder)
            first_step = 1
        elif config.load_path is not None:
            log.info("starting from %s", config.load_path)
        if varied := seed_effects(config, dropouts(self.model)):
            log.info("seed %d varies: %s", config.seed, ", ".join(varied))
        else:
            log.warning(
                "seed: %d changes nothing in this run: its weights are loaded, the order of its data is fixed, and it "
                "has no dropout; runs that differ only in it are identical (--data_shuffling=true varies the order)",
                config.seed,
            )
        if self.plan is not None:
            rounds, within = len(self.plan.rounds), self.plan.rounds_within(first_step, schedule.last_step)
            if within < rounds and first_step <= schedule.last_step:
                missed = "only %d of %d injection rounds are within steps %d to %d"
                log.warning(missed, within, rounds, first_step, schedule.last_step)
        for idle in idle_settings(config):
            log.warning("%s", idle)
        chosen = config.fsdp and config.fsdp.precision == "mixed"  # pure is the default
        if chosen and config.precision == "amp_bf16" and self.ranks.world_size == 1:
            log.warning("fsdp.precision has no effect on one process: the residual stream is float32")
        if not self.saver.saves_anything:
            log.info("no checkpoint will be saved: set save_interval or another key of saving")
        if self.saver.saves_only_weights:
            log.warning(
                "save_unsharded_optimizer: false, and no save_interval: if this run is killed, it begins anew, since "
                "its checkpoints are weights alone"
            )

    def _evaluate_and_save_start(self) -> None:
        """Evaluate the starting point; if it was resuscitated, before that the original weights."""
        config = self.config
        due = config.evaluators if config.eval_on_load else []
        if due and config.model.resuscitation:
            assert self.start.folder is not None
            unedited = replace(config.model, resuscitation=None)
            original = families.load_model(self.start.folder, self.device, unedited)
            for weight in original.parameters():  # not the buffers, such as rotary frequencies, which FSDP leaves alone
                weight.data = weight.data.to(gathered_dtype(config, self.ranks))
            result = self.evaluators.run(original, due, "evaluating the original weights")
            self.reporter.evaluation(self.state.step, result, prefix="original")
        self._evaluate(due)
        if self.start.kind == "new" and not config.no_pre_train_checkpoint:
            self._save(self.saver.due(self.state.step, final=False))

    def _complete_save(self) -> None:
        """Complete the save of the step at which the run resumes, which a killed process may have left undone."""
        step = self.state.step
        if step > 0:  # an unsharded checkpoint holds the rate of its step
            self.train_step.set_learning_rate(self.schedule.at(step))
        self.saver.link_existing(step)
        self._save(self.saver.unfinished(step, final=step == self.schedule.last_step))
        self.saver.prune()


def _needs_tokenizer(config: TrainConfig) -> bool:
    """Whether a run encodes text; a downstream task has a tokenizer of its own, but the run's is checked for it."""
    encodes = (e.type == "downstream" or (e.type == "lm" and e.data.dataset_path) for e in config.evaluators)
    return needs_tokenizer(config) or any(encodes)
