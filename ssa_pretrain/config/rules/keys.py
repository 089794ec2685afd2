"""Rules of what layers do to keys before they attend."""

from ssa_pretrain.config import Config, Method, Score
from ssa_pretrain.config.machine import Machine
from ssa_pretrain.settings.problems import Problem, join, nearest

WIDTHS = (0, 3, 5)
CONVOLVED = (Method.ssa, Method.moba)  # methods that choose blocks by their mean keys


def _key_convolution(config: Config, _: Machine) -> list[Problem]:
    """The convolution of keys has one of FlashMoBA's widths, and a method that chooses blocks by mean keys."""
    width, method = config.attention.key_convolution, config.attention.method
    key = "attention.key_convolution"
    if width not in WIDTHS:
        advice = f"try {join(nearest(width, WIDTHS))}"
        return [Problem(key, width, f"must be {join(map(str, WIDTHS))} tokens", advice)]
    if width and method not in CONVOLVED:
        rule = f"needs a method that chooses blocks by mean keys, and attention.method={method} does not"
        return [Problem(key, width, rule, "try 0 or attention.method=moba", ("attention.method",))]
    if width and config.attention.score is Score.indexer:
        rule = (
            "is for blocks that are chosen by mean keys, and attention.score=indexer chooses them by a trained scorer"
        )
        return [Problem(key, width, rule, "try 0", ("attention.score",))]
    return []


KEY_RULES = (_key_convolution,)
