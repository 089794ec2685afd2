"""The mixed projection split, normed and rotated in plain PyTorch: the definition of the operators, and the implementation for a CPU.

With a the angle of a pair (i, i + D/2) at the token's position:

    y[i]       = x[i] cos a - x[i + D/2] sin a
    y[i + D/2] = x[i + D/2] cos a + x[i] sin a

The pairs are (i, i + D/2), not neighbours, as in Llama checkpoints in the Hugging Face layout. Angles and products are in float32 (float64
for float64 inputs), the result in the input's dtype.

With QK-norm, RMSNorm over the head comes first, with one learnt weight of D numbers for all query heads and one for all keys:

    x <- w * x / sqrt(mean over the head of x^2 + eps)

As in Qwen3 (per head, before RoPE). OLMo 2 norms over all heads at once, which would need a sum over tensor ranks. Nothing is rounded
between the norm and the rotation.
"""

from typing import NamedTuple

import torch

from ..dispatch import dense_gradient


class QKNorm(NamedTuple):
    """QK-norm: the weights of all query heads and of all keys, `[D]` each, and what is added to the mean square."""

    q: torch.Tensor
    k: torch.Tensor
    eps: float


def qkv_rope_reference(
    mixed: torch.Tensor,
    angles: torch.Tensor,
    positions: torch.Tensor,
    *,
    num_kv_heads: int,
    group_size: int,
    head_dim: int,
    num_gates: int,
    norm: QKNorm | None = None,
    rotate_keys: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Returns (q, k, v, gate logits or None); arguments as in `qkv_rope`."""
    tokens = mixed.shape[0]
    widths = [group_size * head_dim, head_dim, head_dim, num_gates]
    q, k, v, gate = mixed.view(tokens, num_kv_heads, sum(widths)).split(widths, dim=-1)
    q = q.reshape(tokens, num_kv_heads * group_size, head_dim)
    cos, sin = rotations(angles, positions, head_dim)
    gate = dense_gradient(gate.reshape(tokens, num_kv_heads * num_gates)) if num_gates else None
    q_weight, k_weight, eps = norm or (None, None, 0.0)
    q = rotate(q, cos, sin, q_weight, eps)
    k = rotate(k, cos, sin, k_weight, eps) if rotate_keys else k.contiguous()
    q, k, v = (dense_gradient(x) for x in (q, k, v.contiguous()))
    return q, k, v, gate


def rope_reference(
    x_THD: torch.Tensor, angles: torch.Tensor, positions: torch.Tensor, weight: torch.Tensor | None, eps: float
) -> torch.Tensor:
    """Returns x normed and rotated; arguments as in `rope`."""
    return dense_gradient(rotate(x_THD, *rotations(angles, positions, x_THD.shape[-1]), weight, eps))


def rotations(angles: torch.Tensor, positions: torch.Tensor, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns cos and sin, [tokens, 1, D] each, the two halves equal."""
    chosen = angles[positions.long().clamp(0, angles.shape[0] - 1), : head_dim // 2]
    cos, sin = (torch.cat([x, x], dim=-1).unsqueeze(1) for x in (chosen.cos(), chosen.sin()))
    return cos, sin


def rotate(
    x_THD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, weight: torch.Tensor | None = None, eps: float = 0.0
) -> torch.Tensor:
    """Returns x normed, if there is a weight, and rotated; cos and sin are [tokens, 1, D], the two halves equal."""
    half = x_THD.shape[-1] // 2
    x = x_THD.to(torch.promote_types(x_THD.dtype, torch.float32))
    if weight is not None:
        x = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.to(x.dtype)
    swapped = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return (x * cos + swapped * sin).to(x_THD.dtype)
