"""The gated sum of three branches in one pass per direction (Triton).

    out = sum_i g_i o_i        do_i = g_i dout        dlogit_i = g_i (1 - g_i) sum_d dout o_i        g_i = sigmoid(logit_i)

A *vector* is one head of one token: D features of each branch, and three neighbouring gates.
Grid: one program per tile of vectors.
"""

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from .gate_triton import NUM_WARPS, tile_shape, vector_tile
from .launch import cdiv, launch


@triton.jit
def _gate(logits_ptr, vector, vector_ok, BRANCH: tl.constexpr):
    """Returns a branch's gate of each vector."""
    return tl.sigmoid(tl.load(logits_ptr + vector * 3 + BRANCH, mask=vector_ok, other=0.0).to(tl.float32))


@triton.jit
def _gated(o_ptr, logits_ptr, vector, vector_ok, offsets, ok, BRANCH: tl.constexpr):
    """Returns a branch's gated features."""
    o = tl.load(o_ptr + offsets, mask=ok, other=0.0).to(tl.float32)
    return o * _gate(logits_ptr, vector, vector_ok, BRANCH)[:, None]


@triton.jit
def _gradients(
    grad_out, o_ptr, logits_ptr, grad_o_ptr, grad_logits_ptr, vector, vector_ok, offsets, ok, BRANCH: tl.constexpr
):  # fmt: skip
    """Stores a branch's gradients of its features and its gates."""
    o = tl.load(o_ptr + offsets, mask=ok, other=0.0).to(tl.float32)
    gate = _gate(logits_ptr, vector, vector_ok, BRANCH)
    tl.store(grad_o_ptr + offsets, (grad_out * gate[:, None]).to(grad_o_ptr.dtype.element_ty), mask=ok)
    grad_logits = tl.sum(grad_out * o, 1) * gate * (1.0 - gate)
    tl.store(grad_logits_ptr + vector * 3 + BRANCH, grad_logits.to(grad_logits_ptr.dtype.element_ty), mask=vector_ok)


@triton.jit(do_not_specialize=["num_vectors"])
def gated_sum_forward_kernel(
    a_ptr, b_ptr, c_ptr, logits_ptr, out_ptr, num_vectors,
    HEAD_DIM: tl.constexpr, TILE_DIM: tl.constexpr, TILE_VECTORS: tl.constexpr,
):  # fmt: skip
    """One tile of out."""
    vector, vector_ok, offsets, ok = vector_tile(num_vectors, HEAD_DIM, TILE_DIM, TILE_VECTORS)
    out = _gated(a_ptr, logits_ptr, vector, vector_ok, offsets, ok, 0)
    out += _gated(b_ptr, logits_ptr, vector, vector_ok, offsets, ok, 1)
    out += _gated(c_ptr, logits_ptr, vector, vector_ok, offsets, ok, 2)
    tl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["num_vectors"])
def gated_sum_backward_kernel(
    a_ptr, b_ptr, c_ptr, logits_ptr, grad_out_ptr, grad_a_ptr, grad_b_ptr, grad_c_ptr, grad_logits_ptr, num_vectors,
    HEAD_DIM: tl.constexpr, TILE_DIM: tl.constexpr, TILE_VECTORS: tl.constexpr,
):  # fmt: skip
    """One tile of all gradients."""
    vector, vector_ok, offsets, ok = vector_tile(num_vectors, HEAD_DIM, TILE_DIM, TILE_VECTORS)
    grad_out = tl.load(grad_out_ptr + offsets, mask=ok, other=0.0).to(tl.float32)
    _gradients(grad_out, a_ptr, logits_ptr, grad_a_ptr, grad_logits_ptr, vector, vector_ok, offsets, ok, 0)
    _gradients(grad_out, b_ptr, logits_ptr, grad_b_ptr, grad_logits_ptr, vector, vector_ok, offsets, ok, 1)
    _gradients(grad_out, c_ptr, logits_ptr, grad_c_ptr, grad_logits_ptr, vector, vector_ok, offsets, ok, 2)


class GatedSum(torch.autograd.Function):
    """(o_0, o_1, o_2, gate_logits) -> out; all inputs are contiguous. Saves its inputs, of which attention keeps the branches anyway."""

    @staticmethod
    def forward(ctx, *inputs):
        """Runs the forward kernel."""
        ctx.save_for_backward(*inputs)
        out = torch.empty_like(inputs[0])
        if out.numel() > 0:
            grid, sizes = _tiling(out)
            launch(
                gated_sum_forward_kernel, grid, *inputs, out, out.numel() // out.shape[-1], **sizes, num_warps=NUM_WARPS
            )
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        """Runs the backward kernel."""
        inputs = ctx.saved_tensors
        grads = [torch.empty_like(x) for x in inputs]
        if grad_out.numel() > 0:
            grid, sizes = _tiling(grad_out)
            count = grad_out.numel() // grad_out.shape[-1]
            launch(
                gated_sum_backward_kernel,
                grid,
                *inputs,
                grad_out.contiguous(),
                *grads,
                count,
                **sizes,
                num_warps=NUM_WARPS,
            )
        return tuple(grads)


def _tiling(o: torch.Tensor) -> tuple[tuple[int], dict[str, int]]:
    """Returns the grid and the kernels' sizes: each program takes half as many vectors as a tile of one branch holds."""
    tile_dim, tile_vectors = tile_shape(o.shape[-1])
    tile_vectors = max(1, tile_vectors // 2)
    grid = (cdiv(o.numel() // o.shape[-1], tile_vectors),)
    return grid, {"HEAD_DIM": o.shape[-1], "TILE_DIM": tile_dim, "TILE_VECTORS": tile_vectors}
