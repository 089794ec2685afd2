"""Runs a step, saves and loads: one small interface, one package per library. Code outside does not know which engine runs."""

from typing import TYPE_CHECKING

from ssa_pretrain.config import Config, EngineName
from ssa_pretrain.engine.interface import Engine, EvaluationResult, Evaluator, PendingStep, Snapshot, StepResult

if TYPE_CHECKING:
    from ssa_pretrain.parallel.state import Placement

__all__ = [
    "Engine",
    "EvaluationResult",
    "Evaluator",
    "PendingStep",
    "Snapshot",
    "StepResult",
    "build_engine",
    "build_evaluator",
]


def build_engine(config: Config, placement: "Placement", vocab_size: int) -> Engine:
    """Returns the engine that the configuration names."""
    if config.engine.name is EngineName.megatron:
        from ssa_pretrain.engine.megatron.engine import MegatronEngine

        return MegatronEngine(config, placement, vocab_size)
    from ssa_pretrain.engine.deepspeed.engine import DeepSpeedEngine

    return DeepSpeedEngine(config, placement, vocab_size)


def build_evaluator(config: Config, placement: "Placement", vocab_size: int) -> Evaluator:
    """Returns the model without optimizer, gradient buffers and data parallelism: 2 bytes per parameter in bf16.

    It is megatron-core's for either engine, since both save the common weights and the layouts are core's.
    """
    from ssa_pretrain.engine.megatron.model import MegatronModel

    return MegatronModel(config, placement, vocab_size)
