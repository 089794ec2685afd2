"""The gates of an attention method: how many sigmoid gates the projection computes per token and query head."""

from ssa_pretrain.config.choices import Method
from ssa_pretrain.config.schema import AttentionConfig


def gates_per_head(attention: AttentionConfig) -> int:
    """Returns the gates per query head: none without `attention.gate`, one for each of NSA's three branches, otherwise one."""
    branches = 3 if attention.method is Method.nsa else 1
    return branches if attention.gate else 0
