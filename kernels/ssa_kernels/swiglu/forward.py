"""SwiGLU in one pass (Triton): y = a sigmoid(a) b in float32, rounded once. Grid: one program per (row, tile of columns)."""

import torch
import triton
import triton.language as tl

from ..launch import cdiv, launch, next_power_of_2

BLOCK = 2048
NUM_WARPS = 4


@triton.jit
def swiglu_forward_kernel(x_ptr, y_ptr, FEATURES: tl.constexpr, BLOCK: tl.constexpr):
    """One tile of one row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = column < FEATURES
    a = tl.load(x_ptr + row * (2 * FEATURES) + column, mask=ok, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + row * (2 * FEATURES) + FEATURES + column, mask=ok, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * FEATURES + column, (a * tl.sigmoid(a) * b).to(y_ptr.dtype.element_ty), mask=ok)


def swiglu_forward(x: torch.Tensor) -> torch.Tensor:
    """Returns y [..., F] of a contiguous x [..., 2 F]."""
    y = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
    if y.numel() > 0:
        grid, sizes = tiling(y)
        launch(swiglu_forward_kernel, grid, x, y, **sizes, num_warps=NUM_WARPS)
    return y


def tiling(y: torch.Tensor) -> tuple[tuple[int, int], dict[str, int]]:
    """Returns the grid over y's rows and columns and the kernels' constants."""
    features = y.shape[-1]
    block = min(BLOCK, next_power_of_2(features))
    return (y.numel() // features, cdiv(features, block)), {"FEATURES": features, "BLOCK": block}
