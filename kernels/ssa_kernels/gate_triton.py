"""The gate in one pass per direction (Triton).

    out = g o        do = g dout        dlogit = g (1 - g) sum_d dout o        g = sigmoid(logit)

A *vector* is one head of one token: D features and one gate.
Grid: one program per tile of vectors.
"""

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from .launch import cdiv, launch, next_power_of_2

TILE_ELEMENTS = 4096
NUM_WARPS = 4


@triton.jit
def vector_tile(num_vectors, HEAD_DIM: tl.constexpr, TILE_DIM: tl.constexpr, TILE_VECTORS: tl.constexpr):
    """Returns (vectors, their mask, offsets of their elements, mask of the elements) of this program's tile."""
    vector = tl.program_id(0).to(tl.int64) * TILE_VECTORS + tl.arange(0, TILE_VECTORS)
    dim = tl.arange(0, TILE_DIM)
    vector_ok = vector < num_vectors
    ok = vector_ok[:, None] & (dim < HEAD_DIM)[None, :]
    offsets = vector[:, None] * HEAD_DIM + dim[None, :]
    return vector, vector_ok, offsets, ok


@triton.jit(do_not_specialize=["num_vectors"])
def gate_stream_forward_kernel(
    o_ptr, logits_ptr, out_ptr, num_vectors,
    HEAD_DIM: tl.constexpr, TILE_DIM: tl.constexpr, TILE_VECTORS: tl.constexpr,
):  # fmt: skip
    """One tile of out."""
    vector, vector_ok, offsets, ok = vector_tile(num_vectors, HEAD_DIM, TILE_DIM, TILE_VECTORS)
    o = tl.load(o_ptr + offsets, mask=ok, other=0.0).to(tl.float32)
    gate = tl.sigmoid(tl.load(logits_ptr + vector, mask=vector_ok, other=0.0).to(tl.float32))
    tl.store(out_ptr + offsets, (o * gate[:, None]).to(out_ptr.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["num_vectors"])
def gate_stream_backward_kernel(
    o_ptr, logits_ptr, grad_out_ptr, grad_o_ptr, grad_logits_ptr, num_vectors,
    HEAD_DIM: tl.constexpr, TILE_DIM: tl.constexpr, TILE_VECTORS: tl.constexpr,
):  # fmt: skip
    """One tile of both gradients."""
    vector, vector_ok, offsets, ok = vector_tile(num_vectors, HEAD_DIM, TILE_DIM, TILE_VECTORS)
    o = tl.load(o_ptr + offsets, mask=ok, other=0.0).to(tl.float32)
    grad_out = tl.load(grad_out_ptr + offsets, mask=ok, other=0.0).to(tl.float32)
    gate = tl.sigmoid(tl.load(logits_ptr + vector, mask=vector_ok, other=0.0).to(tl.float32))
    tl.store(grad_o_ptr + offsets, (grad_out * gate[:, None]).to(grad_o_ptr.dtype.element_ty), mask=ok)
    grad_logits = tl.sum(grad_out * o, 1) * gate * (1.0 - gate)
    tl.store(grad_logits_ptr + vector, grad_logits.to(grad_logits_ptr.dtype.element_ty), mask=vector_ok)


class Gate(torch.autograd.Function):
    """(o, gate_logits) -> out; both inputs are contiguous. Saves its inputs, of which attention keeps o anyway."""

    @staticmethod
    def forward(ctx, o, gate_logits):
        """Runs the forward kernel."""
        ctx.save_for_backward(o, gate_logits)
        return gate_stream_forward(o, gate_logits)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        """Runs the backward kernel."""
        o, gate_logits = ctx.saved_tensors
        return gate_stream_backward(o, gate_logits, grad_out.contiguous())


def gate_stream_forward(o: torch.Tensor, gate_logits: torch.Tensor) -> torch.Tensor:
    """Returns the gated stream; o [tokens, H, D] and gate_logits [tokens, H] are contiguous."""
    out = torch.empty_like(o)
    if out.numel() > 0:
        grid, sizes = _tiling(o)
        launch(gate_stream_forward_kernel, grid, o, gate_logits, out, gate_logits.numel(), **sizes, num_warps=NUM_WARPS)
    return out


def gate_stream_backward(
    o: torch.Tensor, gate_logits: torch.Tensor, grad_out: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (grad_o, grad_logits); all tensors are contiguous, with the forward's shapes."""
    grad_o, grad_logits = torch.empty_like(o), torch.empty_like(gate_logits)
    if o.numel() > 0:
        grid, sizes = _tiling(o)
        launch(
            gate_stream_backward_kernel, grid,
            o, gate_logits, grad_out, grad_o, grad_logits, gate_logits.numel(), **sizes, num_warps=NUM_WARPS,
        )  # fmt: skip
    return grad_o, grad_logits


def _tiling(o: torch.Tensor) -> tuple[tuple[int], dict[str, int]]:
    """Returns the grid and the kernels' sizes: each program takes as many vectors as a tile holds."""
    head_dim = o.shape[-1]
    tile_dim, tile_vectors = tile_shape(head_dim)
    grid = (cdiv(o.numel() // head_dim, tile_vectors),)
    return grid, {"HEAD_DIM": head_dim, "TILE_DIM": tile_dim, "TILE_VECTORS": tile_vectors}


def tile_shape(head_dim: int) -> tuple[int, int]:
    """Returns (features, vectors) of a tile: head_dim rounded up to a power of two, and the vectors that fit."""
    tile_dim = next_power_of_2(head_dim)
    return tile_dim, max(1, TILE_ELEMENTS // tile_dim)
