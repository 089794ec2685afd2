"""The gradient of the mixed projection in one pass (Triton): queries' and keys' gradients turned back, values' and gates' copied.

    dx[i] = dy[i] cos a + dy[i + D/2] sin a,   dx[i + D/2] = dy[i + D/2] cos a - dy[i] sin a

Grid: one program per (token tile, kv head), as in the forward.
"""

import torch
import triton
import triton.language as tl

from ..launch import cdiv, launch
from .forward import BLOCK_TOKENS, NUM_WARPS, rotate_head, rotation, tile_sizes


@triton.jit(do_not_specialize=["num_tokens", "num_positions"])
def qkv_rope_backward_kernel(
    dq_ptr, dk_ptr, dv_ptr, dgate_ptr, angles_ptr, positions_ptr, dmixed_ptr, num_tokens, num_positions, angle_stride,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, GATES: tl.constexpr,
    BLOCK_HALF: tl.constexpr, BLOCK_GATES: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
):  # fmt: skip
    """One kv head's part of the gradient for one tile of tokens."""
    HALF: tl.constexpr = HEAD_DIM // 2
    WIDTH: tl.constexpr = (GROUP + 2) * HEAD_DIM + GATES
    kv_head = tl.program_id(1)
    token = tl.program_id(0).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    token_ok = token < num_tokens
    pair = tl.arange(0, BLOCK_HALF)
    pair_ok = pair < HALF
    ok = token_ok[:, None] & pair_ok[None, :]
    cos, sin = rotation(angles_ptr, positions_ptr, token, token_ok, pair, pair_ok, num_positions, angle_stride)

    target = (token * (KV_HEADS * WIDTH) + kv_head * WIDTH)[:, None] + pair[None, :]
    from_q = (token * (KV_HEADS * GROUP * HEAD_DIM) + kv_head * (GROUP * HEAD_DIM))[:, None] + pair[None, :]
    from_kv = (token * (KV_HEADS * HEAD_DIM) + kv_head * HEAD_DIM)[:, None] + pair[None, :]
    for head in tl.static_range(GROUP):
        rotate_head(dq_ptr, dmixed_ptr, from_q + head * HEAD_DIM, target + head * HEAD_DIM, ok, cos, -sin, HALF)
    rotate_head(dk_ptr, dmixed_ptr, from_kv, target + GROUP * HEAD_DIM, ok, cos, -sin, HALF)
    to_v = target + (GROUP + 1) * HEAD_DIM
    tl.store(dmixed_ptr + to_v, tl.load(dv_ptr + from_kv, mask=ok), mask=ok)
    tl.store(dmixed_ptr + to_v + HALF, tl.load(dv_ptr + from_kv + HALF, mask=ok), mask=ok)
    if GATES > 0:
        gate = tl.arange(0, BLOCK_GATES)
        gate_ok = token_ok[:, None] & (gate < GATES)[None, :]
        from_gate = (token * (KV_HEADS * GATES) + kv_head * GATES)[:, None] + gate[None, :]
        to_gate = (token * (KV_HEADS * WIDTH) + kv_head * WIDTH + (GROUP + 2) * HEAD_DIM)[:, None] + gate[None, :]
        tl.store(dmixed_ptr + to_gate, tl.load(dgate_ptr + from_gate, mask=gate_ok), mask=gate_ok)


def qkv_rope_backward(
    grad_q: torch.Tensor,
    grad_k: torch.Tensor,
    grad_v: torch.Tensor,
    grad_gate: torch.Tensor,
    angles: torch.Tensor,
    positions: torch.Tensor,
    num_kv_heads: int,
    group_size: int,
    head_dim: int,
    num_gates: int,
) -> torch.Tensor:
    """Returns the gradient of `mixed`; the gradients are contiguous, the rest as in the forward."""
    tokens = grad_q.shape[0]
    grad_mixed = grad_q.new_empty(tokens, num_kv_heads * ((group_size + 2) * head_dim + num_gates))
    if tokens > 0:
        launch(
            qkv_rope_backward_kernel, (cdiv(tokens, BLOCK_TOKENS), num_kv_heads),
            grad_q, grad_k, grad_v, grad_gate, angles, positions, grad_mixed, tokens, angles.shape[0], angles.stride(0),
            KV_HEADS=num_kv_heads, GROUP=group_size, HEAD_DIM=head_dim, GATES=num_gates,
            **tile_sizes(head_dim, num_gates), num_warps=NUM_WARPS,
        )  # fmt: skip
    return grad_mixed
