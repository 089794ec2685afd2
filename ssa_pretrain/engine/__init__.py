"""What runs a step, saves and loads: one small interface, one module a library. Nothing outside this package knows which one runs."""

from ssa_pretrain.config import Config, EngineName
from ssa_pretrain.engine.interface import Engine, EvaluationResult, StepResult
from ssa_pretrain.parallel.state import Placement, limit_waiting

__all__ = ["Engine", "EvaluationResult", "StepResult", "build_engine"]


def build_engine(config: Config, placement: Placement, vocab_size: int) -> Engine:
    """Return the engine that the configuration names."""
    if config.engine.name is EngineName.megatron:
        from ssa_pretrain.engine.megatron import MegatronEngine

        engine = MegatronEngine(config, placement, vocab_size)
        limit_waiting(config.parallel)
        return engine
    from ssa_pretrain.engine.deepspeed import DeepSpeedEngine

    return DeepSpeedEngine(config, placement, vocab_size)
