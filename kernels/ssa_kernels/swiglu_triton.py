"""SwiGLU in one pass per direction (Triton), in float32, rounded once.

    y = a s b        da = dy b s (1 + a (1 - s))        db = dy a s        s = sigmoid(a)

Grid: one program per (row of x, tile of columns).
"""

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from .launch import cdiv, launch, next_power_of_2

BLOCK = 2048
NUM_WARPS = 4


@triton.jit
def swiglu_forward_kernel(x_ptr, y_ptr, FEATURES: tl.constexpr, BLOCK: tl.constexpr):
    """One tile of one row of y."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = column < FEATURES
    a = tl.load(x_ptr + row * (2 * FEATURES) + column, mask=ok, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + row * (2 * FEATURES) + FEATURES + column, mask=ok, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * FEATURES + column, (a * tl.sigmoid(a) * b).to(y_ptr.dtype.element_ty), mask=ok)


@triton.jit
def swiglu_backward_kernel(x_ptr, grad_y_ptr, grad_x_ptr, FEATURES: tl.constexpr, BLOCK: tl.constexpr):
    """One tile of one row of x's gradient."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = column < FEATURES
    offset = row * (2 * FEATURES) + column
    a = tl.load(x_ptr + offset, mask=ok, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + offset + FEATURES, mask=ok, other=0.0).to(tl.float32)
    grad_y = tl.load(grad_y_ptr + row * FEATURES + column, mask=ok, other=0.0).to(tl.float32)
    s = tl.sigmoid(a)
    dtype = grad_x_ptr.dtype.element_ty
    tl.store(grad_x_ptr + offset, (grad_y * b * s * (1.0 + a * (1.0 - s))).to(dtype), mask=ok)
    tl.store(grad_x_ptr + offset + FEATURES, (grad_y * a * s).to(dtype), mask=ok)


class SwiGLU(torch.autograd.Function):
    """x -> y; x is contiguous. Saves x, the output of the projection before it."""

    @staticmethod
    def forward(ctx, x):
        """Runs the forward kernel."""
        ctx.save_for_backward(x)
        return swiglu_forward(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        """Runs the backward kernel."""
        (x,) = ctx.saved_tensors
        return swiglu_backward(x, grad_y.contiguous())


def swiglu_forward(x: torch.Tensor) -> torch.Tensor:
    """Returns y [..., F] for a contiguous x [..., 2 F]."""
    y = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
    if y.numel() > 0:
        grid, sizes = _tiling(y)
        launch(swiglu_forward_kernel, grid, x, y, **sizes, num_warps=NUM_WARPS)
    return y


def swiglu_backward(x: torch.Tensor, grad_y: torch.Tensor) -> torch.Tensor:
    """Returns the gradient of x; both arguments are contiguous."""
    grad_x = torch.empty_like(x)
    if grad_y.numel() > 0:
        grid, sizes = _tiling(grad_y)
        launch(swiglu_backward_kernel, grid, x, grad_y, grad_x, **sizes, num_warps=NUM_WARPS)
    return grad_x


def _tiling(y: torch.Tensor) -> tuple[tuple[int, int], dict[str, int]]:
    """Returns the grid over y's rows and columns, and the kernels' sizes."""
    features = y.shape[-1]
    block = min(BLOCK, next_power_of_2(features))
    return (y.numel() // features, cdiv(features, block)), {"FEATURES": features, "BLOCK": block}
