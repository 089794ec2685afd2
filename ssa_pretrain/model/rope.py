"""Rotary position embedding by position, for packed documents whose positions restart.

megatron-core computes the table of angles (with Llama-3 scaling); here each token picks its row. Halves are rotated, not neighbours, as in
Llama checkpoints of the Hugging Face layout. Angles and products are fp32; the result has the input's dtype.
"""

import torch
from torch import Tensor


def rotate(x_THD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """Return x rotated by its token's angles: [tokens, heads, D], any dtype; cos and sin are [tokens, D] in fp32."""
    half = x_THD.shape[-1] // 2
    x = x_THD.float()
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return (x * cos_TD.unsqueeze(1) + turned * sin_TD.unsqueeze(1)).to(x_THD.dtype)


def angles(table: Tensor, positions_T: Tensor) -> tuple[Tensor, Tensor]:
    """Return (cos, sin), fp32 [tokens, D], of the rows of megatron-core's table [positions, 1, 1, D] that the tokens need."""
    chosen = table[positions_T].flatten(1).float()
    return chosen.cos(), chosen.sin()
