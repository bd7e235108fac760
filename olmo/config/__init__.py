"""Every setting of a run, and how configurations are read, checked and saved."""

# ruff: noqa: F401 (what is imported here is what the package exports; `neighbour` is imported first, as it raises)
from ..files import neighbour
from .check import idle_settings
from .load import load, load_model_config, make_model_config
from .model import ActivationType, BlockType, InitFnType, LayerNormType, ModelConfig
from .schema import (
    ActivationCheckpointingStrategy,
    CompilerConfig,
    DataConfig,
    DDPConfig,
    DDPGradSyncMode,
    DistributedStrategy,
    EvaluatorConfig,
    EvaluatorType,
    FSDPConfig,
    FSDPPrecision,
    FSDPWrapStrategy,
    InjectionConfig,
    InjectionPosition,
    InstanceFilterConfig,
    LossDivisor,
    OptimizerConfig,
    OptimizerType,
    PaddingDirection,
    ProbingConfig,
    SchedulerConfig,
    SchedulerType,
    SchedulerUnits,
    ShardedCheckpointerType,
    ShardingStrategy,
    SpeedMonitorConfig,
    TokenizerConfig,
    TrainConfig,
    TruncationDirection,
    WandbConfig,
    save_model_config,
)
from .setting import changed_keys
