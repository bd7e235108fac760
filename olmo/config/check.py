"""Whether the values of a configuration are supported, in range, and consistent with each other."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

from .model import ModelConfig
from .schema import EvaluatorConfig, TrainConfig
from .setting import default_of, setting_of, walk


def model_problems(model: ModelConfig) -> Iterator[str]:
    """What is wrong with a model's settings, each with its key."""
    yield from _setting_problems(model, "model.")
    if any(setting_of(field).out_of_range(getattr(model, field.name)) for field in dataclasses.fields(model)):
        return
    if model.n_kv_heads is not None and model.multi_query_attention is not None:
        expected = 1 if model.multi_query_attention else model.n_heads
        if model.n_kv_heads != expected:
            yield f"model.multi_query_attention: contradicts model.n_kv_heads: {model.n_kv_heads}; give one of them"
    if model.d_model % model.n_heads:
        yield f"model.d_model: {model.d_model} is not a multiple of model.n_heads: {model.n_heads}"
    elif model.rope and (model.d_model // model.n_heads) % 2:
        yield "model.rope: needs an even head dimension (d_model / n_heads)"
    if model.n_heads % model.effective_n_kv_heads:
        yield f"model.n_kv_heads: {model.effective_n_kv_heads} does not divide model.n_heads: {model.n_heads}"
    if model.activation_type == "swiglu" and model.projection_size % 2:
        yield f"model.mlp_hidden_size: {model.projection_size} is odd; swiglu halves it into up and gate"
    if model.rows < model.vocab_size:
        yield f"model.embedding_size: {model.embedding_size} is less than vocab_size: {model.vocab_size}"


def run_problems(config: TrainConfig) -> Iterator[str]:
    """What is wrong with a run's settings, each with its key."""
    yield from model_problems(config.model)
    yield from _setting_problems(config)
    yield from _evaluator_problems(config.evaluators)
    yield from _injection_problems(config)
    for name in ("eos_token_id", "pad_token_id"):
        if (token := getattr(config.model, name)) >= config.model.vocab_size:
            tokens = f"the tokens 0 to {config.model.vocab_size - 1} of model.vocab_size"
            yield f"model.{name}: {token} is none of {tokens}; set it to the tokenizer's"
    if config.dry_run and config.force_save_unsharded:
        yield "force_save_unsharded: a dry run saves nothing; to unshard load_path, use scripts.convert --to olmo"
    betas, peak = config.optimizer.betas, config.optimizer.learning_rate
    if not all(0 <= beta <= 1 for beta in betas):
        yield f"optimizer.betas: expected two numbers from 0 to 1, got {list(betas)}"
    for key, lowest in (("scheduler", config.scheduler.warmup_min_lr), ("optimizer", config.optimizer.warmup_min_lr)):
        if lowest is not None and lowest >= peak > 0:
            yield f"{key}.warmup_min_lr: {lowest} must be less than optimizer.learning_rate: {peak}"
    if config.data.datasets is not None:
        yield "data.datasets: is for evaluators only; name the files in data.paths"
    if config.data.label_mask_paths is not None and not config.data.paths:
        yield "data.label_mask_paths: needs data.paths; a datasets folder has a column label_mask"
    if config.data.paths and config.data.dataset_path:
        yield "data: give either data.paths or data.dataset_path, not both"
    if config.eval_subset_num_batches == 0 or any(e.subset_num_batches == 0 for e in config.evaluators):
        yield "eval_subset_num_batches and subset_num_batches: 0 batches evaluate nothing; -1 means all"
    strategy = config.fsdp and config.fsdp.wrapping_strategy
    if config.model.transformers is not None:
        yield from _other_family_problems(config)
    elif strategy in ("by_block_group", "by_block_group_and_size") and config.model.block_group_size == 1:
        yield f"fsdp.wrapping_strategy: {strategy} needs model.block_group_size to be more than 1"
    if config.model.resuscitation and not config.load_path:
        yield "model.resuscitation: needs load_path, the checkpoint that it edits"
    if config.model.resuscitation_force and not config.model.resuscitation:
        yield "model.resuscitation_force: has no effect without model.resuscitation; leave it out"
    remote = config.remote_save_folder
    if remote is not None and not re.fullmatch(r"s3://[^/\s]+(/[^/]+)*/?", remote):
        yield (
            f"remote_save_folder: {remote} is not s3://BUCKET/FOLDER; for another store with the S3 protocol (R2, "
            "MinIO, ...) write s3:// and set the environment variable AWS_ENDPOINT_URL"
        )
    try:
        duration = float(str(config.max_duration).removesuffix("ep").removesuffix("T"))
    except ValueError:
        yield f"max_duration: {config.max_duration!r} is neither steps, epochs ('1ep') nor tokens ('2e9T')"
    else:
        if not 0 < duration < math.inf:
            yield f"max_duration: {config.max_duration} must be more than 0"


def _other_family_problems(config: TrainConfig) -> Iterator[str]:
    """Settings that need the blocks of a model of ours."""
    if config.activation_checkpointing == "fine_grained":
        yield (
            "activation_checkpointing: fine_grained is for OLMo's own blocks; use whole_layer, or for fewer layers "
            "one_in_two to one_in_eight, two_in_three or three_in_four"
        )
    strategy = config.fsdp and config.fsdp.wrapping_strategy
    if strategy in ("by_block_group", "by_block_group_and_size"):
        yield (
            f"fsdp.wrapping_strategy: {strategy} needs model.block_group_size, which does not apply to models of "
            "other families; use by_block, one_in_two to one_in_five, or size_based"
        )


# Key -> (what it needs to have an effect, whether a configuration has that). A section is one key.
_NEEDS: dict[str, tuple[str, Callable[[TrainConfig], Any]]] = {
    "reset_optimizer_state": ("load_path", lambda c: c.load_path),
    "reset_trainer_state": ("load_path", lambda c: c.load_path),
    "model.temperature_decay": ("a temperature", lambda c: c.model.temperature_attention or c.model.temperature_MLP),
    "model.rope_theta": ("model.rope", lambda c: c.model.rope),
    "model.rope_full_precision": ("model.rope", lambda c: c.model.rope),
    "model.init_std": ("model.init_fn: normal", lambda c: c.model.init_fn in ("normal", "full_megatron")),
    "model.scale_emb_init": ("model.init_fn: full_megatron", lambda c: c.model.init_fn == "full_megatron"),
    "optimizer.eps": ("optimizer.name: adamw", lambda c: c.optimizer.name == "adamw"),
    "optimizer.metrics_log_interval": ("a section wandb, or tensorboard: true", lambda c: c.wandb or c.tensorboard),
    "scheduler.t_max": ("a decay", lambda c: "constant" not in c.scheduler.name),
    "scheduler.alpha_f": ("a decay", lambda c: "constant" not in c.scheduler.name),
    "scheduler.t_warmup": ("a warm-up", lambda c: c.scheduler.name != "constant"),
    "scheduler.grad_clip_warmup_steps": ("grad_clip_warmup_factor", lambda c: c.scheduler.grad_clip_warmup_factor),
    "scheduler.grad_clip_warmup_factor": ("grad_clip_warmup_steps", lambda c: c.scheduler.grad_clip_warmup_steps),
    "max_grad_norm": ("max_grad_norm_ratio: null", lambda c: c.max_grad_norm_ratio is None),
    "auxiliary_loss_multiplier": ("softmax_auxiliary_loss", lambda c: c.softmax_auxiliary_loss),
    "data.memmap_dtype": ("data.paths", lambda c: c.data.paths),
    "data.pad_rows": ("data.dataset_path", lambda c: c.data.dataset_path),
    "data.pad_direction": ("data.pad_rows: true", lambda c: c.data.pad_rows),
    "data.seed": ("data_shuffling", lambda c: c.data_shuffling),
    "data.prefetch_factor": ("data.num_workers", lambda c: c.data.num_workers),
    "eval_on_load": ("evaluators", lambda c: c.evaluators),
    "eval_interval": ("evaluators", lambda c: c.evaluators),
    "eval_subset_num_batches": ("evaluators", lambda c: c.evaluators),
    "device_eval_batch_size": ("evaluators", lambda c: c.evaluators),
    "canceled_check_interval": (
        "early_stopping_factor or a section wandb",
        lambda c: c.early_stopping_factor is not None or c.wandb,
    ),
    "extra_steps_after_cancel": ("time_limit or a section wandb", lambda c: c.time_limit is not None or c.wandb),
    "save_num_checkpoints_to_keep": ("save_interval", lambda c: c.save_interval),
    "save_num_unsharded_checkpoints_to_keep": ("an unsharded checkpoint", lambda c: _saves_unsharded(c)),
    "save_unsharded_optimizer": ("an unsharded checkpoint", lambda c: _saves_unsharded(c)),
    "inject_interval": ("injection or inject_indices_map", lambda c: c.injection or c.inject_indices_map),
    "inject_start_step": ("injection or inject_indices_map", lambda c: c.injection or c.inject_indices_map),
    "inject_position": ("injection or inject_indices_map", lambda c: c.injection or c.inject_indices_map),
    "fsdp": ("distributed_strategy: fsdp", lambda c: c.distributed_strategy == "fsdp"),
    "fsdp.precision": ("precision: amp_bf16", lambda c: c.precision == "amp_bf16"),
    "ddp": ("distributed_strategy: ddp", lambda c: c.distributed_strategy == "ddp"),
    "fsdp.hybrid_sharding_num_model_replicas": (
        "HYBRID_SHARD",
        lambda c: "HYBRID" in getattr(c.fsdp, "sharding_strategy", ""),
    ),
}


def _saves_unsharded(config: TrainConfig) -> bool:
    return bool(config.save_interval_unsharded or config.save_steps_unsharded or config.force_save_unsharded)


def idle_settings(config: TrainConfig) -> Iterator[str]:
    """The keys that a configuration changes from their defaults without any effect, each with the reason."""
    for key, _, field in walk(TrainConfig):
        section: Any = config
        for name in key.split(".")[:-1]:
            section = getattr(section, name, None)
        value = getattr(section, field.name, None)  # None in a section that is null, or inside the list of evaluators
        if value is None or value == default_of(field):
            continue
        need, has = _NEEDS.get(key, ("", lambda _: True))
        if (reason := setting_of(field).no_effect) and not (key == "model.precision" and value == config.precision):
            yield f"{key} has no effect: {reason}"
        elif not has(config):
            yield f"{key} has no effect without {need}"


def _setting_problems(config: Any, prefix: str = "") -> Iterator[str]:
    """Values that a setting on its own does not allow, in `config` and its sections except `model`."""
    for field in dataclasses.fields(config):
        key, value, setting = prefix + field.name, getattr(config, field.name), setting_of(field)
        if dataclasses.is_dataclass(value) and not isinstance(value, ModelConfig):
            yield from _setting_problems(value, f"{key}.")
        elif problem := setting.unsupported(value) or setting.out_of_range(value):
            yield f"{key}: {problem}"


def _evaluator_problems(evaluators: list[EvaluatorConfig]) -> Iterator[str]:
    for evaluator in evaluators:
        label = evaluator.label if evaluator.label.isprintable() else ascii(evaluator.label)
        data, key = evaluator.data, f"evaluators.{label}"
        given = [name for name in ("paths", "datasets", "dataset_path") if getattr(data, name)]
        yield from _setting_problems(evaluator, f"{key}.")
        for name, value in (("label_mask_paths", None), ("generate_attention_mask", False)):
            if getattr(data, name) != value:
                yield f"{key}.data.{name}: only training data has masks; leave it out"
        if evaluator.type == "lm" and len(given) != 1:
            yield (
                f"{key}: needs exactly one of data.paths, data.datasets, "
                f"data.dataset_path (has {', '.join(given) or 'none'})"
            )
        if evaluator.type == "knowledge_entropy" and (len(given) > 1 or data.datasets):
            yield f"{key}: accepts data.paths, data.dataset_path, or neither for the run's own"
    labels = [evaluator.label for evaluator in evaluators]
    for label in sorted({label for label in labels if labels.count(label) > 1}):
        yield f"evaluators.{label}: two evaluators have this label"


def _injection_problems(config: TrainConfig) -> Iterator[str]:
    injection, probing = config.injection, config.probing
    injects = bool(injection and injection.rounds)
    if config.inject_indices_map and injects:
        yield "inject_indices_map and injection: give one of them, or set --injection.rounds=0"
    if injection and config.inject_interval is None:  # a map may contain its interval
        yield "inject_interval: missing; it is the number of steps between injection rounds"
    if injection and injects and not (injection.paraphrase or injection.duplicate or injection.once):
        yield "injection: has no entries; give paraphrase, duplicate or once a file, or leave injection out"
    if injection and injection.once_rounds and not injection.once:
        yield "injection.once_rounds: has no effect without injection.once"
    if probing is None:
        return
    if not (config.inject_indices_map or injects):
        yield "probing: probes injections, and nothing is injected; leave it out, or set --probing=null"
    if not any(e.type == "lm" and e.data.dataset_path for e in config.evaluators):
        yield "probing: no evaluator has probes; add one of type lm with data.dataset_path, or leave probing out"
    if probing.interval > probing.steps >= 1:
        yield f"probing.interval: {probing.interval} must be at most probing.steps: {probing.steps}"
