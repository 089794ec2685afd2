"""The settings of the trained scorer of blocks (attention.score=indexer; docs/methods/indexer.md). Standard library only."""

from dataclasses import dataclass

from ssa_pretrain.settings.problems import Problem, above_zero, at_least, between

MOST_HEADS = 32  # of the GPU kernels


@dataclass(kw_only=True, slots=True, unsafe_hash=True)
class IndexerConfig:
    """The trained scorer: small index queries and keys beside attention's own. Used only with attention.score=indexer."""

    heads: int = 1  # J, index query heads per kv head; each kv head has one index key
    loss_weight: float = 1.0  # weight of the index loss, a mean over layers, queries and kv heads; it has gradients only for the scorer's weights
    warmup_steps: int = 1000  # steps of attention.method=indexer whose main stream is full, while the scorer learns

    def problems(self) -> list[Problem]:
        """Returns the problems within this section."""
        key = "attention.indexer"
        found = between(key, self, 1, MOST_HEADS, "heads") + at_least(key, self, 0, "warmup_steps")
        return found + above_zero(key, self, "loss_weight")
