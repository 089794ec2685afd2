"""The convolution of keys in one pass per direction (Triton).

Forward: reference.py has the mathematics. Backward, with s = sigmoid(c) and dc = dout * s * (1 + c * (1 - s)):

    dk[t] = dout[t] + sum over l < W of w_l * dc[t + l], where t + l is in t's document
    dw_l = sum over tokens t with l <= position[t] of dc[t] * k[t - l]

A program computes c of its own tokens and of the W - 1 after them again from k, W^2 loads that the first-level cache serves, so nothing is kept but k.
It writes its sums of dw, and torch adds the programs' sums: deterministic. Keys are few (2 of 36 heads of a projection in the 1B model),
so both directions cost little beside the projection's own passes.

Grid: one program per (token tile, kv head).
"""

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from ..launch import cdiv, launch, next_power_of_2

BLOCK_TOKENS = 32


@triton.jit
def earlier_key(k_ptr, token, position, distance, seen, channel, channel_ok, ROW: tl.constexpr):
    """The keys `distance` tokens before those of a tile, fp32 [tokens, D]; 0 before a document's first token and where `seen` is false."""
    ok = (seen & (position >= distance) & (token >= distance))[:, None] & channel_ok[None, :]
    return tl.load(k_ptr + ((token - distance) * ROW)[:, None] + channel[None, :], mask=ok, other=0.0).to(tl.float32)


@triton.jit
def tap(weight_ptr, distance, channel, channel_ok, TAPS: tl.constexpr):
    """w_l of each channel, fp32 [1, D]."""
    return tl.load(weight_ptr + channel * TAPS + (TAPS - 1 - distance), mask=channel_ok, other=0.0).to(tl.float32)[
        None, :
    ]


@triton.jit(do_not_specialize=["num_tokens"])
def key_convolution_forward_kernel(
    k_ptr, weight_ptr, positions_ptr, out_ptr, num_tokens,
    KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, TAPS: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
):  # fmt: skip
    """One kv head's convolved keys of one tile of tokens."""
    ROW: tl.constexpr = KV_HEADS * HEAD_DIM
    token = tl.program_id(0).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    token_ok = token < num_tokens
    element = tl.arange(0, BLOCK_D)
    channel, channel_ok = tl.program_id(1) * HEAD_DIM + element, element < HEAD_DIM
    position = tl.load(positions_ptr + token, mask=token_ok, other=0)
    own = earlier_key(k_ptr, token, position, 0, token_ok, channel, channel_ok, ROW)
    total = own * tap(weight_ptr, 0, channel, channel_ok, TAPS)
    for distance in tl.static_range(1, TAPS):
        key = earlier_key(k_ptr, token, position, distance, token_ok, channel, channel_ok, ROW)
        total += key * tap(weight_ptr, distance, channel, channel_ok, TAPS)
    out = own + total * tl.sigmoid(total)
    ok = token_ok[:, None] & channel_ok[None, :]
    tl.store(out_ptr + (token * ROW)[:, None] + channel[None, :], out.to(out_ptr.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["num_tokens"])
def key_convolution_backward_kernel(
    dout_ptr, k_ptr, weight_ptr, positions_ptr, dk_ptr, dw_ptr, num_tokens,
    KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, TAPS: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
):  # fmt: skip
    """One kv head's gradient of one tile of tokens, and the tile's sums of the weight's gradient, [W, D]."""
    ROW: tl.constexpr = KV_HEADS * HEAD_DIM
    first = tl.program_id(0).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    element = tl.arange(0, BLOCK_D)
    channel, channel_ok = tl.program_id(1) * HEAD_DIM + element, element < HEAD_DIM
    ok = (first < num_tokens)[:, None] & channel_ok[None, :]
    place = (first * ROW)[:, None] + channel[None, :]
    grad = tl.load(dout_ptr + place, mask=ok, other=0.0).to(tl.float32)
    to_dw = dw_ptr + ((tl.program_id(0).to(tl.int64) * KV_HEADS + tl.program_id(1)) * TAPS) * HEAD_DIM + element
    for later in tl.static_range(TAPS):
        token = first + later
        position = tl.load(positions_ptr + token, mask=token < num_tokens, other=-1)
        reached = (token < num_tokens) & (position >= later)  # whether the token sees the one of this tile
        total = tl.zeros([BLOCK_TOKENS, BLOCK_D], tl.float32)
        for distance in tl.static_range(TAPS):
            key = earlier_key(k_ptr, token, position, distance, reached, channel, channel_ok, ROW)
            total += key * tap(weight_ptr, distance, channel, channel_ok, TAPS)
        share = tl.sigmoid(total)
        its_ok = reached[:, None] & channel_ok[None, :]
        dc = tl.load(dout_ptr + place + later * ROW, mask=its_ok, other=0.0).to(tl.float32)
        dc *= share * (1.0 + total * (1.0 - share))
        grad += dc * tap(weight_ptr, later, channel, channel_ok, TAPS)
        if later == 0:
            for distance in tl.static_range(TAPS):
                key = earlier_key(k_ptr, token, position, distance, reached, channel, channel_ok, ROW)
                tl.store(to_dw + distance * HEAD_DIM, tl.sum(dc * key, axis=0), mask=channel_ok)
    tl.store(dk_ptr + place, grad.to(dk_ptr.dtype.element_ty), mask=ok)


class KeyConvolution(torch.autograd.Function):
    """(k, weight, positions) -> convolved keys; saves its inputs."""

    @staticmethod
    def forward(ctx, k, weight, positions):
        """Runs the forward kernel."""
        ctx.save_for_backward(k, weight, positions)
        out = torch.empty_like(k)
        if len(k):
            grid = (cdiv(len(k), BLOCK_TOKENS), k.shape[1])
            sizes = _constants(k, weight)
            launch(
                key_convolution_forward_kernel, grid, k, weight, positions, out, len(k), **sizes, num_warps=_warps(k)
            )
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        """Runs the backward kernel and adds its programs' sums."""
        k, weight, positions = ctx.saved_tensors
        (tokens, kv_heads, head_dim), taps = k.shape, weight.shape[2]
        grad_k, tiles = torch.empty_like(k), cdiv(tokens, BLOCK_TOKENS)
        partial = torch.empty(tiles, kv_heads, taps, head_dim, dtype=torch.float32, device=k.device)
        if tokens:
            launch(
                key_convolution_backward_kernel, (tiles, kv_heads),
                grad_out.contiguous(), k, weight, positions, grad_k, partial, tokens,
                **_constants(k, weight), num_warps=_warps(k),
            )  # fmt: skip
        grad_weight = partial.sum(0).flip(1).transpose(1, 2).reshape(weight.shape)
        return grad_k, grad_weight.to(weight.dtype), None


def _warps(k: torch.Tensor) -> int:
    """Returns the warps of a program; at wide heads four would spill."""
    return 4 if k.shape[2] <= 64 else 8


def _constants(k: torch.Tensor, weight: torch.Tensor) -> dict[str, int]:
    """Returns the kernels' compile-time arguments, in their order."""
    return {
        "KV_HEADS": k.shape[1],
        "HEAD_DIM": k.shape[2],
        "TAPS": weight.shape[2],
        "BLOCK_D": next_power_of_2(k.shape[2]),
        "BLOCK_TOKENS": BLOCK_TOKENS,
    }
