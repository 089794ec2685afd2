"""Both gradients of SwiGLU in one pass (Triton), with s = sigmoid(a): da = dy b s (1 + a (1 - s)), db = dy a s. Grid as in the forward."""

import torch
import triton
import triton.language as tl

from ..launch import launch
from .forward import NUM_WARPS, tiling


@triton.jit
def swiglu_backward_kernel(x_ptr, grad_y_ptr, grad_x_ptr, FEATURES: tl.constexpr, BLOCK: tl.constexpr):
    """One tile of one row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = column < FEATURES
    offset = row * (2 * FEATURES) + column
    a = tl.load(x_ptr + offset, mask=ok, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + offset + FEATURES, mask=ok, other=0.0).to(tl.float32)
    grad_y = tl.load(grad_y_ptr + row * FEATURES + column, mask=ok, other=0.0).to(tl.float32)
    s = tl.sigmoid(a)
    kind = grad_x_ptr.dtype.element_ty
    tl.store(grad_x_ptr + offset, (grad_y * b * s * (1.0 + a * (1.0 - s))).to(kind), mask=ok)
    tl.store(grad_x_ptr + offset + FEATURES, (grad_y * a * s).to(kind), mask=ok)


def swiglu_backward(x: torch.Tensor, grad_y: torch.Tensor) -> torch.Tensor:
    """Returns the gradient of x; both contiguous."""
    grad_x = torch.empty_like(x)
    if grad_y.numel() > 0:
        grid, sizes = tiling(grad_y)
        launch(swiglu_backward_kernel, grid, x, grad_y, grad_x, **sizes, num_warps=NUM_WARPS)
    return grad_x
