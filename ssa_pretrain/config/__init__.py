"""The configuration of a run: its schema, the machine it runs on, its rules and DeepSpeed's dictionary.

Reading order: choices, evaluation, trackers, schema, gates, machine, rules/, deepspeed. This module re-exports the first five only, so importing it is
cheap.
"""

from pathlib import Path

from ssa_pretrain.config.choices import (
    AdamImpl,
    Auto,
    EngineName,
    Fp8Recipe,
    Haystack,
    KernelImpl,
    LayerSpec,
    Method,
    PrecisionName,
    Recompute,
    Schedule,
    Score,
    StreamDraw,
    Timestamps,
    WandbMode,
)
from ssa_pretrain.config.evaluation import (
    ChoiceTask,
    EvaluationConfig,
    LmEvalConfig,
    NeedleTask,
    PerplexityTask,
    TaskConfig,
)
from ssa_pretrain.config.gates import gates_per_head
from ssa_pretrain.config.schema import (
    AttentionConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    DeepSpeedConfig,
    EngineConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    PrecisionConfig,
    ProfileConfig,
    RopeScalingConfig,
    TrainingConfig,
)
from ssa_pretrain.config.trackers import LoggingConfig, TensorboardConfig, TrackioConfig, WandbConfig

CONF = Path(__file__).resolve().parents[2] / "conf"  # the YAML files of the settings

__all__ = [
    "CONF",
    "AdamImpl",
    "AttentionConfig",
    "Auto",
    "CheckpointConfig",
    "ChoiceTask",
    "Config",
    "DataConfig",
    "DeepSpeedConfig",
    "EngineConfig",
    "EngineName",
    "EvaluationConfig",
    "Fp8Recipe",
    "Haystack",
    "KernelImpl",
    "LayerSpec",
    "LmEvalConfig",
    "LoggingConfig",
    "Method",
    "ModelConfig",
    "NeedleTask",
    "OptimConfig",
    "ParallelConfig",
    "PerplexityTask",
    "PrecisionConfig",
    "PrecisionName",
    "ProfileConfig",
    "Recompute",
    "RopeScalingConfig",
    "Schedule",
    "Score",
    "StreamDraw",
    "TaskConfig",
    "TensorboardConfig",
    "Timestamps",
    "TrackioConfig",
    "TrainingConfig",
    "WandbConfig",
    "WandbMode",
    "gates_per_head",
]
