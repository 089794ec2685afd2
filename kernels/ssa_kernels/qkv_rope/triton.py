"""The mixed projection split and rotated in one pass per direction (Triton).

Forward: reference.py has the mathematics. Backward: the gradients of q and k are rotated back, those of v and the gates copied:

    dx[i] = dy[i] cos a + dy[i + D/2] sin a        dx[i + D/2] = dy[i + D/2] cos a - dy[i] sin a

Memory-bound: each direction reads the projection once and writes it once. A program computes the cosines and sines of its tokens once
for all heads of a group: 32 pairs per token at D 64, shared by 18 heads. No layer then has to gather them, which would take four kernels
and two float32 tensors.

Grid: one program per (token tile, kv head).
"""

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from ..launch import cdiv, launch, next_power_of_2

BLOCK_TOKENS = 32
NUM_WARPS = 4


@triton.jit
def rotation(angles_ptr, positions_ptr, token, token_ok, pair, pair_ok, num_positions, angle_stride):
    """cos and sin [tokens, pairs] of a tile of tokens; a position outside the angles reads the nearest row."""
    position = tl.load(positions_ptr + token, mask=token_ok, other=0).to(tl.int64)
    position = tl.minimum(tl.maximum(position, 0), num_positions - 1)
    ok = token_ok[:, None] & pair_ok[None, :]
    angle = tl.load(angles_ptr + position[:, None] * angle_stride + pair[None, :], mask=ok, other=0.0)
    return tl.cos(angle), tl.sin(angle)


@triton.jit
def rotate_head(source_ptr, target_ptr, source, target, ok, cos, sin, HALF: tl.constexpr):
    """Rotates one head of a tile of tokens; `source` and `target` are the offsets of the first halves."""
    first = tl.load(source_ptr + source, mask=ok, other=0.0).to(tl.float32)
    second = tl.load(source_ptr + source + HALF, mask=ok, other=0.0).to(tl.float32)
    dtype = target_ptr.dtype.element_ty
    tl.store(target_ptr + target, (first * cos - second * sin).to(dtype), mask=ok)
    tl.store(target_ptr + target + HALF, (second * cos + first * sin).to(dtype), mask=ok)


@triton.jit(do_not_specialize=["num_tokens", "num_positions"])
def qkv_rope_forward_kernel(
    mixed_ptr, angles_ptr, positions_ptr, q_ptr, k_ptr, v_ptr, gate_ptr, num_tokens, num_positions, angle_stride,
    KV_HEADS: tl.constexpr, GROUP_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, GATES: tl.constexpr,
    BLOCK_HALF: tl.constexpr, BLOCK_GATES: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
):  # fmt: skip
    """One kv head's queries, key, value and gates of one tile of tokens."""
    HALF: tl.constexpr = HEAD_DIM // 2
    WIDTH: tl.constexpr = (GROUP_SIZE + 2) * HEAD_DIM + GATES
    kv_head = tl.program_id(1)
    token = tl.program_id(0).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    token_ok = token < num_tokens
    pair = tl.arange(0, BLOCK_HALF)
    pair_ok = pair < HALF
    ok = token_ok[:, None] & pair_ok[None, :]
    cos, sin = rotation(angles_ptr, positions_ptr, token, token_ok, pair, pair_ok, num_positions, angle_stride)

    source = (token * (KV_HEADS * WIDTH) + kv_head * WIDTH)[:, None] + pair[None, :]
    to_q = (token * (KV_HEADS * GROUP_SIZE * HEAD_DIM) + kv_head * (GROUP_SIZE * HEAD_DIM))[:, None] + pair[None, :]
    to_kv = (token * (KV_HEADS * HEAD_DIM) + kv_head * HEAD_DIM)[:, None] + pair[None, :]
    for head in tl.static_range(GROUP_SIZE):
        rotate_head(mixed_ptr, q_ptr, source + head * HEAD_DIM, to_q + head * HEAD_DIM, ok, cos, sin, HALF)
    rotate_head(mixed_ptr, k_ptr, source + GROUP_SIZE * HEAD_DIM, to_kv, ok, cos, sin, HALF)
    from_v = source + (GROUP_SIZE + 1) * HEAD_DIM
    tl.store(v_ptr + to_kv, tl.load(mixed_ptr + from_v, mask=ok), mask=ok)
    tl.store(v_ptr + to_kv + HALF, tl.load(mixed_ptr + from_v + HALF, mask=ok), mask=ok)
    if GATES > 0:
        gate = tl.arange(0, BLOCK_GATES)
        gate_ok = token_ok[:, None] & (gate < GATES)[None, :]
        from_gate = (token * (KV_HEADS * WIDTH) + kv_head * WIDTH + (GROUP_SIZE + 2) * HEAD_DIM)[:, None] + gate[
            None, :
        ]
        to_gate = (token * (KV_HEADS * GATES) + kv_head * GATES)[:, None] + gate[None, :]
        tl.store(gate_ptr + to_gate, tl.load(mixed_ptr + from_gate, mask=gate_ok), mask=gate_ok)


@triton.jit(do_not_specialize=["num_tokens", "num_positions"])
def qkv_rope_backward_kernel(
    dq_ptr, dk_ptr, dv_ptr, dgate_ptr, angles_ptr, positions_ptr, dmixed_ptr, num_tokens, num_positions, angle_stride,
    KV_HEADS: tl.constexpr, GROUP_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, GATES: tl.constexpr,
    BLOCK_HALF: tl.constexpr, BLOCK_GATES: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
):  # fmt: skip
    """One kv head's slice of the gradient for one tile of tokens."""
    HALF: tl.constexpr = HEAD_DIM // 2
    WIDTH: tl.constexpr = (GROUP_SIZE + 2) * HEAD_DIM + GATES
    kv_head = tl.program_id(1)
    token = tl.program_id(0).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    token_ok = token < num_tokens
    pair = tl.arange(0, BLOCK_HALF)
    pair_ok = pair < HALF
    ok = token_ok[:, None] & pair_ok[None, :]
    cos, sin = rotation(angles_ptr, positions_ptr, token, token_ok, pair, pair_ok, num_positions, angle_stride)

    target = (token * (KV_HEADS * WIDTH) + kv_head * WIDTH)[:, None] + pair[None, :]
    from_q = (token * (KV_HEADS * GROUP_SIZE * HEAD_DIM) + kv_head * (GROUP_SIZE * HEAD_DIM))[:, None] + pair[None, :]
    from_kv = (token * (KV_HEADS * HEAD_DIM) + kv_head * HEAD_DIM)[:, None] + pair[None, :]
    for head in tl.static_range(GROUP_SIZE):
        rotate_head(dq_ptr, dmixed_ptr, from_q + head * HEAD_DIM, target + head * HEAD_DIM, ok, cos, -sin, HALF)
    rotate_head(dk_ptr, dmixed_ptr, from_kv, target + GROUP_SIZE * HEAD_DIM, ok, cos, -sin, HALF)
    to_v = target + (GROUP_SIZE + 1) * HEAD_DIM
    tl.store(dmixed_ptr + to_v, tl.load(dv_ptr + from_kv, mask=ok), mask=ok)
    tl.store(dmixed_ptr + to_v + HALF, tl.load(dv_ptr + from_kv + HALF, mask=ok), mask=ok)
    if GATES > 0:
        gate = tl.arange(0, BLOCK_GATES)
        gate_ok = token_ok[:, None] & (gate < GATES)[None, :]
        from_gate = (token * (KV_HEADS * GATES) + kv_head * GATES)[:, None] + gate[None, :]
        to_gate = (token * (KV_HEADS * WIDTH) + kv_head * WIDTH + (GROUP_SIZE + 2) * HEAD_DIM)[:, None] + gate[None, :]
        tl.store(dmixed_ptr + to_gate, tl.load(dgate_ptr + from_gate, mask=gate_ok), mask=gate_ok)


class QKVRope(torch.autograd.Function):
    """(mixed, angles, positions, sizes) -> (q, k, v, gate logits). The backward is the inverse rotation, so no large tensor is saved."""

    @staticmethod
    def forward(ctx, mixed, angles, positions, num_kv_heads, group_size, head_dim, num_gates):
        """Runs the forward kernel."""
        ctx.sizes = (num_kv_heads, group_size, head_dim, num_gates)
        ctx.save_for_backward(angles, positions)
        return qkv_rope_forward(mixed, angles, positions, *ctx.sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_q, grad_k, grad_v, grad_gate):
        """Writes the gradient of the mixed projection in one pass."""
        grads = (grad.contiguous() for grad in (grad_q, grad_k, grad_v, grad_gate))
        return qkv_rope_backward(*grads, *ctx.saved_tensors, *ctx.sizes), *(None,) * 6


def qkv_rope_forward(
    mixed: torch.Tensor,
    angles: torch.Tensor,
    positions: torch.Tensor,
    num_kv_heads: int,
    group_size: int,
    head_dim: int,
    num_gates: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns (q, k, v, gate logits [tokens, G * num_gates]); mixed is contiguous, the other arguments are as in `qkv_rope`."""
    tokens = mixed.shape[0]
    q = mixed.new_empty(tokens, num_kv_heads * group_size, head_dim)
    k, v = (mixed.new_empty(tokens, num_kv_heads, head_dim) for _ in range(2))
    gate = mixed.new_empty(tokens, num_kv_heads * num_gates)
    if tokens > 0:
        launch(
            qkv_rope_forward_kernel, (cdiv(tokens, BLOCK_TOKENS), num_kv_heads),
            mixed, angles, positions, q, k, v, gate, tokens, angles.shape[0], angles.stride(0),
            KV_HEADS=num_kv_heads, GROUP_SIZE=group_size, HEAD_DIM=head_dim, GATES=num_gates,
            **_tile_sizes(head_dim, num_gates), num_warps=NUM_WARPS,
        )  # fmt: skip
    return q, k, v, gate


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
    """Returns the gradient of `mixed`. The gradients are contiguous; the other arguments are the forward's."""
    tokens = grad_q.shape[0]
    grad_mixed = grad_q.new_empty(tokens, num_kv_heads * ((group_size + 2) * head_dim + num_gates))
    if tokens > 0:
        launch(
            qkv_rope_backward_kernel, (cdiv(tokens, BLOCK_TOKENS), num_kv_heads),
            grad_q, grad_k, grad_v, grad_gate, angles, positions, grad_mixed, tokens, angles.shape[0], angles.stride(0),
            KV_HEADS=num_kv_heads, GROUP_SIZE=group_size, HEAD_DIM=head_dim, GATES=num_gates,
            **_tile_sizes(head_dim, num_gates), num_warps=NUM_WARPS,
        )  # fmt: skip
    return grad_mixed


def _tile_sizes(head_dim: int, num_gates: int) -> dict[str, int]:
    """Returns the kernels' tile sizes."""
    return {
        "BLOCK_HALF": next_power_of_2(head_dim // 2),
        "BLOCK_GATES": next_power_of_2(max(num_gates, 1)),
        "BLOCK_TOKENS": BLOCK_TOKENS,
    }
