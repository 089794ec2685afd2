"""Rules of the trained scorer (attention.score=indexer): the methods that train it, and what it needs."""

from dataclasses import fields

from ssa_pretrain.config import Config, IndexerConfig, Method, Score
from ssa_pretrain.config.machine import Machine
from ssa_pretrain.settings.problems import Problem

NEEDED_SHARE = 0.125


def _method(config: Config, _: Machine) -> list[Problem]:
    """Method and score fit each other: the scorer learns from full attention, which full and moba do not compute beside their own stream."""
    attention = config.attention
    trained, method = attention.score is Score.indexer, attention.method
    if method is Method.indexer and not trained:
        rule = "is not trained, but attention.method=indexer is the method with a trained scorer"
        return [Problem("attention.score", attention.score, rule, "try indexer", ("attention.method",))]
    if trained and method not in (Method.indexer, Method.ssa):
        rule = f"is not trained by attention.method={method}, which computes one stream"
        return [Problem("attention.score", attention.score, rule, "try softmax_sum", ("attention.method",))]
    return []


def _main_stream(config: Config, machine: Machine) -> list[Problem]:
    """The method indexer has full attention first and sparse attention then, not a mixture."""
    attention = config.attention
    if attention.method is not Method.indexer:
        return []
    found, reads = [], ("attention.method",)
    if attention.full_ratio != 0.0:
        rule = "must be 0 under attention.method=indexer: its main stream is full for attention.indexer.warmup_steps, then sparse"
        found.append(Problem("attention.full_ratio", attention.full_ratio, rule, "try 0", reads))
    steps, warmup = config.training.num_steps(), attention.indexer.warmup_steps
    if 0 < steps <= warmup and "train" in machine.splits:
        reads = (*reads, "training.steps", "training.total_tokens", "training.global_batch_tokens")
        rule = f"leaves no step of sparse attention in a run of {steps}"
        found.append(Problem("attention.indexer.warmup_steps", warmup, rule, f"try {steps // 10}", reads))
    return found


def _training(config: Config, _: Machine) -> list[Problem]:
    """The scorer has queries to learn from, and layers whose projections it can join."""
    attention, found = config.attention, []
    if attention.score is not Score.indexer:
        return _without_effect(config)
    if attention.counterpart_share == 0.0:
        rule = "leaves attention.score=indexer without a query to learn from"
        found.append(Problem("attention.counterpart_share", 0.0, rule, f"try {NEEDED_SHARE}", ("attention.score",)))
    if config.engine.overlap_tp:
        rule = "has no buffer for the projection of attention.score=indexer"
        found.append(Problem("engine.overlap_tp", True, rule, "try engine.overlap_tp=false", ("attention.score",)))
    return found


def _without_effect(config: Config) -> list[Problem]:
    """Settings of the scorer under another score."""
    chosen, defaults = config.attention.indexer, IndexerConfig()
    names = [
        field.name for field in fields(IndexerConfig) if getattr(chosen, field.name) != getattr(defaults, field.name)
    ]
    rule, reads = f"has no effect under attention.score={config.attention.score}", ("attention.score",)
    advice = "add attention.score=indexer"
    return [Problem(f"attention.indexer.{name}", getattr(chosen, name), rule, advice, reads) for name in names]


INDEXER_RULES = (_method, _main_stream, _training)
