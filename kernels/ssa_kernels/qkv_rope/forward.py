"""The mixed projection taken apart and rotated in one pass (Triton).

Mathematics: reference.py. Memory-bound: the projection is read once and written once. A program computes the cosines and sines of its
tokens itself, once for all heads of a group: 32 pairs a token at D 64, next to nothing beside the 18 heads they turn, and it spares every
layer four kernels and two float32 tensors.

Grid: one program per (token tile, kv head).
"""

import torch
import triton
import triton.language as tl

from ..launch import cdiv, launch, next_power_of_2

BLOCK_TOKENS = 32
NUM_WARPS = 4


@triton.jit
def rotation(angles_ptr, positions_ptr, token, token_ok, pair, pair_ok, num_positions, angle_stride):
    """cos and sin [tokens, pairs] of a tile of tokens; a position outside the angles takes the nearest row."""
    position = tl.load(positions_ptr + token, mask=token_ok, other=0).to(tl.int64)
    position = tl.minimum(tl.maximum(position, 0), num_positions - 1)
    ok = token_ok[:, None] & pair_ok[None, :]
    angle = tl.load(angles_ptr + position[:, None] * angle_stride + pair[None, :], mask=ok, other=0.0)
    return tl.cos(angle), tl.sin(angle)


@triton.jit
def rotate_head(source_ptr, target_ptr, source, target, ok, cos, sin, HALF: tl.constexpr):
    """Turn one head of a tile of tokens; `source` and `target` are the offsets of the first halves."""
    first = tl.load(source_ptr + source, mask=ok, other=0.0).to(tl.float32)
    second = tl.load(source_ptr + source + HALF, mask=ok, other=0.0).to(tl.float32)
    kind = target_ptr.dtype.element_ty
    tl.store(target_ptr + target, (first * cos - second * sin).to(kind), mask=ok)
    tl.store(target_ptr + target + HALF, (second * cos + first * sin).to(kind), mask=ok)


@triton.jit(do_not_specialize=["num_tokens", "num_positions"])
def qkv_rope_forward_kernel(
    mixed_ptr, angles_ptr, positions_ptr, q_ptr, k_ptr, v_ptr, gate_ptr, num_tokens, num_positions, angle_stride,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, GATES: tl.constexpr,
    BLOCK_HALF: tl.constexpr, BLOCK_GATES: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
):  # fmt: skip
    """One kv head's queries, key, value and gates of one tile of tokens."""
    HALF: tl.constexpr = HEAD_DIM // 2
    WIDTH: tl.constexpr = (GROUP + 2) * HEAD_DIM + GATES
    kv_head = tl.program_id(1)
    token = tl.program_id(0).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    token_ok = token < num_tokens
    pair = tl.arange(0, BLOCK_HALF)
    pair_ok = pair < HALF
    ok = token_ok[:, None] & pair_ok[None, :]
    cos, sin = rotation(angles_ptr, positions_ptr, token, token_ok, pair, pair_ok, num_positions, angle_stride)

    source = (token * (KV_HEADS * WIDTH) + kv_head * WIDTH)[:, None] + pair[None, :]
    to_q = (token * (KV_HEADS * GROUP * HEAD_DIM) + kv_head * (GROUP * HEAD_DIM))[:, None] + pair[None, :]
    to_kv = (token * (KV_HEADS * HEAD_DIM) + kv_head * HEAD_DIM)[:, None] + pair[None, :]
    for head in tl.static_range(GROUP):
        rotate_head(mixed_ptr, q_ptr, source + head * HEAD_DIM, to_q + head * HEAD_DIM, ok, cos, sin, HALF)
    rotate_head(mixed_ptr, k_ptr, source + GROUP * HEAD_DIM, to_kv, ok, cos, sin, HALF)
    from_v = source + (GROUP + 1) * HEAD_DIM
    tl.store(v_ptr + to_kv, tl.load(mixed_ptr + from_v, mask=ok), mask=ok)
    tl.store(v_ptr + to_kv + HALF, tl.load(mixed_ptr + from_v + HALF, mask=ok), mask=ok)
    if GATES > 0:
        gate = tl.arange(0, BLOCK_GATES)
        gate_ok = token_ok[:, None] & (gate < GATES)[None, :]
        from_gate = (token * (KV_HEADS * WIDTH) + kv_head * WIDTH + (GROUP + 2) * HEAD_DIM)[:, None] + gate[None, :]
        to_gate = (token * (KV_HEADS * GATES) + kv_head * GATES)[:, None] + gate[None, :]
        tl.store(gate_ptr + to_gate, tl.load(mixed_ptr + from_gate, mask=gate_ok), mask=gate_ok)


def qkv_rope_forward(
    mixed: torch.Tensor,
    angles: torch.Tensor,
    positions: torch.Tensor,
    num_kv_heads: int,
    group_size: int,
    head_dim: int,
    num_gates: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns (q, k, v, gate logits [tokens, G * num_gates]); mixed is contiguous, the rest as in `qkv_rope`."""
    tokens = mixed.shape[0]
    q = mixed.new_empty(tokens, num_kv_heads * group_size, head_dim)
    k, v = (mixed.new_empty(tokens, num_kv_heads, head_dim) for _ in range(2))
    gate = mixed.new_empty(tokens, num_kv_heads * num_gates)
    if tokens > 0:
        launch(
            qkv_rope_forward_kernel, (cdiv(tokens, BLOCK_TOKENS), num_kv_heads),
            mixed, angles, positions, q, k, v, gate, tokens, angles.shape[0], angles.stride(0),
            KV_HEADS=num_kv_heads, GROUP=group_size, HEAD_DIM=head_dim, GATES=num_gates,
            **tile_sizes(head_dim, num_gates), num_warps=NUM_WARPS,
        )  # fmt: skip
    return q, k, v, gate


def tile_sizes(head_dim: int, num_gates: int) -> dict[str, int]:
    """Returns the kernels' block constants."""
    return {
        "BLOCK_HALF": next_power_of_2(head_dim // 2),
        "BLOCK_GATES": next_power_of_2(max(num_gates, 1)),
        "BLOCK_TOKENS": BLOCK_TOKENS,
    }
