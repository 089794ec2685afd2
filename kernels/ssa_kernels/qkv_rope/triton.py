"""The mixed projection split, normed and rotated in one pass per direction (Triton).

Forward: reference.py has the mathematics. Backward: the gradients of q and k are rotated back, those of v and the gates copied:

    dx[i] = dy[i] cos a + dy[i + D/2] sin a        dx[i + D/2] = dy[i + D/2] cos a - dy[i] sin a

With QK-norm, y = n * w is what is rotated, n = x * r with r = (mean(x^2) + eps)^-1/2 over a head. From dy, the gradient rotated back:

    dw = sum of dy * n        dx = r * (dy * w - n * mean(dy * w * n))

r and n are computed again from x, so the backward reads the projection too, and nothing else is kept. Each program writes its sums of dw over its
tokens and heads, [2, D] in fp32, and torch adds the programs' sums: deterministic.

Memory-bound: each direction reads the projection once and writes it once. With QK-norm the backward reads it too. A program computes the
cosines and sines of its tokens once for all heads of a group: 32 pairs per token at D 64, shared by 18 heads. No layer then has to gather them,
which would take four kernels and two float32 tensors.

The same kernels norm and rotate heads that are no projection (`rope`): to them these are queries, one per group, without keys, values and gates.

Grid: one program per (token tile, kv head).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from ..devices import gpu_of
from ..launch import cdiv, launch, next_power_of_2
from .reference import QKNorm

BLOCK_TOKENS = 32
NONE, RAW, ROTATED = (
    0,
    1,
    2,
)  # what becomes of keys: there are none (and no values), they are copied like values, they are normed and rotated


class Sizes(NamedTuple):
    """The compile-time sizes of a projection; the widths of its heads follow from them."""

    num_kv_heads: int
    group_size: int
    head_dim: int
    num_gates: int
    keys: int = ROTATED

    @property
    def width(self) -> int:
        """Columns of the projection per kv head."""
        return (self.group_size + 2 * (self.keys > NONE)) * self.head_dim + self.num_gates


@triton.jit
def rotation(angles_ptr, positions_ptr, token, token_ok, pair, pair_ok, num_positions, angle_stride):
    """cos and sin [tokens, pairs] of a tile of tokens; a position outside the angles reads the nearest row."""
    position = tl.load(positions_ptr + token, mask=token_ok, other=0).to(tl.int64)
    position = tl.minimum(tl.maximum(position, 0), num_positions - 1)
    ok = token_ok[:, None] & pair_ok[None, :]
    angle = tl.load(angles_ptr + position[:, None] * angle_stride + pair[None, :], mask=ok, other=0.0)
    return tl.cos(angle), tl.sin(angle)


@triton.jit
def head_scale(first, second, D: tl.constexpr, EPS: tl.constexpr):
    """1 / root mean square of each token's head, [tokens, 1], from its two halves."""
    squares = tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)
    return tl.rsqrt(squares / D + EPS)[:, None]


@triton.jit
def rotate_head(
    source_ptr, target_ptr, weight_ptr, source, target, pair, ok, cos, sin,
    HALF: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """Norms and rotates one head of a tile of tokens; `source` and `target` are the offsets of the first halves."""
    first = tl.load(source_ptr + source, mask=ok, other=0.0).to(tl.float32)
    second = tl.load(source_ptr + source + HALF, mask=ok, other=0.0).to(tl.float32)
    dtype = target_ptr.dtype.element_ty
    if NORM:
        scale = head_scale(first, second, 2 * HALF, EPS)
        first *= scale * tl.load(weight_ptr + pair, mask=pair < HALF, other=0.0).to(tl.float32)[None, :]
        second *= scale * tl.load(weight_ptr + HALF + pair, mask=pair < HALF, other=0.0).to(tl.float32)[None, :]
    tl.store(target_ptr + target, (first * cos - second * sin).to(dtype), mask=ok)
    tl.store(target_ptr + target + HALF, (second * cos + first * sin).to(dtype), mask=ok)


@triton.jit
def rotate_head_back(
    grad_ptr, source_ptr, target_ptr, weight_ptr, grad, source, pair, ok, cos, sin, dw_first, dw_second,
    HALF: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """Writes the gradient of one head of a tile of tokens where it lies in the projection; returns dw with the tile's sums added, by half.

    `sin` is that of the forward, negated.
    """
    dy_first = tl.load(grad_ptr + grad, mask=ok, other=0.0).to(tl.float32)
    dy_second = tl.load(grad_ptr + grad + HALF, mask=ok, other=0.0).to(tl.float32)
    dx_first, dx_second = dy_first * cos - dy_second * sin, dy_second * cos + dy_first * sin
    if NORM:
        first = tl.load(source_ptr + source, mask=ok, other=0.0).to(tl.float32)
        second = tl.load(source_ptr + source + HALF, mask=ok, other=0.0).to(tl.float32)
        scale = head_scale(first, second, 2 * HALF, EPS)
        first *= scale
        second *= scale
        dw_first += tl.sum(dx_first * first, axis=0)
        dw_second += tl.sum(dx_second * second, axis=0)
        dx_first *= tl.load(weight_ptr + pair, mask=pair < HALF, other=0.0).to(tl.float32)[None, :]
        dx_second *= tl.load(weight_ptr + HALF + pair, mask=pair < HALF, other=0.0).to(tl.float32)[None, :]
        along = (tl.sum(dx_first * first, axis=1) + tl.sum(dx_second * second, axis=1)) / (2 * HALF)
        dx_first = scale * (dx_first - first * along[:, None])
        dx_second = scale * (dx_second - second * along[:, None])
    dtype = target_ptr.dtype.element_ty
    tl.store(target_ptr + source, dx_first.to(dtype), mask=ok)
    tl.store(target_ptr + source + HALF, dx_second.to(dtype), mask=ok)
    return dw_first, dw_second


@triton.jit
def copy_head(source_ptr, target_ptr, source, target, ok, HALF: tl.constexpr):
    """Copies one head of a tile of tokens."""
    tl.store(target_ptr + target, tl.load(source_ptr + source, mask=ok), mask=ok)
    tl.store(target_ptr + target + HALF, tl.load(source_ptr + source + HALF, mask=ok), mask=ok)


@triton.jit(do_not_specialize=["num_tokens", "num_positions"])
def qkv_rope_forward_kernel(
    mixed_ptr, q_weight_ptr, k_weight_ptr, angles_ptr, positions_ptr, q_ptr, k_ptr, v_ptr, gate_ptr,
    num_tokens, num_positions, angle_stride,
    KV_HEADS: tl.constexpr, GROUP_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, GATES: tl.constexpr, KEYS: tl.constexpr,
    WIDTH: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr,
    BLOCK_HALF: tl.constexpr, BLOCK_GATES: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
):  # fmt: skip
    """One kv head's queries, key, value and gates of one tile of tokens."""
    HALF: tl.constexpr = HEAD_DIM // 2
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
        rotate_head(
            mixed_ptr, q_ptr, q_weight_ptr, source + head * HEAD_DIM, to_q + head * HEAD_DIM, pair, ok, cos, sin, HALF, NORM, EPS
        )  # fmt: skip
    if KEYS == 2:
        rotate_head(
            mixed_ptr, k_ptr, k_weight_ptr, source + GROUP_SIZE * HEAD_DIM, to_kv, pair, ok, cos, sin, HALF, NORM, EPS
        )  # fmt: skip
    if KEYS == 1:
        copy_head(mixed_ptr, k_ptr, source + GROUP_SIZE * HEAD_DIM, to_kv, ok, HALF)
    if KEYS > 0:
        copy_head(mixed_ptr, v_ptr, source + (GROUP_SIZE + 1) * HEAD_DIM, to_kv, ok, HALF)
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
    dq_ptr, dk_ptr, dv_ptr, dgate_ptr, mixed_ptr, q_weight_ptr, k_weight_ptr, angles_ptr, positions_ptr, dmixed_ptr, dw_ptr,
    num_tokens, num_positions, angle_stride,
    KV_HEADS: tl.constexpr, GROUP_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, GATES: tl.constexpr, KEYS: tl.constexpr,
    WIDTH: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr,
    BLOCK_HALF: tl.constexpr, BLOCK_GATES: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
):  # fmt: skip
    """One kv head's slice of the gradient for one tile of tokens, and the tile's sums of the norms' weights' gradients."""
    HALF: tl.constexpr = HEAD_DIM // 2
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
    to_dw = dw_ptr + (tl.program_id(0).to(tl.int64) * KV_HEADS + kv_head) * (2 * HEAD_DIM) + pair
    zero = tl.zeros([BLOCK_HALF], tl.float32)
    dw_first, dw_second = zero, zero
    for head in tl.static_range(GROUP_SIZE):
        dw_first, dw_second = rotate_head_back(
            dq_ptr, mixed_ptr, dmixed_ptr, q_weight_ptr, from_q + head * HEAD_DIM, target + head * HEAD_DIM, pair, ok, cos, -sin,
            dw_first, dw_second, HALF, NORM, EPS,
        )  # fmt: skip
    if NORM:
        tl.store(to_dw, dw_first, mask=pair_ok)
        tl.store(to_dw + HALF, dw_second, mask=pair_ok)
    if KEYS == 2:
        dw_first, dw_second = rotate_head_back(
            dk_ptr, mixed_ptr, dmixed_ptr, k_weight_ptr, from_kv, target + GROUP_SIZE * HEAD_DIM, pair, ok, cos, -sin,
            zero, zero, HALF, NORM, EPS,
        )  # fmt: skip
        if NORM:
            tl.store(to_dw + HEAD_DIM, dw_first, mask=pair_ok)
            tl.store(to_dw + HEAD_DIM + HALF, dw_second, mask=pair_ok)
    if KEYS == 1:
        copy_head(dk_ptr, dmixed_ptr, from_kv, target + GROUP_SIZE * HEAD_DIM, ok, HALF)
    if KEYS > 0:
        copy_head(dv_ptr, dmixed_ptr, from_kv, target + (GROUP_SIZE + 1) * HEAD_DIM, ok, HALF)
    if GATES > 0:
        gate = tl.arange(0, BLOCK_GATES)
        gate_ok = token_ok[:, None] & (gate < GATES)[None, :]
        from_gate = (token * (KV_HEADS * GATES) + kv_head * GATES)[:, None] + gate[None, :]
        to_gate = (token * (KV_HEADS * WIDTH) + kv_head * WIDTH + (GROUP_SIZE + 2) * HEAD_DIM)[:, None] + gate[None, :]
        tl.store(dmixed_ptr + to_gate, tl.load(dgate_ptr + from_gate, mask=gate_ok), mask=gate_ok)


class QKVRope(torch.autograd.Function):
    """(mixed, angles, positions, sizes, q weight, k weight, eps) -> (q, k, v, gate logits); the weights are None without QK-norm.

    Without QK-norm the backward is the inverse rotation, so no large tensor is saved; with it, `mixed` is.
    """

    @staticmethod
    def forward(ctx, mixed, angles, positions, sizes, q_weight=None, k_weight=None, eps=0.0):
        """Runs the forward kernel."""
        ctx.sizes, ctx.eps = sizes, eps
        norm = None if q_weight is None else QKNorm(q_weight, q_weight if k_weight is None else k_weight, eps)
        ctx.save_for_backward(angles, positions, *(() if norm is None else (mixed, *norm[:2])))
        return qkv_rope_forward(mixed, angles, positions, sizes, norm)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_q, grad_k, grad_v, grad_gate):
        """Writes the gradient of the mixed projection in one pass."""
        grads = tuple(grad.contiguous() for grad in (grad_q, grad_k, grad_v, grad_gate))
        angles, positions, *rest = ctx.saved_tensors
        if not rest:
            return qkv_rope_backward(grads, angles, positions, ctx.sizes), *(None,) * 6
        mixed, q_weight, k_weight = rest
        norm = QKNorm(q_weight, k_weight, ctx.eps)
        grad, dw = qkv_norm_rope_backward(grads, angles, positions, ctx.sizes, mixed, norm)
        has_keys = ctx.sizes.keys == ROTATED
        return grad, None, None, None, dw[0].to(q_weight.dtype), dw[1].to(k_weight.dtype) if has_keys else None, None


def qkv_rope_forward(
    mixed: torch.Tensor, angles: torch.Tensor, positions: torch.Tensor, sizes: Sizes, norm: QKNorm | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns (q, k, v, gate logits [tokens, G * num_gates]); mixed is contiguous, the other arguments are as in `qkv_rope`.

    Without keys (`sizes.keys` is NONE) k and v are empty.
    """
    tokens, kv_heads, head_dim = mixed.shape[0], sizes.num_kv_heads, sizes.head_dim
    q = mixed.new_empty(tokens, kv_heads * sizes.group_size, head_dim)
    k, v = (mixed.new_empty(tokens * (sizes.keys > NONE), kv_heads, head_dim) for _ in range(2))
    gate = mixed.new_empty(tokens, kv_heads * sizes.num_gates)
    weights = (mixed, mixed) if norm is None else norm[:2]  # not read without a norm
    if tokens > 0:
        launch(
            qkv_rope_forward_kernel, (cdiv(tokens, BLOCK_TOKENS), kv_heads),
            mixed, *weights, angles, positions, q, k, v, gate, tokens, angles.shape[0], angles.stride(0),
            **_constants(sizes, norm), num_warps=_warps(mixed.device, sizes),
        )  # fmt: skip
    return q, k, v, gate


def qkv_rope_backward(
    grads: tuple[torch.Tensor, ...], angles: torch.Tensor, positions: torch.Tensor, sizes: Sizes
) -> torch.Tensor:
    """Returns the gradient of `mixed` without QK-norm. `grads` are those of q, k, v and the gates, contiguous; the other arguments are the forward's."""
    return _backward(grads, angles, positions, sizes, None, None)[0]


def qkv_norm_rope_backward(
    grads: tuple[torch.Tensor, ...],
    angles: torch.Tensor,
    positions: torch.Tensor,
    sizes: Sizes,
    mixed: torch.Tensor,
    norm: QKNorm,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the gradients of `mixed` and, fp32 [2, D], of the norms' weights of queries and keys; arguments as in `qkv_rope_backward`."""
    grad_mixed, partial = _backward(grads, angles, positions, sizes, mixed, norm)
    return grad_mixed, partial.sum((0, 1))


def _backward(
    grads: tuple[torch.Tensor, ...],
    angles: torch.Tensor,
    positions: torch.Tensor,
    sizes: Sizes,
    mixed: torch.Tensor | None,
    norm: QKNorm | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the gradient of `mixed`, and each program's sums of the weights' gradients, [tiles, G, 2, D]."""
    grad_q, tokens, kv_heads = grads[0], grads[0].shape[0], sizes.num_kv_heads
    grad_mixed = grad_q.new_empty(tokens, kv_heads * sizes.width)
    tiles = cdiv(tokens, BLOCK_TOKENS)
    has_norm = mixed is not None and norm is not None
    shape = (tiles, kv_heads, 2, sizes.head_dim) if has_norm else (0,)
    partial = grad_q.new_zeros(shape, dtype=torch.float32)  # no program writes the keys' sums without keys
    inputs = (mixed, *norm[:2]) if has_norm else (grad_q,) * 3  # not read without a norm
    if tokens > 0:
        launch(
            qkv_rope_backward_kernel, (tiles, kv_heads),
            *grads, *inputs, angles, positions, grad_mixed, partial, tokens, angles.shape[0], angles.stride(0),
            **_constants(sizes, norm), num_warps=_warps(grad_q.device, sizes),
        )  # fmt: skip
    return grad_mixed, partial


def _warps(device: torch.device, sizes: Sizes) -> int:
    """Returns the warps of a program: eight where four spill, at head dim 256 with a norm, and on Blackwell (compiled, not measured)."""
    return 8 if sizes.head_dim > 128 or gpu_of(device).capability >= 100 else 4


def _constants(sizes: Sizes, norm: QKNorm | None) -> dict[str, int | bool | float]:
    """Returns the kernels' compile-time arguments, in their order."""
    return {
        "KV_HEADS": sizes.num_kv_heads,
        "GROUP_SIZE": sizes.group_size,
        "HEAD_DIM": sizes.head_dim,
        "GATES": sizes.num_gates,
        "KEYS": sizes.keys,
        "WIDTH": sizes.width,
        "NORM": norm is not None,
        "EPS": 0.0 if norm is None else norm.eps,
        "BLOCK_HALF": next_power_of_2(sizes.head_dim // 2),
        "BLOCK_GATES": next_power_of_2(max(sizes.num_gates, 1)),
        "BLOCK_TOKENS": BLOCK_TOKENS,
    }
