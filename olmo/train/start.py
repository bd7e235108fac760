"""Where a run starts: with new weights, from `load_path`, or from a checkpoint of its own; and what is built there."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from ..checkpoint import families, hub, saves, sharded, weights
from ..checkpoint.optimizer import load_optimizer_state, read_optimizer_state
from ..checkpoint.remote_saves import RemoteSaves
from ..config.model import ModelConfig
from ..config.schema import TrainConfig
from ..distributed.ranks import Ranks
from ..exceptions import ConfigurationError
from ..model.causal_lm import CausalLM, Model
from ..model.olmo import OLMo
from .fused_loss import loss_function
from .layer_runner import layer_runner
from .loss import Objective
from .optim import build_optimizer
from .parallel import check_strategy, distribute, shards_model
from .schedule import Schedule
from .state import TrainState


@dataclass(frozen=True)
class StartingPoint:
    """What a run begins with. `folder` is its checkpoint, None for new weights."""

    kind: Literal["new", "load_path", "resumed"]
    folder: Path | None = None
    replaces_run: bool = False  # save_folder or remote_save_folder holds an older run, which this one deletes

    def build(
        self, config: TrainConfig, ranks: Ranks, device: torch.device
    ) -> tuple[Model, nn.Module, torch.optim.Optimizer, TrainState]:
        """The model, the module whose forward pass trains it, the optimizer, and the state. A collective.

        Raises ValueError if the checkpoint is damaged, does not fit the configuration, or lacks a state that is not
        to be reset.
        """
        # The weights of the run's own checkpoints were resuscitated before they were trained and saved.
        wanted = replace(config.model, resuscitation=None) if self.kind == "resumed" else config.model
        if self.kind == "load_path":
            assert self.folder is not None
            resets = {"optim.pt": config.reset_optimizer_state, "train.pt": config.reset_trainer_state}
            unused = [name for name, reset in resets.items() if reset]
            ranks.run_on_first(partial(saves.check_complete, self.folder, unused))  # one rank reads all of it
        # Models of other families are checked with their weights before they are sharded.
        read_whole = wanted.resuscitation or wanted.transformers is not None
        sharded_checkpoint = self.folder is not None and saves.is_sharded(self.folder) and not read_whole
        model = self._model(wanted, config.seed, sharded_checkpoint, device, shards_model(config, ranks))
        z_multiplier = config.auxiliary_loss_multiplier if config.softmax_auxiliary_loss else None
        loss = loss_function(config.fused_loss, device)
        padded_first = config.data.pad_rows and config.data.pad_direction == "left"
        if isinstance(model, CausalLM) and (padded_first or config.data.generate_attention_mask):
            model.check_mask()
        if config.fused_loss and model.vocabulary is None:
            raise ConfigurationError(
                f"fused_loss: {type(model.network).__name__} computes logits in a way of its own; leave it out"
            )
        objective = Objective(model, z_multiplier, layer_runner(config, model, device), loss)
        module = distribute(objective, config, ranks, device)
        optimizer = build_optimizer(config.optimizer, model)
        if sharded_checkpoint:
            assert self.folder is not None
            sharded.read_weights(self.folder, model)
        return model, module, optimizer, self._restore(config, optimizer)

    def _model(
        self, wanted: ModelConfig, seed: int, sharded_checkpoint: bool, device: torch.device, sharded_model: bool
    ) -> Model:
        """The model, with its weights; a `sharded_checkpoint` is read later, when FSDP has sharded the model."""
        load_device = torch.device("cpu") if sharded_model else device
        if self.folder is not None:
            if sharded_checkpoint:
                weights.check_behaviour(wanted, self.folder)
                model = OLMo.empty(wanted)
                return model if sharded_model else model.to_empty(device=device)
            # Ranks that will keep a shard each read the same mapped pages, and copy what they keep.
            return families.load_model(self.folder, load_device, wanted, mapped=sharded_model)
        assert not wanted.resuscitation  # it needs load_path (config/check.py)
        if wanted.transformers is not None:
            return families.new_model(wanted, seed, load_device)
        torch.manual_seed(seed)
        if wanted.init_device != "meta":
            return OLMo(wanted).to(load_device)
        model = OLMo.empty(wanted).to_empty(device=device)
        model.reset_parameters()
        return model

    def _restore(self, config: TrainConfig, optimizer: torch.optim.Optimizer) -> TrainState:
        """Fill the optimizer, and return the state, unless they are to be reset."""
        state = TrainState(epoch=config.epoch or 0)
        if self.folder is None:
            return state
        keeps_state = self.kind == "resumed" or not config.reset_trainer_state
        keeps_optimizer = self.kind == "resumed" or not config.reset_optimizer_state
        if keeps_state:
            state = TrainState.read(self.folder, config)
        if keeps_optimizer:
            saved = read_optimizer_state(self.folder, optimizer)
            is_new = isinstance(saved, dict) and not saved.get("state")  # as an optimizer before its first step
            if not (is_new and keeps_state and state.step == 0):
                load_optimizer_state(optimizer, saved, str(self.folder))
        elif keeps_state:
            state.restarted_at = state.tokens if config.scheduler.units == "tokens" else state.step
        return state


def resolve_divisors(config: TrainConfig) -> TrainConfig:
    """The configuration, with the path of `model.temperature_MLP` if it is in the checkpoint of `load_path`."""
    divisors = config.model.temperature_MLP
    if not divisors or not config.load_path or Path(divisors).is_file():
        return config
    beside = hub.resolve(config.load_path, "load_path") / divisors
    return replace(config, model=replace(config.model, temperature_MLP=str(beside)))


def find(config: TrainConfig, ranks: Ranks, remote: RemoteSaves | None, batches_per_epoch: int) -> StartingPoint:
    """The starting point, found by the first rank; `remote` is its copy of the run, if it has one. A collective.

    With `try_load_latest_save` the run's newest checkpoint, if there is one. Raises ConfigurationError if save_folder
    or remote_save_folder holds a run that is neither to be continued nor to be overwritten; ValueError if all its
    checkpoints are damaged.
    """
    check_strategy(config, ranks)  # before the ranks wait for one another
    claim = partial(_claim, config, remote, batches_per_epoch)
    # Downloading a checkpoint may take longer than the other ranks would wait.
    newest, replaces_run = ranks.share_from_first(claim, config.collective_timeout / 4)
    if newest is not None:
        return StartingPoint("resumed", newest)
    if config.load_path is not None:  # every node has a cache of its own for what is on the hub
        return StartingPoint("load_path", hub.resolve(config.load_path, "load_path"), replaces_run)
    return StartingPoint("new", replaces_run=replaces_run)


def _claim(config: TrainConfig, remote: RemoteSaves | None, batches_per_epoch: int) -> tuple[Path | None, bool]:
    """The run's checkpoint to resume from; without one, whether the run replaces an older one."""
    folder, resumes = Path(config.save_folder), config.try_load_latest_save
    if resumes:
        newest = saves.latest(folder) if remote is None else remote.latest()
        if newest is not None:
            return newest, False
    holds_run = (folder / "metrics.jsonl").is_file()
    copy_holds_run = remote is not None and remote.holds_run()
    if not config.save_overwrite and (copy_holds_run or (holds_run and not _has_only_begun(config, batches_per_epoch))):
        taken = f"remote_save_folder: {config.remote_save_folder}" if copy_holds_run else f"save_folder: {folder}"
        if resumes:
            raise ConfigurationError(
                f"{taken} holds a run without a checkpoint to resume from; choose another folder, or delete this run, "
                "checkpoints of weights alone included: --save_overwrite"
            )
        raise ConfigurationError(f"{taken} holds a run; add --save_overwrite, or --try_load_latest_save to resume it")
    if holds_run and config.load_path and folder.resolve() in Path(config.load_path).resolve().parents:
        raise ConfigurationError(
            f"load_path: {config.load_path} is in save_folder, which save_overwrite clears; choose another folder"
        )
    return None, holds_run or copy_holds_run


def _has_only_begun(config: TrainConfig, batches_per_epoch: int) -> bool:
    """Whether save_folder holds this very run, ended before its first checkpoint: then it begins anew.

    It may have begun without the flag to resume, or with the flag to overwrite.
    """
    folder = Path(config.save_folder)
    if not (config.try_load_latest_save and (folder / "config.yaml").is_file()):
        return False
    flags = product((True, False), repeat=2)
    begun = (replace(config, try_load_latest_save=resumes, save_overwrite=overwrites) for resumes, overwrites in flags)
    if (folder / "config.yaml").read_text("utf-8") not in [other.as_yaml() for other in begun]:
        return False
    lines = (folder / "metrics.jsonl").read_text("utf-8").splitlines(keepends=True)
    steps = (json.loads(line)["step"] for line in lines if line.endswith("\n"))
    last_step = Schedule(config, TrainState.at_start(config), batches_per_epoch).last_step
    return max(steps, default=0) < last_step
