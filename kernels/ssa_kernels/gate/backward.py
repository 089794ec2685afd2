"""Both gradients of the gate in one pass (Triton): do = g dout, dlogit = g (1 - g) sum_d dout o. Grid as in the forward."""

import torch
import triton
import triton.language as tl

from ..launch import launch
from .forward import NUM_WARPS, tiling


@triton.jit(do_not_specialize=["num_rows"])
def gate_stream_backward_kernel(
    o_ptr, logits_ptr, grad_out_ptr, grad_o_ptr, grad_logits_ptr, num_rows,
    HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """One tile of rows."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    dims = tl.arange(0, BLOCK_DIM)
    row_ok = rows < num_rows
    ok = row_ok[:, None] & (dims < HEAD_DIM)[None, :]
    offsets = rows[:, None] * HEAD_DIM + dims[None, :]
    o = tl.load(o_ptr + offsets, mask=ok, other=0.0).to(tl.float32)
    grad_out = tl.load(grad_out_ptr + offsets, mask=ok, other=0.0).to(tl.float32)
    gate = tl.sigmoid(tl.load(logits_ptr + rows, mask=row_ok, other=0.0).to(tl.float32))
    tl.store(grad_o_ptr + offsets, (grad_out * gate[:, None]).to(grad_o_ptr.dtype.element_ty), mask=ok)
    grad_logits = tl.sum(grad_out * o, 1) * gate * (1.0 - gate)
    tl.store(grad_logits_ptr + rows, grad_logits.to(grad_logits_ptr.dtype.element_ty), mask=row_ok)


def gate_stream_backward(
    o: torch.Tensor, gate_logits: torch.Tensor, grad_out: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (grad_o, grad_logits); all contiguous, shapes as in the forward."""
    grad_o, grad_logits = torch.empty_like(o), torch.empty_like(gate_logits)
    if o.numel() > 0:
        grid, sizes = tiling(o)
        launch(
            gate_stream_backward_kernel, grid,
            o, gate_logits, grad_out, grad_o, grad_logits, gate_logits.numel(), **sizes, num_warps=NUM_WARPS,
        )  # fmt: skip
    return grad_o, grad_logits
