"""RMSNorm for megatron-core's local layers.

megatron-core's own wrapper around `torch.nn.RMSNorm` refuses sequence parallelism. Under it each tensor rank sees a slice of the tokens, so
the weight's gradient must be summed over the ranks; megatron-core does that for parameters that carry `sequence_parallel = True`.
"""

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


class RMSNorm(torch.nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight over the last dim, with megatron-core's constructor."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        super().__init__(hidden_size, eps=eps)
        self.weight.sequence_parallel = config.sequence_parallel
