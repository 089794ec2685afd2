"""What runs a step, saves and loads: one small interface, one module a library. Nothing outside this package knows which one runs."""

from ssa_pretrain.engine.interface import Engine, EvaluationResult, StepResult, build_engine

__all__ = ["Engine", "EvaluationResult", "StepResult", "build_engine"]
