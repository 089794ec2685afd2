"""Rules of attention.method=nsa: its branches need their gates, and blocks are chosen by the compressed branch's probabilities."""

from ssa_pretrain.config import Config, Method, Score
from ssa_pretrain.config.machine import Machine
from ssa_pretrain.settings.problems import Problem

SCORES = (Score.compressed, Score.official_compat)


def _gates(config: Config, _: Machine) -> list[Problem]:
    """The three branches are summed by their gates."""
    attention = config.attention
    if attention.method is not Method.nsa or attention.gate:
        return []
    rule = "leaves the three branches of attention.method=nsa without the gates that sum them"
    return [Problem("attention.gate", attention.gate, rule, "try attention.gate=true", ("attention.method",))]


def _scores(config: Config, _: Machine) -> list[Problem]:
    """NSA scores blocks by its compressed branch, and no other method has one."""
    attention, reads = config.attention, ("attention.method",)
    if attention.method is Method.nsa and attention.score not in SCORES:
        rule = (
            "must be compressed or official_compat under attention.method=nsa: its compressed branch scores the blocks"
        )
        return [Problem("attention.score", attention.score, rule, "try compressed", reads)]
    if attention.method is not Method.nsa and attention.score is Score.compressed:
        rule = "needs attention.method=nsa, which has a compressed branch"
        return [Problem("attention.score", attention.score, rule, "try softmax_sum", reads)]
    return []


NSA_RULES = (_gates, _scores)
