"""The mixed projection split and rotated in plain PyTorch: the definition of the operator, and the implementation for a CPU.

With a the angle of a pair (i, i + D/2) at the token's position:

    y[i]       = x[i] cos a - x[i + D/2] sin a
    y[i + D/2] = x[i + D/2] cos a + x[i] sin a

The pairs are (i, i + D/2), not neighbours, as in Llama checkpoints in the Hugging Face layout. Angles and products are in float32 (float64
for float64 inputs), the result in the input's dtype.
"""

import torch

from ..dispatch import dense_gradient


def qkv_rope_reference(
    mixed: torch.Tensor,
    angles: torch.Tensor,
    positions: torch.Tensor,
    *,
    num_kv_heads: int,
    group_size: int,
    head_dim: int,
    num_gates: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Returns (q, k, v, gate logits or None); arguments as in `qkv_rope`."""
    tokens, half = mixed.shape[0], head_dim // 2
    widths = [group_size * head_dim, head_dim, head_dim, num_gates]
    q, k, v, gate = mixed.view(tokens, num_kv_heads, sum(widths)).split(widths, dim=-1)
    q = q.reshape(tokens, num_kv_heads * group_size, head_dim)
    chosen = angles[positions.long().clamp(0, angles.shape[0] - 1), :half]
    cos, sin = (torch.cat([x, x], dim=-1).unsqueeze(1) for x in (chosen.cos(), chosen.sin()))
    gate = dense_gradient(gate.reshape(tokens, num_kv_heads * num_gates)) if num_gates else None
    q, k, v = (dense_gradient(x) for x in (rotate(q, cos, sin), rotate(k, cos, sin), v.contiguous()))
    return q, k, v, gate


def rotate(x_THD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Returns x rotated; cos and sin are [tokens, 1, D], the two halves equal."""
    half = x_THD.shape[-1] // 2
    x = x_THD.to(torch.promote_types(x_THD.dtype, torch.float32))
    swapped = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return (x * cos + swapped * sin).to(x_THD.dtype)
