"""The configuration of a run: its schema, the machine it runs on, its rules and DeepSpeed's dictionary.

Reading order: choices, evaluation, indexer, trackers, checkpoint, schedule, schema, gates, machine, rules/, deepspeed. This module re-exports all up to
gates, so importing it is cheap.
"""

from pathlib import Path

from ssa_pretrain.config.checkpoint import CheckpointConfig
from ssa_pretrain.config.choices import (
    AdamImpl,
    Auto,
    EngineName,
    Fp8Recipe,
    Haystack,
    KernelImpl,
    LayerSpec,
    Method,
    MuonScale,
    OptimizerName,
    PrecisionName,
    Recompute,
    RowPacking,
    Schedule,
    Score,
    Shape,
    StreamDraw,
    Timestamps,
    WandbMode,
)
from ssa_pretrain.config.data import DataConfig, StageConfig
from ssa_pretrain.config.evaluation import (
    ChoiceTask,
    EvaluationConfig,
    LmEvalConfig,
    NeedleTask,
    PerplexityTask,
    TaskConfig,
)
from ssa_pretrain.config.gates import gates_per_head
from ssa_pretrain.config.indexer import IndexerConfig
from ssa_pretrain.config.optimizers import MuonConfig, MupConfig
from ssa_pretrain.config.schedule import Batches, BatchStepConfig, PieceConfig, batches, piece_bounds
from ssa_pretrain.config.schema import (
    AttentionConfig,
    Config,
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

PACKAGE = Path(__file__).resolve().parents[1]
# The YAML files of the settings: within the package if it was installed from a wheel (setup.py), else beside it in the repository.
CONF = PACKAGE / "conf" if (PACKAGE / "conf").is_dir() else PACKAGE.parent / "conf"

__all__ = [
    "CONF",
    "AdamImpl",
    "AttentionConfig",
    "Auto",
    "BatchStepConfig",
    "Batches",
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
    "IndexerConfig",
    "KernelImpl",
    "LayerSpec",
    "LmEvalConfig",
    "LoggingConfig",
    "Method",
    "ModelConfig",
    "MuonConfig",
    "MuonScale",
    "MupConfig",
    "NeedleTask",
    "OptimConfig",
    "OptimizerName",
    "ParallelConfig",
    "PerplexityTask",
    "PieceConfig",
    "PrecisionConfig",
    "PrecisionName",
    "ProfileConfig",
    "Recompute",
    "RopeScalingConfig",
    "RowPacking",
    "Schedule",
    "Score",
    "Shape",
    "StageConfig",
    "StreamDraw",
    "TaskConfig",
    "TensorboardConfig",
    "Timestamps",
    "TrackioConfig",
    "TrainingConfig",
    "WandbConfig",
    "WandbMode",
    "batches",
    "gates_per_head",
    "piece_bounds",
]
