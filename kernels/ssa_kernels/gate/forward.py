"""The gated stream in one pass (Triton): out = o * sigmoid(logit). Grid: one program per tile of rows (token, head)."""

import torch
import triton
import triton.language as tl

from ..launch import cdiv, launch, next_power_of_2

TILE_ELEMENTS = 4096
NUM_WARPS = 4


@triton.jit(do_not_specialize=["num_rows"])
def gate_stream_forward_kernel(
    o_ptr, logits_ptr, out_ptr, num_rows, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_ROWS: tl.constexpr
):  # fmt: skip
    """One tile of rows."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    dims = tl.arange(0, BLOCK_DIM)
    row_ok = rows < num_rows
    ok = row_ok[:, None] & (dims < HEAD_DIM)[None, :]
    offsets = rows[:, None] * HEAD_DIM + dims[None, :]
    o = tl.load(o_ptr + offsets, mask=ok, other=0.0).to(tl.float32)
    gate = tl.sigmoid(tl.load(logits_ptr + rows, mask=row_ok, other=0.0).to(tl.float32))
    tl.store(out_ptr + offsets, (o * gate[:, None]).to(out_ptr.dtype.element_ty), mask=ok)


def gate_stream_forward(o: torch.Tensor, gate_logits: torch.Tensor) -> torch.Tensor:
    """Returns the gated stream; o [tokens, H, D] and the logits [tokens, H] are contiguous."""
    out = torch.empty_like(o)
    if out.numel() > 0:
        grid, sizes = tiling(o)
        launch(gate_stream_forward_kernel, grid, o, gate_logits, out, gate_logits.numel(), **sizes, num_warps=NUM_WARPS)
    return out


def tiling(o: torch.Tensor) -> tuple[tuple[int], dict[str, int]]:
    """Returns the grid and the kernels' constants: as many rows a program as a tile holds."""
    head_dim = o.shape[-1]
    block_dim = next_power_of_2(head_dim)
    block_rows = max(1, TILE_ELEMENTS // block_dim)
    grid = (cdiv(o.numel() // head_dim, block_rows),)
    return grid, {"HEAD_DIM": head_dim, "BLOCK_DIM": block_dim, "BLOCK_ROWS": block_rows}
